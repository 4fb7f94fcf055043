"""Counts of the rows that went through the steps of `prepare`, made block by block and added up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from rayward.data.prepare.join import MARK
from rayward.data.prepare.numbers import Sketch, sketches_of


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of encoded rows, mergeable.

    Attributes:
        read: rows that the readers saw, counted where they were read.
        overlap: prompts that stand in both splits.
        num_merged: rows whose completions stand in another row's comparison.
        grouping: rows joined, groups, and rows left by reason (`data.group_pairs`).
        splits: rows by split; quarantined: rows by reason; sources: quarantined rows by source.
        damaged: messages about files that could not be read to the end.
        columns: rows by source and column that nothing reads (`leftover`).
        files: rows by file.
        numbers: by column, how the numbers of the used rows are distributed.
    """

    read: int
    overlap: int
    num_merged: int
    grouping: Counter[str]
    splits: Counter[str]
    quarantined: Counter[str]
    sources: Counter[str]
    damaged: tuple[str, ...]
    columns: Counter[str]
    files: Counter[str]
    numbers: dict[str, Sketch]

    @classmethod
    def of(cls, table: pa.Table) -> str:
        """Count a block; JSON for the way to the driver."""
        names = ("kind", "split", "reason", "source", "number", "detail", "file")
        read, overlap, merged, damaged = 0, 0, 0, []
        grouping, splits, quarantined, sources = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        columns, files = Counter[str](), Counter[str]()
        for text in table.column("leftover").drop_null().to_pylist():
            columns.update(json.loads(text))
        for kind, split, reason, source, number, detail, file in zip(*(table.column(name).to_pylist() for name in names), strict=True):
            if kind == "total":
                read += number
                files[file] += number
            elif kind == "overlap":
                overlap += number
            elif kind == MARK:
                grouping[detail] += number
            elif kind == "damaged":
                damaged.append(detail)
            elif kind == "merged":
                merged += 1
            elif split is not None:
                splits[split] += 1
            else:
                quarantined[reason] += 1
                sources[source] += 1
        numbers = {name: sketch.as_json() for name, sketch in sketches_of(table).items()}
        return json.dumps([read, overlap, merged, grouping, splits, quarantined, sources, columns, files, damaged, numbers])

    @classmethod
    def merged(cls, parts: Iterable[str]) -> Tally:
        """Sum of the blocks."""
        read, overlap, merged, damaged = 0, 0, 0, list[str]()
        counters = [Counter[str]() for _ in range(6)]
        numbers: dict[str, Sketch] = {}
        for part in parts:
            rows, shared, joined_rows, *counts, messages, sketches = json.loads(part)
            read, overlap, merged = read + rows, overlap + shared, merged + joined_rows
            damaged += messages
            for counter, count in zip(counters, counts, strict=True):
                counter.update(count)
            for name, value in sketches.items():
                sketch = Sketch.from_json(value)
                numbers[name] = numbers[name] + sketch if name in numbers else sketch
        grouping, splits, quarantined, sources, columns, files = counters
        told = tuple(sorted(set(damaged)))
        return cls(read, overlap, merged, grouping, splits, quarantined, sources, told, columns, files, numbers)
