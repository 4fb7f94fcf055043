"""Source files: split them into parts that tasks read, sample them, read them row by row.

Numbers of rows are 1-based: the line of a JSON-lines file, the element of a JSON list, the row of a Parquet or Arrow file, the record
behind the header of a CSV file. Blank lines are not rows. No Ray here: `prepare` runs `read_unit` inside its tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from rayward.data.sources import columnar
from rayward.data.sources.delimited import csv_rows
from rayward.data.sources.find import READ_ERRORS, SourceFile
from rayward.data.sources.kinds import Compression
from rayward.data.sources.lines import count_lines, is_list, json_rows
from rayward.data.sources.rows import RawRow
from rayward.data.sources.streams import damaged

UNIT_BYTES = 64 * 1024 * 1024
BATCH_ROWS = columnar.BATCH_ROWS
SAMPLE_ROWS = 100
SAMPLE_SCAN = 2000
EXPANSION: Mapping[Compression | None, int] = {None: 1, "gzip": 4, "lz4": 3, "zstd": 4, "bz2": 5, "xz": 5}
"""Bytes of text in a byte of a compressed file, roughly."""


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """The part of a file that one task reads: a whole file, some row groups or record batches, or the lines that begin in a range of bytes.

    Attributes:
        row_groups: of a Parquet file, or record batches of an Arrow file; none: all.
        first_number: number of the first row; None: not counted yet, see `numbered` (`read_unit` counts for itself).
        start, end: the range of bytes; without an end, to the last line.
        size: bytes of its rows as text, roughly.
        last_number: no row after it is of use.
    """

    file: SourceFile
    row_groups: tuple[int, ...] = ()
    first_number: int | None = 1
    start: int = 0
    end: int | None = None
    size: int = 0
    last_number: int | None = None


def plan_units(file: SourceFile) -> list[ReadUnit]:
    """Split a file into parts that tasks read in parallel: Parquet, local Arrow files and uncompressed JSON lines; all else is one part.

    Raises:
        DataError: a Parquet or Arrow file is damaged.
    """
    whole = ReadUnit(file, size=file.size * EXPANSION[file.compression])
    try:
        if file.kind == "parquet":
            return _grouped(file, columnar.parquet_groups(file))
        if file.kind == "arrow":
            batches = columnar.arrow_batches(file)
            return [whole] if batches is None else _grouped(file, batches)
        if file.kind == "csv" or file.compression or file.size <= UNIT_BYTES or is_list(file):
            return [whole]
    except READ_ERRORS as exc:
        raise damaged(file, exc) from exc
    edges = [*range(0, file.size, UNIT_BYTES), file.size]
    return [ReadUnit(file, first_number=None if start else 1, start=start, end=end, size=end - start) for start, end in pairwise(edges)]


def _grouped(file: SourceFile, groups: Sequence[tuple[int, int]]) -> list[ReadUnit]:
    units: list[ReadUnit] = []
    taken: list[int] = []
    number, size, first = 1, 0, 1
    for index, (rows, num_bytes) in enumerate(groups):
        taken.append(index)
        number, size = number + rows, size + num_bytes
        if size >= UNIT_BYTES or index == len(groups) - 1:
            units.append(ReadUnit(file, tuple(taken), first, size=size))
            taken, size, first = [], 0, number
    return units


def line_counts_needed(units: Sequence[ReadUnit]) -> list[ReadUnit]:
    """The units whose lines must be counted (`lines_in`) before all can be numbered."""
    needed = []
    for unit, following in pairwise(units):
        if following.first_number is None and following.file == unit.file:
            needed.append(unit)
    return needed


def lines_in(unit: ReadUnit) -> int:
    """Lines that begin in the unit's range of bytes: a look for line ends, much faster than reading.

    Raises:
        DataError: the file cannot be read.
    """
    return count_lines(unit.file, unit.start, unit.file.size if unit.end is None else unit.end)


def numbered(units: Sequence[ReadUnit], counts: Mapping[ReadUnit, int]) -> list[ReadUnit]:
    """The units with the number of their first row, from the lines of those in `line_counts_needed`."""
    result: list[ReadUnit] = []
    for _, parts in groupby(units, key=lambda unit: unit.file):
        number = 1
        for unit in parts:
            result.append(unit if unit.first_number is not None else replace(unit, first_number=number))
            number += counts.get(unit, 0)
    return result


def read_unit(unit: ReadUnit) -> Iterator[RawRow]:
    """The rows of one unit, in order; of Parquet a row group is held, of Arrow a record batch, of all else a row.

    Raises:
        DataError: the file is truncated or damaged; the rows before the damage may have been yielded.
    """
    file = unit.file
    try:
        number = unit.first_number
        if number is None:
            number = 1 + count_lines(file, 0, unit.start)
        if file.kind == "parquet":
            yield from columnar.parquet_rows(file, unit.row_groups, number)
        elif file.kind == "arrow":
            yield from columnar.arrow_rows(file, unit.row_groups, number)
        elif file.kind == "csv":
            yield from csv_rows(file)
        else:
            yield from json_rows(file, unit.start, unit.end, number)
    except READ_ERRORS as exc:
        raise damaged(file, exc) from exc


def read_file(file: SourceFile) -> Iterator[RawRow]:
    """All rows of a file, one after the other.

    Raises:
        DataError: the file is truncated or damaged; the rows before the damage may have been yielded.
    """
    if file.kind in ("json", "csv"):
        yield from read_unit(ReadUnit(file))
        return
    for unit in plan_units(file):
        yield from read_unit(unit)


def sample_rows(file: SourceFile) -> tuple[list[dict[str, Any]], int]:
    """The first rows that are JSON objects, for format detection, and how many rows were looked at; no more is read than these.

    Raises:
        DataError: the file is truncated or damaged.
    """
    rows: list[dict[str, Any]] = []
    seen = 0
    for raw in read_file(file):
        seen += 1
        try:
            value = json.loads(raw.raw) if raw.reason is None else None
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append(value)
        if len(rows) >= SAMPLE_ROWS or seen >= SAMPLE_SCAN:
            break
    return rows, seen
