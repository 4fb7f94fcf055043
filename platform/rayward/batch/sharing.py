"""Comparisons of different items that begin alike as one, so that what they begin with is computed once. Numpy only.

Comparisons are put in order by their token ids, so that those with the longest common beginning are neighbours; neighbours are merged, the
longest common beginning first, as long as that saves tokens and stays within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rayward.batch.comparison import EncodedComparison, Int32, Labels

LEAST_SAVED = 32
"""Tokens that a merge must save."""
MOVED_PER_SAVED = 8
"""Tokens that may go from the prefix of a comparison to its branches for each token that is saved: attention of a branch costs more
(29M parameters on a CPU core: a header of 32 to 64 tokens before texts of 700, computed once, made the forward 1 to 11 % slower)."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One comparison made of several.

    Attributes:
        comparison: without labels, unless it is a comparison as it was given.
        sources: for each of its branches, the comparison that it comes from and its place there.
    """

    comparison: EncodedComparison
    sources: tuple[tuple[int, int], ...]

    def charges(self) -> dict[int, int]:
        """By comparison that it was made of, its part of the tokens that are computed: its own branches, and of the prefix as much as the
        share of its branches. The parts add up to all tokens."""
        prefix, total = len(self.comparison.prefix_ids), len(self.sources)
        parts: dict[int, int] = {}
        for number, ((index, _), branch) in enumerate(zip(self.sources, self.comparison.branch_ids, strict=True)):
            share = prefix * (number + 1) // total - prefix * number // total
            parts[index] = parts.get(index, 0) + len(branch) + share
        return parts


@dataclass(slots=True)
class _Run:
    # Neighbours in the order of their ids that are computed as one.
    first: int
    last: int
    prefix: int
    rest: int
    num_branches: int

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.rest


def merge(comparisons: Sequence[EncodedComparison], *, tokens_per_microbatch: int) -> list[Merged]:
    """Merge what begins alike.

    Args:
        comparisons: all with the same kinds of positions (gates, text starts, ends of steps), or without.
        tokens_per_microbatch: no merged comparison is larger.

    Returns:
        Every branch of every comparison, once.
    """
    keys = [_key(comparison) for comparison in comparisons]
    order = sorted(range(len(comparisons)), key=lambda index: (keys[index], index))
    common = [_common(keys[a], keys[b]) for a, b in pairwise(order)]
    # At its first and its last place, the run that a place belongs to.
    owner = [_of_one(place, comparisons[index]) for place, index in enumerate(order)]
    for place in sorted(range(len(common)), key=lambda place: (-common[place], place)):
        if common[place] < LEAST_SAVED:
            break
        left, right = owner[place], owner[place + 1]
        both = _merged(left, right, min(left.prefix, right.prefix, common[place]))
        saved = left.num_tokens + right.num_tokens - both.num_tokens
        moved = max((run.prefix - both.prefix) * run.num_branches for run in (left, right))
        worth = saved >= LEAST_SAVED and saved * MOVED_PER_SAVED >= moved
        if worth and both.num_tokens <= tokens_per_microbatch:
            owner[left.first] = owner[right.last] = both
    found, place = [], 0
    while place < len(order):
        run = owner[place]
        found.append(_built([comparisons[index] for index in order[place : run.last + 1]], order[place : run.last + 1], run.prefix))
        place = run.last + 1
    return found


def _key(comparison: EncodedComparison) -> bytes:
    # What all its conversations begin with; a comparison of one can end its prefix anywhere before the last token.
    # Big-endian bytes of numbers that are not negative have the order of the numbers.
    return comparison.prefix_ids.astype(">i4").tobytes()


def _common(first: bytes, second: bytes) -> int:
    size = min(len(first), len(second)) // 4
    a, b = np.frombuffer(first, np.int32, size), np.frombuffer(second, np.int32, size)
    differ = a != b
    return int(differ.argmax()) if differ.any() else size


def _of_one(place: int, comparison: EncodedComparison) -> _Run:
    rest = comparison.num_tokens - len(comparison.prefix_ids)
    return _Run(place, place, len(comparison.prefix_ids), rest, comparison.num_completions)


def _merged(left: _Run, right: _Run, prefix: int) -> _Run:
    rest = sum(run.rest + (run.prefix - prefix) * run.num_branches for run in (left, right))
    return _Run(left.first, right.last, prefix, rest, left.num_branches + right.num_branches)


def _built(members: Sequence[EncodedComparison], indices: Sequence[int], prefix: int) -> Merged:
    sources = tuple((index, branch) for index, member in zip(indices, members, strict=True) for branch in range(member.num_completions))
    if len(members) == 1:
        return Merged(members[0], sources)

    def joined(name: str) -> tuple[object, ...] | None:
        parts = [getattr(member, name) for member in members]
        return None if any(part is None for part in parts) else tuple(value for part in parts for value in part)

    comparison = EncodedComparison(
        id="merged",
        prefix_ids=members[0].prefix_ids[:prefix],
        branch_ids=tuple(_branch(member, branch, prefix) for member in members for branch in member.branch_ids),
        labels=Labels(),
        gate_positions=joined("gate_positions"),  # type: ignore[arg-type]
        text_starts=joined("text_starts"),  # type: ignore[arg-type]
        step_ends=joined("step_ends"),  # type: ignore[arg-type]
    )
    return Merged(comparison, sources)


def _branch(member: EncodedComparison, branch: Int32, prefix: int) -> Int32:
    return np.concatenate([member.prefix_ids[prefix:], branch])
