"""Columns that no adapter reads: counted over all rows where they are adapted, added up, and told. No Ray.

The counts of a block travel on one of its rows, by JSON of source, column and type.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rayward.data.formats.columns import Columns, type_of
from rayward.data.prepared import UnusedColumn

LIMIT = 200
"""Columns of one block that are counted, the most frequent: rows of free keys would fill it."""


class Leftovers:
    """The counts of one block."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, source: str, columns: Columns, row: Mapping[str, Any]) -> None:
        """Count a row."""
        for name in columns.unused(row):
            self._counts[source, name, type_of(row[name])] += 1

    def dump(self) -> str | None:
        """For the way to the driver; None where every column is read."""
        kept = self._counts.most_common(LIMIT)
        return json.dumps({json.dumps(key): count for key, count in kept}) if kept else None


def unused_columns(
    counts: Mapping[str, int], rows: Mapping[str, int], settings: Mapping[str, Mapping[str, str]]
) -> tuple[UnusedColumn, ...]:
    """The counts of all blocks, a line for each column of each source, the most frequent first.

    Args:
        counts: the sums of what `Leftovers.dump` gave.
        rows: by source.
        settings: by source, columns that a setting would read, and that setting.
    """
    found: dict[tuple[str, str], Counter[str]] = {}
    for detail, count in counts.items():
        source, column, kind = json.loads(detail)
        found.setdefault((source, column), Counter())[kind] += count
    listed = [
        UnusedColumn(
            source=source,
            column=column.encode("utf-8", "backslashreplace").decode(),
            type=" or ".join(kind for kind, _ in kinds.most_common()),
            num_rows=kinds.total(),
            share=kinds.total() / max(rows.get(source, 0), kinds.total()),
            setting=settings.get(source, {}).get(column),
        )
        for (source, column), kinds in found.items()
    ]
    return tuple(sorted(listed, key=lambda each: (each.source, -each.num_rows, each.column)))
