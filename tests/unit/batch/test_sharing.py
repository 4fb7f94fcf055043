"""Comparisons that begin alike become one where that saves tokens; every branch keeps its ids and its places."""

from __future__ import annotations

import numpy as np
import pytest
from tests.helpers.comparisons import make_comparison

from rayward.batch.comparison import EncodedComparison, Labels, shared_prefix_length
from rayward.batch.sharing import LEAST_SAVED, MOVED_PER_SAVED, Merged, merge

BUDGET = 1000


def text(ids: list[int], **places: tuple[int, ...]) -> EncodedComparison:
    """One conversation as an encoder gives it: all but the last token is its prefix."""
    array = np.array(ids, dtype=np.int32)
    return EncodedComparison("item", array[:-1], (array[-1:],), Labels(), **places)  # type: ignore[arg-type]


def conversations(comparison: EncodedComparison) -> list[list[int]]:
    return [[*comparison.prefix_ids.tolist(), *branch.tolist()] for branch in comparison.branch_ids]


def of_sources(comparisons: list[EncodedComparison], merged: list[Merged]) -> dict[tuple[int, int], list[int]]:
    found = {}
    for group in merged:
        for source, ids in zip(group.sources, conversations(group.comparison), strict=True):
            assert source not in found
            found[source] = ids
    return found


def random_texts(generator: np.random.Generator, number: int) -> list[EncodedComparison]:
    heads = [generator.integers(3, 9, int(size)).tolist() for size in generator.integers(1, 200, 4)]
    # Heads that begin with one another too: a conversation and the same one with more turns.
    heads += [heads[0] + heads[1], heads[0][: len(heads[0]) // 2]]
    made = []
    for index in range(number):
        head = heads[int(generator.integers(len(heads)))]
        if generator.random() < 0.5:
            made.append(text([*head, *generator.integers(3, 9, int(generator.integers(1, 60))).tolist(), 2]))
            continue
        tails = [[*generator.integers(3, 9, int(generator.integers(1, 40))).tolist(), 2] for _ in range(int(generator.integers(1, 5)))]
        prefix = shared_prefix_length([head + tail for tail in tails])
        branches = tuple(np.array((head + tail)[prefix:], dtype=np.int32) for tail in tails)
        made.append(EncodedComparison(str(index), np.array((head + tails[0])[:prefix], dtype=np.int32), branches, Labels()))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_invented_and_the_sums_are_right(seed: int) -> None:
    comparisons = random_texts(np.random.default_rng(seed), 24)
    merged = merge(comparisons, tokens_per_microbatch=BUDGET)
    expected = {(i, k): ids for i, each in enumerate(comparisons) for k, ids in enumerate(conversations(each))}
    assert of_sources(comparisons, merged) == expected
    charged: dict[int, int] = {}
    for group in merged:
        assert len(group.sources) == 1 or group.comparison.num_tokens <= BUDGET
        assert sum(group.charges().values()) == group.comparison.num_tokens
        assert not charged.keys() & group.charges().keys(), "a comparison stays whole"
        charged |= group.charges()
    before, after = sum(each.num_tokens for each in comparisons), sum(charged.values())
    assert after <= before
    assert charged.keys() == set(range(len(comparisons)))


def test_flat_texts_of_one_prompt_cost_what_one_comparison_of_them_costs() -> None:
    prompt = list(range(3, 90))
    tails = [[100 + k, 2] for k in range(16)]
    merged = merge([text(prompt + tail) for tail in tails], tokens_per_microbatch=BUDGET)
    assert [group.comparison.num_tokens for group in merged] == [len(prompt) + 16 * 2]
    charges = merged[0].charges()
    assert max(charges.values()) - min(charges.values()) <= 1


def test_the_closest_are_merged_first() -> None:
    # One text of a prompt comes before four of another that begins like it: it must not take the first of the four away.
    head = list(range(3, 63))
    one, other = head + [70] * 100, head + [71] * 100
    texts = [text([*one, 5, 2]), *(text([*other, 6 + k, 2]) for k in range(4))]
    merged = merge(texts, tokens_per_microbatch=BUDGET)
    assert sorted(sorted(source for source, _ in group.sources) for group in merged) == [[0], [1, 2, 3, 4]]
    assert sum(group.comparison.num_tokens for group in merged) == len(one) + 2 + len(other) + 4 * 2


def test_only_what_is_worth_it_is_merged() -> None:
    short, long = list(range(3, 3 + LEAST_SAVED - 1)), list(range(3, 3 + LEAST_SAVED))
    for head, size, number in (
        (short, 20, 2),
        (long, 20, 1),
        (long, LEAST_SAVED * MOVED_PER_SAVED, 1),
        (long, LEAST_SAVED * MOVED_PER_SAVED + 1, 2),
    ):
        texts = [text([*head, *[200 + k] * size, 2]) for k in range(2)]
        assert len(merge(texts, tokens_per_microbatch=BUDGET)) == number


def test_the_budget_is_kept_and_filled() -> None:
    texts = [text([*range(3, 103), 200 + k, *[9] * 98, 2]) for k in range(30)]
    merged = merge(texts, tokens_per_microbatch=500)
    # 100 tokens once, and four times 100.
    assert sorted(len(group.sources) for group in merged) == [2, *[4] * 7]
    assert max(group.comparison.num_tokens for group in merged) == 500
    assert len(merge(texts, tokens_per_microbatch=150)) == 30


def test_equal_texts_are_computed_nearly_once() -> None:
    (group,) = merge([text([*range(3, 90), 2])] * 5, tokens_per_microbatch=BUDGET)
    assert group.comparison.num_tokens == 87 + 5


def test_places_of_readings_travel_with_their_branches() -> None:
    prefix = np.arange(3, 80, dtype=np.int32)
    made = []
    for index, sizes in enumerate(((5, 9), (3,), (12, 4, 7))):
        base = make_comparison(f"c{index}", len(prefix), sizes)
        gates = tuple(10 + index for _ in sizes)
        made.append(EncodedComparison("x", prefix, base.branch_ids, Labels(), gates, base.text_starts, base.step_ends))
    (group,) = merge(made, tokens_per_microbatch=BUDGET)
    merged = group.comparison
    for place in ("end", "steps", "tokens"):
        found = merged.read_positions(place)  # type: ignore[arg-type]
        for (index, branch), positions in zip(group.sources, found, strict=True):
            assert positions.tolist() == made[index].read_positions(place)[branch].tolist()  # type: ignore[arg-type]
    assert merged.gate_positions == tuple(10 + index for index, _ in group.sources)


def test_nothing_and_one() -> None:
    assert merge([], tokens_per_microbatch=BUDGET) == []
    (group,) = merge([alone := make_comparison("c", 2000, (3, 4))], tokens_per_microbatch=BUDGET)
    assert group.comparison is alone
