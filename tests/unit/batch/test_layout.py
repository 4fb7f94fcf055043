from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.helpers.comparisons import make_comparison, random_comparisons

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import Layout, language_loss_tokens, pack
from rayward.batch.planner import group_by_budget, microbatch_tokens, plan_step
from rayward.contract.reading import Place
from rayward.errors import ConfigError


def encoded(name: str, prefix: list[int], *branches: list[int]) -> EncodedComparison:
    return EncodedComparison(
        name,
        np.array(prefix, dtype=np.int32),
        tuple(np.array(b, dtype=np.int32) for b in branches),
        Labels(ranks=np.arange(2, dtype=np.float32)),
    )


def test_a_packed_row_by_hand() -> None:
    batch = pack([encoded("a", [10, 11], [12, 2], [13, 14, 2]), encoded("b", [20], [2], [21, 2])])
    assert batch.input_ids.tolist() == [[10, 11, 12, 2, 13, 14, 2, 20, 2, 21, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 2]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 2, 2, 2], [0, 2, 4, 3], [7, 1, 8, 1], [7, 1, 9, 2]]
    assert batch.attention_mask is None
    assert batch.end_row.tolist() == [0, 0, 0, 0]
    assert batch.end_column.tolist() == [3, 6, 8, 10]
    assert (batch.num_computed_tokens, batch.num_real_tokens) == (11, 11)
    assert [c.id for c in batch.comparisons] == ["a", "b"]


def test_a_padded_batch_by_hand() -> None:
    batch = pack([encoded("a", [10, 11], [12, 2], [13, 14, 2]), encoded("b", [20], [2], [21, 2])], layout="padded", pad_token_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 2, 9], [10, 11, 13, 14, 2], [20, 2, 9, 9, 9], [20, 21, 2, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.segments is None
    assert batch.end_row.tolist() == [0, 1, 2, 3]
    assert batch.end_column.tolist() == [3, 4, 1, 2]
    assert (batch.num_computed_tokens, batch.num_real_tokens) == (20, 14)


def test_completions_without_a_common_prefix() -> None:
    batch = pack([encoded("a", [], [5, 2], [6, 7, 2])])
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 0, 2], [0, 0, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_empty_micro_batch_is_one_dummy_token_without_ends(layout: Layout) -> None:
    batch = pack([], layout=layout, pad_token_id=4)
    assert batch.input_ids.tolist() == [[4]]
    assert batch.end_row.size == batch.end_column.size == 0
    assert batch.num_real_tokens == 0
    assert batch.comparisons == ()
    assert (batch.segments is None) == (layout == "padded")


def test_tokens_of_a_comparison() -> None:
    comparison = make_comparison("a", 10, [3, 4, 5])
    assert (comparison.num_tokens, comparison.num_tokens_unshared, comparison.num_completions) == (22, 42, 3)
    assert microbatch_tokens([comparison], "packed") == 22
    assert microbatch_tokens([comparison], "padded") == 45
    assert microbatch_tokens([], "packed") == microbatch_tokens([], "padded") == 0


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 33])
def test_a_plan_holds_every_comparison_once_within_the_budget(number: int, world_size: int, layout: Layout) -> None:
    for seed in range(5):
        comparisons = random_comparisons(number, seed=seed)
        for budget in (250, 400, 3000):
            plan = plan_step(comparisons, world_size=world_size, tokens_per_microbatch=budget, layout=layout)
            assert len(plan) == world_size
            assert len({len(per_rank) for per_rank in plan}) == 1
            assert len(plan[0]) >= 1
            groups = [group for per_rank in plan for group in per_rank]
            assert sorted(index for group in groups for index in group) == list(range(number))
            assert all(microbatch_tokens([comparisons[i] for i in group], layout) <= budget for group in groups)
            assert all(pack([comparisons[i] for i in g], layout=layout).num_computed_tokens <= budget for g in groups)
            assert plan == plan_step(comparisons, world_size=world_size, tokens_per_microbatch=budget, layout=layout)


def test_more_ranks_than_comparisons_leave_empty_micro_batches() -> None:
    plan = plan_step(random_comparisons(2, seed=0), world_size=5, tokens_per_microbatch=1000)
    assert sorted(len(group) for per_rank in plan for group in per_rank) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_get_similar_work(world_size: int) -> None:
    for seed in range(10):
        comparisons = random_comparisons(64, seed=seed, longest=200)
        plan = plan_step(comparisons, world_size=world_size, tokens_per_microbatch=4096)
        loads = [sum(comparisons[i].num_tokens for group in per_rank for i in group) for per_rank in plan]
        # Largest-first filling: no rank has more than one small comparison per micro-batch more than another.
        assert max(loads) <= 1.05 * min(loads)
        for lane in zip(*plan, strict=True):
            costs = [sum(comparisons[i].num_tokens for i in group) for group in lane]
            assert max(costs) <= 1.1 * min(costs)


def test_the_fewest_micro_batches_are_used() -> None:
    comparisons = [make_comparison(f"c{i}", 10, [20, 20]) for i in range(16)]  # 50 tokens each
    assert [len(p) for p in plan_step(comparisons, world_size=2, tokens_per_microbatch=400)] == [1, 1]
    assert [len(p) for p in plan_step(comparisons, world_size=1, tokens_per_microbatch=400)] == [2]
    assert [len(p) for p in plan_step(comparisons, world_size=1, tokens_per_microbatch=50)] == [16]


@pytest.mark.parametrize(("layout", "cost"), [("packed", 50), ("padded", 60)])
def test_a_comparison_over_the_budget_is_named(layout: Layout, cost: int) -> None:
    comparisons = [make_comparison("small", 1, [2, 2]), make_comparison("large", 10, [20, 20])]
    with pytest.raises(ConfigError) as caught:
        plan_step(comparisons, world_size=1, tokens_per_microbatch=cost - 1, layout=layout)
    assert f"comparison large takes {cost} tokens" in caught.value.problem
    assert f"at least {cost}" in caught.value.remedy
    plan_step(comparisons, world_size=1, tokens_per_microbatch=cost, layout=layout)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_groups_for_scoring_hold_everything_once(layout: Layout) -> None:
    comparisons = random_comparisons(40, seed=3)
    groups = group_by_budget(comparisons, tokens_per_microbatch=300, layout=layout)
    assert sorted(index for group in groups for index in group) == list(range(40))
    assert all(microbatch_tokens([comparisons[i] for i in group], layout) <= 300 for group in groups)
    alone = group_by_budget([make_comparison("large", 500, [20, 20]), *comparisons[:3]], tokens_per_microbatch=300, layout=layout)
    assert [0] in alone, "an item over the budget is scored on its own, not refused"
    assert group_by_budget([], tokens_per_microbatch=300, layout=layout) == []


@pytest.mark.parametrize("place", ["end", "steps", "tokens"])
def test_both_layouts_read_the_same_tokens(place: Place) -> None:
    comparisons = random_comparisons(6, seed=9)
    packed, padded = pack(comparisons, read=place), pack(comparisons, layout="padded", read=place)
    np.testing.assert_array_equal(packed.num_reads, padded.num_reads)
    assert packed.num_reads.sum() == len(packed.read_row) == len(padded.read_column)
    for batch in (packed, padded):
        ids = batch.input_ids[batch.read_row, batch.read_column].tolist()
        position = batch.position_ids[batch.read_row, batch.read_column].tolist()
        expected = []
        for comparison in comparisons:
            for branch, places in zip(comparison.branch_ids, comparison.read_positions(place), strict=True):
                whole = np.concatenate([comparison.prefix_ids, branch])
                expected += [(int(whole[p]), int(p)) for p in places]
        assert list(zip(ids, position, strict=True)) == expected
    counts = [n for labels in packed.labels for n in labels.num_reads or (1,) * labels.num_completions]
    assert counts == packed.num_reads.tolist()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_taught_tokens_are_the_text_after_its_start(layout: Layout) -> None:
    comparisons = random_comparisons(5, seed=11)
    batch = pack(comparisons, layout=layout)
    tokens = language_loss_tokens(batch, "all")
    found: list[list[int]] = [[] for _ in batch.end_row]
    for row, before, column, owner in zip(tokens.row, tokens.before, tokens.column, tokens.completion, strict=True):
        found[owner].append(int(batch.input_ids[row, column]))
        assert batch.position_ids[row, before] + 1 == batch.position_ids[row, column]
    expected = []
    for comparison in comparisons:
        assert comparison.text_starts is not None
        for branch, start in zip(comparison.branch_ids, comparison.text_starts, strict=True):
            expected.append(np.concatenate([comparison.prefix_ids, branch])[max(start, 1) :].tolist())
    assert found == expected
    best = language_loss_tokens(batch, "best")
    firsts = np.cumsum([0, *(c.num_completions for c in comparisons)])[:-1]
    assert set(best.completion.tolist()) <= set(firsts.tolist())
    unranked = replace(comparisons[0], labels=Labels(weight=0.5))
    assert set(language_loss_tokens(pack([unranked], layout=layout), "best").weight.tolist()) <= {0.5}
    assert len(language_loss_tokens(pack([unranked]), "best").row) == len(language_loss_tokens(pack([unranked]), "all").row)
    assert len(language_loss_tokens(pack([]), "all").row) == 0
