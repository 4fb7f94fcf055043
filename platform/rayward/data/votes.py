"""Several judges of the same completions as one judgement: the majority's, or the shares of the votes. Pure.

Rows of equal content are votes, one each, whatever their weight; a row may also bring the counts of its own votes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from typing import Literal, TypeVar

from rayward.data.record import BadRow, Comparison, RowRejected, dense_ranks, dump_record, pairwise_in_order

VoteRule = Literal["majority", "soft"]
Value = TypeVar("Value")
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the votes say.

    Attributes:
        ranks: of each completion, lower is better, equal numbers tie.
        vote_shares: as in `Comparison`; None with rule `majority`, and where the ranks say all of it.
        votes: the votes in words, for messages.
    """

    ranks: tuple[float, ...]
    vote_shares: tuple[float, ...] | None
    votes: str


def judgement(counts: Sequence[float], rule: VoteRule, *, equal: float = 0.0) -> Judgement:
    """Of the votes that each completion got.

    Of two, `majority` is what most say; as many for one as for the other, or more for neither, is a tie. Of more, the one with more votes
    is better, and the share of a pair is that among the votes for its two (one half without any).

    Args:
        counts: votes of each completion; not necessarily whole numbers.
        equal: votes that found two completions equal.

    Raises:
        RowRejected: a count is negative or not finite, or nobody voted.
    """
    given = (*counts, equal)
    if any(not (math.isfinite(count) and count >= 0) for count in given):
        raise RowRejected(BadRow.BAD_RANKING, f"the votes are {_listed(given)}; the rule is finite numbers of 0 or more")
    if sum(given) == 0:
        raise RowRejected(BadRow.BAD_RANKING, "nobody voted: the counts of all completions are 0")
    if equal and len(counts) != 2:
        raise RowRejected(BadRow.BAD_RANKING, f"{equal:g} votes say equal of {len(counts)} completions; the rule is two")
    exact, half = [Fraction(count) for count in counts], Fraction(equal) / 2
    words = f"votes {_listed(counts, ' to ')}" + (f", {equal:g} for equal" if equal else "")
    shares = [_share(exact[i] + half, exact[j] + half) for i, j in combinations(range(len(exact)), 2)]
    order = [-count for count in exact]
    if len(counts) == 2 and rule == "majority" and equal > max(counts):
        order = [Fraction(0)] * 2
    return _judgement(order, shares, rule, words)


def merged(comparisons: Sequence[Comparison], rule: VoteRule, orders: Sequence[Sequence[int]] | None = None) -> tuple[int, Comparison, str]:
    """Rows that judge the same completions, as one: the index of the row that gives it its id, the whole, and the votes in words.

    Ranks: of two completions as in `judgement`; of more, by the mean of the shares of a completion's pairs. Ratings and labels of steps:
    the median (`majority`) or the mean (`soft`) of those that are known. Margin and strength: the mean of the rows that judge as the whole
    does; of a tie none, and 0. Weight: the mean of all. Id, source and critiques are those of one row that judges as the whole does. The
    result does not depend on the order of the rows.

    Args:
        orders: for each row the positions of its completions in an order that is the same for all rows; None: by their texts.

    Raises:
        RowRejected: two rows label other numbers of steps.
    """
    if orders is None:
        first = comparisons[0].completions
        orders = [[comparison.completions.index(text) for text in first] for comparison in comparisons]
    rows = [_reordered(comparison, order) for comparison, order in zip(comparisons, orders, strict=True)]
    ranked = [row for row in rows if row.ranks is not None]
    judged = _vote(ranked, rule) if ranked else None
    alike = [index for index, row in enumerate(rows) if judged is None or _agrees(row, judged)] or list(range(len(rows)))
    base = min(alike, key=lambda index: dump_record(comparisons[index]))
    middle = statistics.median if rule == "majority" else statistics.fmean
    whole = replace(
        rows[base],
        ranks=None if judged is None else judged.ranks,
        vote_shares=None if judged is None else judged.vote_shares,
        attributes=_combined([row.attributes for row in rows if row.attributes is not None], middle),
        step_labels=_combined([row.step_labels for row in rows if row.step_labels is not None], middle),
        weight=statistics.fmean(row.weight for row in rows),
    )
    if judged is not None:
        tied = len(set(judged.ranks)) == 1
        margins = [row.margin for index in alike if (row := rows[index]).margin is not None]
        strengths = [row.strength for index in alike if (row := rows[index]).strength is not None]
        any_strength = any(row.strength is not None for row in rows)
        whole = replace(
            whole,
            margin=None if tied else _mean(margins),
            strength=(0.0 if any_strength else None) if tied else _mean(strengths),
        )
    back = sorted(range(len(orders[base])), key=lambda place: orders[base][place])
    return base, _reordered(whole, back), f"{len(rows)} rows" if judged is None else judged.votes


def _vote(rows: Sequence[Comparison], rule: VoteRule) -> Judgement:
    num_completions = len(rows[0].completions)
    pairs = list(combinations(range(num_completions), 2))
    votes = [[_votes_of(row, i, j, place) for row in rows] for place, (i, j) in enumerate(pairs)]
    shares = [sum(of_pair, Fraction(0)) / len(rows) for of_pair in votes]
    if num_completions == 2:
        counts = [sum(vote > Fraction(1, 2) for vote in votes[0]), sum(vote < Fraction(1, 2) for vote in votes[0])]
        equal = len(rows) - sum(counts)
        majority = judgement(counts, "majority", equal=equal)
        if rule == "majority":
            return majority
        return _judgement([-shares[0], shares[0] - 1], shares, rule, majority.votes)
    points = [Fraction(0)] * num_completions
    for (i, j), share in zip(pairs, shares, strict=True):
        points[i] += share
        points[j] += 1 - share
    return _judgement([-value for value in points], shares, rule, f"{len(rows)} rankings")


def _votes_of(row: Comparison, i: int, j: int, place: int) -> Fraction:
    # For the first of the pair: 0, 1/2 or 1, or the share of the votes that the row itself counted.
    assert row.ranks is not None
    if row.vote_shares is not None:
        # 3 of 5 and 2 of 5 are even; as floats they are not.
        return Fraction(row.vote_shares[place]).limit_denominator(1_000_000)
    return Fraction((row.ranks[i] < row.ranks[j]) + (row.ranks[i] <= row.ranks[j]), 2)


def _judgement(order: Sequence[Fraction], shares: Sequence[Fraction], rule: VoteRule, votes: str) -> Judgement:
    levels = {value: float(level) for level, value in enumerate(sorted(set(order)))}
    ranks = tuple(levels[value] for value in order)
    said = [Fraction((ranks[i] < ranks[j]) + (ranks[i] <= ranks[j]), 2) for i, j in combinations(range(len(ranks)), 2)]
    informative = rule == "soft" and list(shares) != said
    return Judgement(ranks, tuple(float(share) for share in shares) if informative else None, votes)


def _agrees(row: Comparison, judged: Judgement) -> bool:
    return row.ranks is not None and dense_ranks(row.ranks) == [int(rank) for rank in judged.ranks]


def _share(first: Fraction, second: Fraction) -> Fraction:
    return first / (first + second) if first + second else Fraction(1, 2)


def _reordered(comparison: Comparison, order: Sequence[int]) -> Comparison:
    # Place k holds what stood at order[k].
    def put(values: tuple[Value, ...] | None) -> tuple[Value, ...] | None:
        return None if values is None else tuple(values[index] for index in order)

    shares = comparison.vote_shares
    return replace(
        comparison,
        completions=tuple(comparison.completions[index] for index in order),
        ranks=put(comparison.ranks),
        attributes=put(comparison.attributes),
        step_labels=put(comparison.step_labels),
        critiques=put(comparison.critiques),
        vote_shares=None if shares is None else tuple(pairwise_in_order(shares, order)),
    )


def _combined(tables: Sequence[Table], middle: Callable[[Sequence[float]], float]) -> Table | None:
    if not tables:
        return None
    if len({tuple(len(row) for row in table) for table in tables}) > 1:
        raise RowRejected(BadRow.BAD_STEPS, "rows that judge the same completions label other numbers of steps")
    return tuple(tuple(_middle(values, middle) for values in zip(*rows, strict=True)) for rows in zip(*tables, strict=True))


def _middle(values: Sequence[float], middle: Callable[[Sequence[float]], float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return middle(known) if known else math.nan


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _listed(counts: Sequence[float], between: str = ", ") -> str:
    return between.join(f"{count:g}" for count in counts)
