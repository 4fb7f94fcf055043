"""Pairs to groups: the one order that judgements determine, by hand, and that it is theirs."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest

from rayward.contract.conversation import Message
from rayward.data.prepare.join import Left, join, weak_order
from rayward.data.record import Comparison, completion_key, dump_record

PROMPT = (Message(role="user", content="p"),)


def ranking(text: str, **others: Any) -> Comparison:
    """`A>B=C` as a comparison."""
    levels = [level.split("=") for level in text.split(">")]
    completions = tuple(name for level in levels for name in level)
    ranks = tuple(float(rank) for rank, level in enumerate(levels) for _ in level)
    return replace(Comparison(id=text, source="s", prompt=PROMPT, completions=completions, ranks=ranks), **others)


def rankings(text: str) -> list[Comparison]:
    return [ranking(part) for part in text.split()]


def written(comparison: Comparison) -> str:
    """The inverse of `ranking`; completions of equal rank must stand together."""
    assert comparison.ranks is not None
    text = completion_key(comparison.completions[0])
    for (before, rank), name in zip(pairwise(comparison.ranks), comparison.completions[1:], strict=True):
        text += ("=" if before == rank else ">") + completion_key(name)
    return text


def pairs(comparison: Comparison) -> set[tuple[str, str, float]]:
    """All pairs with the sign of their order."""
    assert comparison.ranks is not None
    named = sorted(zip(map(completion_key, comparison.completions), comparison.ranks, strict=True))
    return {(a, b, float((i > j) - (i < j))) for (a, i), (b, j) in combinations(named, 2)}


BY_HAND = [
    ("A>B B>C A>C", ["A>B>C"], {}),
    ("A>B B>C", ["A>B>C"], {}),
    ("C>D A>B B>C", ["A>B>C>D"], {}),
    ("A>B C>D", [], {}),  # nothing in common
    ("A>B B>C C>D X>Y Z>X", ["A>B>C>D", "Z>X>Y"], {}),
    ("A>B A>C", [], {Left.INCOMPLETE: 2}),
    ("A>C B>C", [], {Left.INCOMPLETE: 2}),
    ("A>B B>C A>D", [], {Left.INCOMPLETE: 3}),
    ("A>B A>C B>D C>D", [], {Left.INCOMPLETE: 4}),
    ("A>B B>C C>A", [], {Left.CONTRADICTORY: 3}),
    ("A>B B>C C>A D>C", [], {Left.CONTRADICTORY: 4}),  # a circle is no lack
    ("A>B B>C C>A X>Y Y>Z", ["X>Y>Z"], {Left.CONTRADICTORY: 3}),
    ("A=B B>C", ["A=B>C"], {}),
    ("A=B C>A C>B", ["C>A=B"], {}),
    ("A=B B=C", ["A=B=C"], {}),
    ("A=B B=C A>C", [], {Left.CONTRADICTORY: 3}),
    ("A=B A>C C>B", [], {Left.CONTRADICTORY: 3}),
    ("A=B A>C B>D", [], {Left.INCOMPLETE: 3}),
    ("A>B>C C>D", ["A>B>C>D"], {}),
    ("A>B=C C>D", ["A>B=C>D"], {}),
    ("A>B>C A>C", ["A>B>C"], {}),
    ("A>C B>A>C", ["B>A>C"], {}),
    ("A>B>C C>A", [], {Left.CONTRADICTORY: 2}),
    ("A>B", [], {}),
]


@pytest.mark.parametrize(("given", "groups", "left"), BY_HAND)
def test_by_hand(given: str, groups: list[str], left: dict[Left, int]) -> None:
    found, others = join(rankings(given))
    assert sorted(written(group.comparison) for group in found) == groups
    assert others == left


def test_a_group_names_its_rows_and_keeps_what_they_share() -> None:
    rows = [ranking("B>C", id="2", source="t", weight=0.5), ranking("X>Y", id="1"), ranking("A>B", id="3", source="t", weight=0.5)]
    (group,), left = join(rows)
    assert (group.members, left) == ((0, 2), {})
    assert group.comparison == Comparison("2", "t", PROMPT, ("A", "B", "C"), (0.0, 1.0, 2.0), weight=0.5)


@pytest.mark.parametrize(
    "carried",
    [{"margin": 1.0}, {"strength": 2.0}, {"attributes": ((1.0,), (0.0,))}, {"source": "t"}, {"weight": 2.0}],
    ids=lambda carried: next(iter(carried)),
)
def test_a_row_that_carries_more_than_an_order_stays_apart(carried: dict[str, object]) -> None:
    odd = ranking("C>D", **carried)
    found, left = join([*rankings("A>B B>C"), odd])
    assert [written(group.comparison) for group in found] == ["A>B>C"]
    assert left == {Left.APART: 1}
    # What it says does not fill a gap of the others.
    found, left = join([*rankings("A>B D>E"), ranking("B>C", **carried), odd, ranking("A>E")])
    assert left.total() + sum(len(group.members) for group in found) == 5
    assert all(group.comparison.completions != ("A", "B", "C", "D", "E") for group in found)


def test_rows_of_each_source_join_among_themselves() -> None:
    found, left = join([*rankings("A>B B>C"), *(replace(row, source="t") for row in rankings("C>B B>D"))])
    assert {(group.comparison.source, written(group.comparison)) for group in found} == {("s", "A>B>C"), ("t", "C>B>D")}
    assert left == {}


def test_unranked_rows_take_no_part() -> None:
    unranked = Comparison("u", "s", PROMPT, ("A", "B"), attributes=((1.0,), (2.0,)))
    assert join([unranked, *rankings("A>B")]) == ([], {})


@pytest.mark.parametrize("seed", range(60))
def test_all_pairs_of_a_ranking_join_to_that_ranking_and_its_pairs_are_theirs(seed: int) -> None:
    generator = random.Random(seed)
    names = [f"answer {i}" for i in range(generator.randint(3, 9))]
    ranks = {name: float(generator.randint(0, 5)) for name in names}
    rows = []
    for a, b in combinations(names, 2):
        first, second = generator.sample((a, b), 2)
        rows.append(Comparison(f"{a} {b}", "s", PROMPT, (first, second), (ranks[first], ranks[second])))
    generator.shuffle(rows)
    (group,), left = join(rows)
    assert not left
    assert sorted(group.members) == list(range(len(rows)))
    assert pairs(group.comparison) == set().union(*(pairs(row) for row in rows))
    assert list(group.comparison.ranks or ()) == sorted(group.comparison.ranks or ())


@pytest.mark.parametrize("seed", range(60))
def test_neither_order_nor_direction_of_rows_matters_and_every_row_is_accounted_for(seed: int) -> None:
    generator = random.Random(1000 + seed)
    names = "ABCDEFGH"
    rows = {}
    for number in range(generator.randint(2, 8)):
        chosen = generator.sample(names, generator.choice((2, 2, 2, 3)))
        ranks = tuple(float(generator.randint(0, 2)) for _ in chosen)
        row = Comparison(f"row {number}", generator.choice("st"), PROMPT, tuple(chosen), ranks, margin=generator.choice((None, None, 1.0)))
        rows[dump_record(row)] = row
    reference: object = None
    for _ in range(6):
        shuffled = list(rows.values())
        generator.shuffle(shuffled)
        found, left = join(shuffled)
        members = [member for group in found for member in group.members]
        assert len(members) == len(set(members))
        assert len(members) + left.total() <= len(rows)
        texts = sorted((dump_record(group.comparison), [shuffled[m].id for m in group.members]) for group in found)
        reference = reference or (texts, left)
        assert (texts, left) == reference
        for group in found:
            for member in group.members:
                assert pairs(shuffled[member]) <= pairs(group.comparison)


@pytest.mark.parametrize("seed", range(40))
def test_the_verdict_is_that_of_the_transitive_closure(seed: int) -> None:
    """Against a closure by brute force over four completions."""
    generator = random.Random(2000 + seed)
    rows = [
        ranking(generator.choice(("{}>{}", "{}>{}", "{}={}")).format(*generator.sample("ABCD", 2))) for _ in range(generator.randint(3, 7))
    ]
    names = sorted({completion_key(name) for row in rows for name in row.completions})
    at_least = {(name, name) for name in names}
    better = set()
    for row in rows:
        assert row.ranks is not None
        (first, second), tie = map(completion_key, row.completions), row.ranks[0] == row.ranks[1]
        at_least |= {(first, second)} | ({(second, first)} if tie else set())
        better |= set() if tie else {(first, second)}
    for _ in names:
        at_least |= {(a, c) for a, b in at_least for other, c in at_least if b == other}
    better = {(a, d) for a, b in at_least for x, c in better for y, d in at_least if b == x and c == y}
    verdict = weak_order(rows)
    if any((name, name) in better for name in names):
        assert verdict is Left.CONTRADICTORY
    elif any((a, b) not in at_least and (b, a) not in at_least for a, b in combinations(names, 2)):
        assert verdict is Left.INCOMPLETE
    else:
        assert isinstance(verdict, list)
        level = {name: number for number, names_of_level in enumerate(verdict) for name in names_of_level}
        assert all((level[a] < level[b]) == ((a, b) in better) for a in names for b in names)


def test_a_long_chain_takes_no_time() -> None:
    rows = [ranking(f"{i:06}>{i + 1:06}") for i in range(20_000)]
    random.Random(0).shuffle(rows)
    (group,), _ = join(rows)
    assert group.comparison.completions == tuple(f"{i:06}" for i in range(20_001))
