"""Rows that are trained on more than once: by `repeat` of their source, or so that a source makes up its `share`. No Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayward.config.sources import SourceConfig
from rayward.schema import digest


def train_rows_by_file(table: pa.Table) -> dict[Any, int]:
    """Training rows of a block by their file, or its number."""
    trained = table.filter(pc.fill_null(pc.equal(table["split"], "train"), False))
    return dict(Counter(trained["file"].to_pylist()))


def repeats_of(sources: Mapping[str, SourceConfig], rows: Mapping[str, int]) -> dict[str, float]:
    """How often each training row of a file is used, 1 or more; files of 1 are left out.

    Shares: the source that is used the least is used once, the others as often as their shares ask.

    Args:
        sources: by file.
        rows: usable training rows by file.
    """
    trained = {uri: source for uri, source in sources.items() if source.role == "train"}
    if not any(source.share is not None for source in trained.values()):
        return {uri: source.repeat for uri, source in trained.items() if source.repeat != 1.0}
    totals: dict[SourceConfig | str, float] = {}
    key = {uri: digest(source.model_dump(mode="json")) for uri, source in trained.items()}
    for uri in trained:
        totals[key[uri]] = totals.get(key[uri], 0.0) + rows.get(uri, 0)
    wanted = {uri: (source.share or 0.0) / totals[key[uri]] for uri, source in trained.items() if totals[key[uri]]}
    least = min(wanted.values(), default=1.0)
    return {uri: times for uri, density in wanted.items() if (times := density / least) > 1.0}


def repeated(table: pa.Table, repeats: Mapping[Any, float]) -> pa.Table:
    """Rows with a split; training rows of a repeated file as often as it says, every copy at a place of its own.

    A fraction is decided by a hash of the row's place, so the result does not depend on blocks or workers.
    """
    table = table.filter(pc.is_valid(table["split"]))
    if not repeats:
        return table
    indices: list[int] = []
    orders: list[str] = []
    columns = (table[name].to_pylist() for name in ("file", "split", "order"))
    for index, (file, split, order) in enumerate(zip(*columns, strict=True)):
        times = repeats.get(file, 1.0) if split == "train" else 1.0
        whole = math.floor(times)
        whole += int(digest(["repeat", order])[:13], 16) / 16**13 < times - whole
        for copy in range(whole):
            indices.append(index)
            orders.append(order if copy == 0 else f"{split} {digest([order, copy])} {copy}")
    taken = table.take(pa.array(indices, pa.int64()))
    return taken.set_column(taken.schema.get_field_index("order"), taken.schema.field("order"), pa.array(orders, pa.string()))
