"""How the numbers that rows bring are distributed, and which of them lie far from all others. Whole tables of encoded rows; no Ray.

A sketch counts magnitudes in bins of a fixed relative width, so that the sum of the blocks' sketches is the sketch of the whole, in
whatever order: the bound is a function of the rows alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayward.data.prepared import LABELS
from rayward.data.record import LARGEST_NUMBER, BadRow

BINS_PER_OCTAVE = 16
"""A bin is 4.4 % wide; a percentile is the smaller end of its bin."""
FEW = 0.1
RATING = "rating "
_OFFSET = 200 * BINS_PER_OCTAVE  # float32 goes down to 2^-149


@dataclass(frozen=True, slots=True)
class Sketch:
    """The numbers of one column.

    Attributes:
        bins: how many values lie in each bin.
        smallest, largest: exactly.
    """

    bins: Counter[int]
    smallest: float
    largest: float

    def __add__(self, other: Sketch) -> Sketch:
        return Sketch(self.bins + other.bins, min(self.smallest, other.smallest), max(self.largest, other.largest))

    def as_json(self) -> list[Any]:
        return [self.bins, self.smallest, self.largest]

    @classmethod
    def from_json(cls, value: list[Any]) -> Sketch:
        bins, smallest, largest = value
        return cls(Counter({int(key): count for key, count in bins.items()}), smallest, largest)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number of a column may be: its largest magnitude, and where that comes from, in words."""

    largest: float
    rule: str


def sketches_of(table: pa.Table) -> dict[str, Sketch]:
    """By column, of the rows with a place in a split."""
    used = table.filter(pc.is_valid(table.column("split")))
    return {name: Sketch(_bins(values), float(values.min()), float(values.max())) for name, values, _ in _columns(used) if len(values)}


def bounds_of(sketches: Mapping[str, Sketch], factor: float | None, *, rated: bool = True) -> dict[str, Bound]:
    """The bound of each column.

    Args:
        rated: whether ratings are bounded by each other; not so where `data.attribute_range` bounds them.
    """
    return {name: bound_of(sketch, factor if rated or not name.startswith(RATING) else None) for name, sketch in sketches.items()}


def bound_of(sketch: Sketch, factor: float | None) -> Bound:
    """Beyond `factor` times the median magnitude of the values that are not 0, a number is an outlier.

    With too few of these to say what is typical (under 3, or a tenth of all), 1 is; of less than 3 values none is far from the others.
    """
    sizes = Counter[int]()
    for key, count in sketch.bins.items():
        sizes[abs(key)] += count
    total, others = sizes.total(), sizes.total() - sizes[0]
    del sizes[0]
    if factor is None or total < 3:
        return Bound(LARGEST_NUMBER, "that of any number")
    typical = 1.0 if others < max(3, FEW * total) else value_of(_quantile(sizes, 0.5))
    return Bound(
        min(typical * factor, LARGEST_NUMBER), f"{factor:g} times (data.outlier_factor) {typical:.4g}, which is typical of the column"
    )


def has_outliers(sketches: Mapping[str, Sketch], bounds: Mapping[str, Bound]) -> bool:
    """Whether a value lies beyond the bound of its column."""
    return any(max(sketch.largest, -sketch.smallest) > bounds[name].largest for name, sketch in sketches.items())


def quarantine_outliers(table: pa.Table, bounds: Mapping[str, Bound]) -> pa.Table:
    """Encoded rows, those with an outlier without a place in a split; ENCODED_SCHEMA -> ENCODED_SCHEMA."""
    placed = np.flatnonzero(pc.is_valid(table.column("split")).to_numpy())
    details: dict[int, str] = {}
    for name, values, rows in _columns(table.take(pa.array(placed))):
        bound = bounds.get(name, Bound(math.inf, ""))
        for index in np.flatnonzero(np.abs(values) > bound.largest):
            details.setdefault(
                int(placed[rows[index]]),
                f"{name} {values[index]:g} is far from all others: the largest allowed is {bound.largest:g}, {bound.rule}",
            )
    if not details:
        return table
    out = pa.array([index in details for index in range(table.num_rows)])
    changes = {
        "split": pa.nulls(table.num_rows, pa.string()),
        "reason": pa.array([BadRow.OUTLIER.value] * table.num_rows, pa.string()),
        "detail": pa.array([details.get(index) for index in range(table.num_rows)], pa.string()),
    }
    for name, values in changes.items():
        table = table.set_column(table.schema.get_field_index(name), name, pc.if_else(out, values, table.column(name)))
    return table


def described(sketches: Mapping[str, Sketch], bounds: Mapping[str, Bound], attributes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The distribution of each column for the report, its percentiles to the width of a bin."""
    return {
        f"{RATING}{attributes[int(name.removeprefix(RATING))]}" if name.startswith(RATING) else name: {
            "values": sum(sketch.bins.values()),
            "smallest": sketch.smallest,
            **{f"p{share * 100:g}": value_of(_quantile(sketch.bins, share)) for share in (0.01, 0.5, 0.99)},
            "largest": sketch.largest,
            "largest_allowed": bounds[name].largest,
        }
        for name, sketch in sorted(sketches.items())
    }


def value_of(key: int) -> float:
    """The end of a bin that is nearer to 0."""
    return 0.0 if key == 0 else math.copysign(2.0 ** ((abs(key) - _OFFSET) / BINS_PER_OCTAVE), key)


def _quantile(sketch: Mapping[int, int], share: float) -> int:
    # The bins are in the order of the values.
    before, rank = 0, share * (sum(sketch.values()) - 1)
    for key in sorted(sketch):
        before += sketch[key]
        if rank < before:
            return key
    return max(sketch)


def _bins(values: npt.NDArray[np.float64]) -> Counter[int]:
    keys = np.zeros(len(values), np.int64)
    known = values != 0
    steps = np.floor(np.log2(np.abs(values[known])) * BINS_PER_OCTAVE + 1e-9).astype(np.int64) + _OFFSET
    keys[known] = np.copysign(steps, values[known]).astype(np.int64)
    found, counts = np.unique(keys, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _columns(table: pa.Table) -> Iterator[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Name, known values, and the row of each."""
    for label in LABELS:
        name, kind = label.column.name, label.column.type
        if pa.types.is_float32(kind) and name in table.column_names:
            values = table.column(name).to_numpy().astype(np.float64)
            rows = np.flatnonzero(~np.isnan(values))
            yield name, values[rows], rows
    if "attributes" not in table.column_names:
        return
    rated = np.flatnonzero(pc.is_valid(table.column("attributes")).to_numpy())
    if len(rated) == 0:
        return
    ratings = table.column("attributes").take(pa.array(rated))
    sizes = pc.list_value_length(ratings).to_numpy()
    flat = pc.list_flatten(ratings)
    width = int(pc.list_value_length(flat)[0].as_py())
    matrix = pc.list_flatten(flat).to_numpy().astype(np.float64).reshape(-1, width)
    of_row = np.repeat(rated, sizes)
    for column in range(width):
        known = ~np.isnan(matrix[:, column])
        yield f"{RATING}{column}", matrix[known, column], of_row[known]
