"""Hidden states of a prepared split as arrays on disk: computed on Ray, in order, a block in memory at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayward.config.placement import Placement
from rayward.data.prepared import PreparedData, ShardEntry
from rayward.errors import DataError, ScoringError
from rayward.workflows.mixture_fit import SLICE

COLUMNS = ("row", "prompt_key", "ranks", "attributes", "prompt_json", "completions_json", "inputs_json")
HIDDEN = ("end_hidden", "gate_hidden")
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Features:
    """Hidden states and labels of one prepared split, completion by completion; arrays that are mapped from files.

    Attributes:
        ends, gates: float32 [N, H]; ratings: float64 [N, A] (NaN missing).
        pairs: int64 [P, 2], better and worse completion of every pair with a winner.
        held_out: bool [N], by prompt.
    """

    ends: npt.NDArray[np.float32]
    gates: npt.NDArray[np.float32]
    ratings: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]


class Spill:
    """An array that grows on disk, row by row.

    Args:
        path: of a file that is not there yet.
        dtype: of its numbers.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._stream = path.open("xb")
        self._rows = 0
        self._width: tuple[int, ...] | None = None

    def add(self, rows: npt.ArrayLike) -> None:
        """Some rows more, of the shape of those before."""
        values = np.ascontiguousarray(rows, dtype=self._dtype)
        assert self._width in (None, values.shape[1:]), f"{values.shape[1:]} after {self._width}"
        self._width = values.shape[1:]
        self._rows += len(values)
        self._stream.write(values.tobytes())

    def close(self) -> None:
        """Nothing more is added."""
        self._stream.close()

    def done(self, width: tuple[int, ...] = ()) -> npt.NDArray[Any]:
        """All rows, read from the file where they are looked at.

        Args:
            width: shape of a row, where there is none.
        """
        self.close()
        shape = (self._rows, *(width if self._width is None else self._width))
        # An empty file cannot be mapped.
        return np.memmap(self._path, dtype=self._dtype, mode="r", shape=shape) if 0 not in shape else np.zeros(shape, dtype=self._dtype)


def features_of(model: str, prepared: PreparedData, directory: Path, *, placement: Placement) -> Features:
    """Features of the train split; every row must have them.

    Args:
        directory: local and empty; holds the arrays, 8 bytes for each completion and unit of the hidden size.

    Raises:
        DataError: a row has none.
        ScoringError: rows were lost.
    """
    from rayward.scoring.batch import feature_blocks, reading

    sources = [(prepared, shard) for shard in prepared.manifest.train_shards]
    blocks = reading(sources, _shard, scorers=placement.actors, in_order=True, block_bytes=BLOCK_BYTES)
    found = feature_blocks(blocks, model=str(Path(model).resolve()), placement=placement)
    return collect(found, directory, num_rows=prepared.manifest.num_train, num_attributes=len(prepared.manifest.labels.attributes))


def _shard(source: tuple[PreparedData, ShardEntry]) -> Iterator[pa.Table]:
    # In a read task.
    from rayward.scoring.batch import ROWS_PER_CALL

    prepared, shard = source
    alone = PreparedData(prepared.directory, prepared.manifest.model_copy(update={"train_shards": (shard,)}))
    yield from alone.tables("train", COLUMNS, max_rows=ROWS_PER_CALL)


def collect(blocks: Iterable[pa.Table], directory: Path, *, num_rows: int, num_attributes: int) -> Features:
    """Rows with features, in order, as arrays on disk.

    Args and raises: as `features_of`.
    """
    kinds = {"ends": np.float32, "gates": np.float32, "ratings": np.float64, "pairs": np.int64, "held_out": np.bool_}
    with ExitStack() as stack:
        spills = {name: stack.enter_context(closing(Spill(directory / name, dtype))) for name, dtype in kinds.items()}
        _fill(spills, blocks, num_rows, num_attributes)
    return Features(**{name: spill.done((2,) if name == "pairs" else (0,)) for name, spill in spills.items()})


def _fill(spills: dict[str, Spill], blocks: Iterable[pa.Table], num_rows: int, num_attributes: int) -> None:
    failed: Counter[str] = Counter()
    example = ""
    row_number = offset = 0
    for block in blocks:
        hidden = [block[name] for name in HIDDEN]
        for index, row in enumerate(block.drop_columns(list(HIDDEN)).to_pylist()):
            if row["row"] != row_number:
                raise ScoringError(f"row {row['row']} came where {row_number} was due", remedy="run the same command again")
            row_number += 1
            if row["error"] is not None:
                failed[row["error"]["code"]] += 1
                example = example or row["error"]["message"]
                continue
            ends, gates = (column[index].values.to_numpy(zero_copy_only=False) for column in hidden)
            offset += _add(spills, row, ends, gates, offset, num_attributes)
    if row_number != num_rows:
        raise ScoringError(f"{row_number} of {num_rows} prepared rows came back", remedy="run the same command again")
    if failed:
        raise DataError(f"{failed.total()} prepared rows give no features, for example: {example}", remedy="quarantine or correct them")


def _add(
    spills: dict[str, Spill], row: dict[str, Any], ends: npt.NDArray[Any], gates: npt.NDArray[Any], offset: int, num_attributes: int
) -> int:
    size = len(json.loads(row["completions_json"]))
    spills["ends"].add(ends.reshape(size, -1))
    spills["gates"].add(gates.reshape(size, -1))
    given: Sequence[Sequence[float]] | None = row["attributes"]
    rated = np.full((size, num_attributes), np.nan) if given is None else np.array([list(r) for r in given], dtype=np.float64)
    spills["ratings"].add(rated)
    if row["ranks"] is not None:
        ranks = np.asarray(row["ranks"])
        spills["pairs"].add(np.argwhere(ranks[:, None] < ranks[None, :]) + offset)
    # One in five prompts chooses the penalty, by their hash.
    spills["held_out"].add([int(row["prompt_key"][:8], 16) % 5 == 0] * size)
    return size


def projected(
    features: npt.NDArray[Any], weights: npt.NDArray[Any], path: Path, rows: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[Any]:
    """Features [N, H] times weights [A, H], on disk and in the type of the weights, a slice in memory at a time.

    Args:
        rows: of the features, where not all in their order.
    """
    total = len(features) if rows is None else len(rows)
    out = Spill(path, weights.dtype)
    for start in range(0, total, SLICE):
        part = features[start : start + SLICE] if rows is None else features[rows[start : start + SLICE]]
        out.add(np.asarray(part, dtype=weights.dtype) @ weights.T)
    return out.done((len(weights),))
