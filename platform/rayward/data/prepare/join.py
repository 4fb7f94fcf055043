"""Ranked rows of one prompt as one comparison, where their judgements together determine exactly one order. Pure.

The same text is the same completion. Judgements that share a completion, over however many steps, belong together. They join when every
two of their completions are ordered, directly or by transitivity, and none is better than itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import groupby, pairwise

from rayward.data.record import Comparison, completion_key, dump_record


class Left(StrEnum):
    """Why a row that shares a completion with another one did not join it.

    INCOMPLETE: the order of two completions is not determined. CONTRADICTORY: a completion is better than itself. APART: the row carries
    what a joined comparison cannot hold (margin, strength, ratings), or differs from the others in source or weight. UNFIT: the whole takes
    more tokens than a group may.
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
