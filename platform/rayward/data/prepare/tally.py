"""Counts of the rows that went through the steps of `prepare`, made block by block and added up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rayward.data.prepare.combine import MARK
from rayward.data.prepare.numbers import Sketch, sketches_of
from rayward.data.prepare.rows import BENCHMARK
from rayward.data.record import BadRow

SOURCES_KEPT = 1000
"""Sources that are counted one by one; of more, the largest are, and the others together."""
EXAMPLES = 5

Sources = dict[str, tuple[int, int, int]]
"""By source its rows in train, in validation and in quarantine."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of judged rows, mergeable.

    Attributes:
        read: rows that the readers saw, counted where they were read; without those of benchmarks.
        num_merged: rows whose completions stand in another row's comparison.
        near_duplicates: rows in use that differ from another one in case, spaces and punctuation only.
        grouping: rows joined, groups, and rows left by reason (`data.group_pairs`).
        splits: rows by split; quarantined: rows by reason.
        contaminated: rows by benchmark file.
        benchmark: usable rows of benchmarks by file; unread: the others by reason.
        sources: None where there are more than SOURCES_KEPT.
        damaged: messages about files that could not be read to the end.
        columns: rows by source and column that nothing reads (`leftover`); files: rows by file.
        near_examples: places of some near duplicates and of the rows that they are like.
        numbers: by column, how the numbers of the used rows are distributed.
    """

    read: int
    num_merged: int
    near_duplicates: int
    grouping: Counter[str]
    splits: Counter[str]
    quarantined: Counter[str]
    contaminated: Counter[str]
    benchmark: Counter[str]
    unread: Counter[str]
    columns: Counter[str]
    files: Counter[str]
    sources: Sources | None
    damaged: tuple[str, ...]
    near_examples: tuple[tuple[str, int, str], ...]
    numbers: dict[str, Sketch]

    @classmethod
    def of(cls, table: pa.Table, files: Sequence[str] | None = None) -> str:
        """Count a block; JSON for the way to the driver.

        Args:
            files: names, where the column `file` counts them.
        """
        names = ("kind", "role", "split", "reason", "number", "detail", "file", "beside")
        read, merged, near, damaged = 0, 0, 0, []
        grouping, splits, quarantined, contaminated, benchmark, unread, unused, of_file = (Counter[str]() for _ in range(8))
        examples: list[tuple[str, int, str]] = []
        for text in table.column("leftover").drop_null().to_pylist():
            unused.update(json.loads(text))
        columns = (table.column(name).to_pylist() for name in names)
        for kind, role, split, reason, number, detail, file, beside in zip(*columns, strict=True):
            if kind == "damaged":
                damaged.append(detail)
            elif kind == MARK:
                grouping[detail] += number
            elif kind == "total":
                read += number if role != BENCHMARK else 0
                of_file[_name(file, files)] += number
            elif role == BENCHMARK:
                (benchmark if reason is None else unread)[_name(file, files) if reason is None else reason] += 1
            elif kind == "merged":
                merged += 1
            elif split is not None:
                splits[split] += 1
                if beside is not None:
                    near += 1
                    examples.append((_name(file, files), number, beside))
            else:
                quarantined[reason] += 1
                if reason == BadRow.CONTAMINATED:
                    contaminated[beside.partition(" of ")[2]] += 1
        numbers = {name: sketch.as_json() for name, sketch in sketches_of(table).items()}
        sources = sources_of(table)
        kept = sources if len(sources) <= SOURCES_KEPT else None
        counts = [grouping, splits, quarantined, contaminated, benchmark, unread, unused, of_file]
        return json.dumps([read, merged, near, *counts, kept, damaged, sorted(examples)[:EXAMPLES], numbers])

    @classmethod
    def merged(cls, parts: Iterable[str]) -> Tally:
        """Sum of the blocks."""
        read, merged, near = 0, 0, 0
        counters = tuple(Counter[str]() for _ in range(8))
        sources: Sources | None = {}
        damaged: set[str] = set()
        examples: list[tuple[str, int, str]] = []
        numbers: dict[str, Sketch] = {}
        for part in parts:
            found = json.loads(part)
            read, merged, near = read + found[0], merged + found[1], near + found[2]
            for counter, count in zip(counters, found[3:11], strict=True):
                counter.update(count)
            sources = None if sources is None or found[11] is None else added(sources, found[11])
            sources = None if sources is None or len(sources) > SOURCES_KEPT else sources
            damaged |= set(found[12])
            examples = sorted([*examples, *(tuple(each) for each in found[13])])[:EXAMPLES]
            for name, value in found[14].items():
                sketch = Sketch.from_json(value)
                numbers[name] = numbers[name] + sketch if name in numbers else sketch
        grouping, splits, quarantined, contaminated, benchmark, unread, unused, of_file = counters
        return cls(
            read,
            merged,
            near,
            grouping,
            splits,
            quarantined,
            contaminated,
            benchmark,
            unread,
            unused,
            of_file,
            sources,
            tuple(sorted(damaged)),
            tuple(examples),
            numbers,
        )


def _name(file: str | int, files: Sequence[str] | None) -> str:
    return str(file) if files is None else files[int(file)]


def sources_of(table: pa.Table) -> Sources:
    """Rows by source."""
    names = ("kind", "role", "source", "split")
    counts: dict[str, list[int]] = {}
    for kind, role, source, split in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        if kind == "row" and role != BENCHMARK:
            counts.setdefault(source, [0, 0, 0])[2 if split is None else int(split == "validation")] += 1
    return {source: (train, validation, out) for source, (train, validation, out) in counts.items()}


def added(first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]]) -> Sources:
    """The sums of both."""
    total = {source: tuple(counts) for source, counts in first.items()}
    for source, counts in second.items():
        total[source] = tuple(a + b for a, b in zip(total.get(source, (0, 0, 0)), counts, strict=True))
    return total  # type: ignore[return-value]


def largest(parts: Iterable[tuple[Sources, int, Sequence[int]]]) -> Sources:
    """The largest sources, and the others as one.

    Args:
        parts: the largest of disjoint sets of sources; how many others there are, and their rows.
    """
    kept: Sources = {}
    rest, number = [0, 0, 0], 0
    for sources, others, counts in parts:
        kept |= sources
        number += others
        rest = [a + b for a, b in zip(rest, counts, strict=True)]
    kept, others, counts = cut(kept)
    number += others
    rest = [a + b for a, b in zip(rest, counts, strict=True)]
    return kept | ({f"{number:,} other sources": (rest[0], rest[1], rest[2])} if number else {})


def cut(sources: Sources) -> tuple[Sources, int, Sequence[int]]:
    """The largest sources, how many others there are, and their rows."""
    order = sorted(sources, key=lambda source: (-sum(sources[source]), source))
    others = [sources[source] for source in order[SOURCES_KEPT:]]
    rest = [sum(each) for each in zip((0, 0, 0), *others, strict=True)]
    return {source: sources[source] for source in order[:SOURCES_KEPT]}, len(others), rest
