"""Ranked rows of one prompt as one comparison, where their judgements together determine exactly one order. Pure.

The same text is the same completion. Judgements that share a completion, over however many steps, belong together. They join when every
two of their completions are ordered, directly or by transitivity, and none is better than itself.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import groupby, pairwise
from typing import Any

import pyarrow as pa

from rayward.data.record import Comparison, completion_key, dump_record, load_record


class Left(StrEnum):
    """Why a row that shares a completion with another one did not join it.

    INCOMPLETE: the order of two completions is not determined. CONTRADICTORY: a completion is better than itself. APART: the row carries
    what a joined comparison cannot hold (margin, strength, ratings), or differs from the others in source or weight. UNFIT: the whole takes
    more tokens than a group may, or one of its completions is quarantined.
    """

    INCOMPLETE = "incomplete"
    CONTRADICTORY = "contradictory"
    APART = "apart"
    UNFIT = "unfit"


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that join.

    Attributes:
        members: their positions; the first one gives the group its id.
        comparison: the whole, the best completion first.
    """

    members: tuple[int, ...]
    comparison: Comparison


# Whatever else a comparison holds belongs to its own completions or to its one pair, also what is added to it later.
_CARRIED = [f.name for f in fields(Comparison) if f.name not in ("id", "source", "prompt", "completions", "ranks", "weight")]


def join(comparisons: Sequence[Comparison]) -> tuple[list[Group], Counter[Left]]:
    """The groups among the comparisons of one prompt, and how many rows did not join for which reason.

    Neither depends on the order of the comparisons. Rows that share no completion with another row are in neither.
    """
    groups: list[Group] = []
    left: Counter[Left] = Counter()
    ranked = [index for index, comparison in enumerate(comparisons) if comparison.ranks is not None]
    for connected in _connected(ranked, comparisons):
        if len(connected) == 1:
            continue
        alike: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
        for index in connected:
            comparison = comparisons[index]
            if any(getattr(comparison, name) is not None for name in _CARRIED):
                left[Left.APART] += 1
            else:
                alike[comparison.source, comparison.weight].append(index)
        for members in (part for indices in alike.values() for part in _connected(indices, comparisons)):
            order = Left.APART if len(members) == 1 else weak_order([comparisons[index] for index in members])
            if isinstance(order, Left):
                left[order] += len(members)
            else:
                groups.append(_group(members, comparisons, order))
    return groups, left


def weak_order(judgements: Iterable[Comparison]) -> list[list[str]] | Left:
    """The completions in levels, best first, or why the judgements do not determine them."""
    rows = [_levels(judgement) for judgement in judgements]
    tied = _Sets()
    for level in (level for row in rows for level in row):
        for text in level:
            tied.unite(level[0], text)
    worse: dict[str, set[str]] = {tied.find(text): set() for row in rows for level in row for text in level}
    for row in rows:
        for upper, lower in pairwise(tied.find(level[0]) for level in row):
            worse[upper].add(lower)
    num_better = Counter(lower for lowers in worse.values() for lower in lowers)
    ready = [text for text in worse if not num_better[text]]
    order: list[str] = []
    unique = True
    while ready:
        # Two at once: nothing orders them.
        unique = unique and len(ready) == 1
        order.append(ready.pop())
        for text in worse[order[-1]]:
            num_better[text] -= 1
            if not num_better[text]:
                ready.append(text)
    if len(order) < len(worse):
        return Left.CONTRADICTORY
    return [sorted(tied.members(text)) for text in order] if unique else Left.INCOMPLETE


def _levels(comparison: Comparison) -> list[list[str]]:
    # Completions of equal rank together, the lowest rank first.
    ranked = sorted(zip(comparison.ranks or (), map(completion_key, comparison.completions), strict=True))
    return [[text for _, text in level] for _, level in groupby(ranked, key=lambda item: item[0])]


def _group(members: Sequence[int], comparisons: Sequence[Comparison], order: Sequence[Sequence[str]]) -> Group:
    first, *others = sorted(members, key=lambda index: dump_record(comparisons[index]))
    ranked = [(float(rank), text) for rank, level in enumerate(order) for text in level]
    given = {completion_key(text): text for index in members for text in comparisons[index].completions}
    ranks, completions = zip(*((rank, given[text]) for rank, text in ranked), strict=True)
    return Group((first, *others), replace(comparisons[first], completions=completions, ranks=ranks))


def _connected(indices: Iterable[int], comparisons: Sequence[Comparison]) -> list[list[int]]:
    indices = list(indices)
    sets = _Sets()
    for index in indices:
        first, *others = map(completion_key, comparisons[index].completions)
        for text in (first, *others):
            sets.unite(first, text)
    parts: defaultdict[str, list[int]] = defaultdict(list)
    for index in indices:
        parts[sets.find(completion_key(comparisons[index].completions[0]))].append(index)
    return list(parts.values())


class _Sets:
    # Disjoint sets of texts.
    def __init__(self) -> None:
        self._members: dict[str, list[str]] = {}
        self._name: dict[str, str] = {}

    def find(self, text: str) -> str:
        return self._name[text]

    def members(self, text: str) -> list[str]:
        return self._members[self._name[text]]

    def unite(self, first: str, second: str) -> None:
        for text in (first, second):
            if text not in self._name:
                self._name[text], self._members[text] = text, [text]
        large, small = sorted((self._name[first], self._name[second]), key=lambda name: -len(self._members[name]))
        if large != small:
            # The smaller set is renamed: n log n in all.
            for text in self._members[small]:
                self._name[text] = large
            self._members[large] += self._members.pop(small)


Row = dict[str, Any]
MARK = "grouping"
"""Kind of a line that counts: `number` rows (or groups) of what `detail` says."""


def fold(table: pa.Table) -> pa.Table:
    """Put the rows of each group into one row, in its column `members`. `table` holds whole prompts, after the split."""
    by_prompt: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, (split, prompt) in enumerate(zip(table.column("split").to_pylist(), table.column("prompt_key").to_pylist(), strict=True)):
        if split is not None:
            by_prompt[split, prompt].append(index)
    records = table.column("record")
    groups: list[tuple[list[int], Group]] = []
    left: Counter[Left] = Counter()
    for rows in by_prompt.values():
        if len(rows) > 1:
            found, others = join([load_record(records[index].as_py()) for index in rows])
            groups += [([rows[member] for member in group.members], group) for group in found]
            left += others
    taken = [index for indices, _ in groups for index in indices]
    members = iter(table.take(pa.array(taken, pa.int64())).to_pylist())
    folded: list[Row] = []
    for indices, group in groups:
        rows_of_group = [next(members) for _ in indices]
        folded.append(rows_of_group[0] | {"record": dump_record(group.comparison), "members": json.dumps(rows_of_group)})
    gone = set(taken)
    rest = table.take(pa.array([index for index in range(table.num_rows) if index not in gone], pa.int64()))
    marks = [_mark(reason, number) for reason, number in left.items()]
    return pa.concat_tables([rest, pa.Table.from_pylist([*folded, *marks], schema=table.schema)])


def unfold(row: Row, encode: Callable[[Row], Row], max_group_tokens: int) -> list[Row]:
    """The encoded row; of a folded one, the whole beside its merged rows, or else its rows one by one."""
    if row["members"] is None:
        return [encode(row)]
    members: list[Row] = json.loads(row["members"])
    whole = encode(row)
    if whole["split"] is not None and _num_tokens(whole) <= max_group_tokens:
        merged = [member | {"kind": "merged", "split": None} for member in members[1:]]
        return [whole, *merged, _mark("groups", 1), _mark("joined", len(members))]
    return [*(encode(member) for member in members), _mark(Left.UNFIT, len(members))]


def _num_tokens(row: Row) -> int:
    return len(row["prefix_ids"]) + sum(len(ids) for ids in row["branch_ids"])


def _mark(what: str, number: int) -> Row:
    return {"kind": MARK, "detail": str(what), "number": number, "raw": ""}
