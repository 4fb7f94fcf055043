from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tests.helpers.comparisons import random_comparisons
from tests.helpers.training import SCHEDULE, make_shares, tiny_engine, train

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import pack
from rayward.data.stream.shares import StepShare
from rayward.errors import NonFiniteError, StreamOrderError
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import Objective
from rayward.training.loop import Schedule, run_steps, train_step, validate

OBJECTIVE = Objective(BradleyTerryObjective())


@pytest.fixture(scope="module")
def comparisons() -> list[EncodedComparison]:
    return random_comparisons(160, seed=11)


@pytest.fixture(scope="module")
def reference(comparisons: list[EncodedComparison]) -> list[dict[str, float]]:
    """Twenty steps in which each step is one micro-batch."""
    return train(tiny_engine(), make_shares(comparisons, budget=100_000), OBJECTIVE)


@pytest.fixture(scope="module")
def decided(comparisons: list[EncodedComparison]) -> list[EncodedComparison]:
    """Those whose rewards under a fresh model lie apart by far more than rounding: only on them is an accuracy the same number
    over every order of summation, on every CPU."""
    engine = tiny_engine()
    kept = []
    for comparison in comparisons:
        with torch.no_grad():
            rewards = engine.forward(pack([comparison]))[:, 0].sort().values
        if rewards.diff().min() > 1e-2:
            kept.append(comparison)
    return kept


@pytest.mark.parametrize("budget", [170, 250, 400])
def test_the_micro_batch_budget_changes_no_step(
    comparisons: list[EncodedComparison], reference: list[dict[str, float]], budget: int
) -> None:
    shares = list(make_shares(comparisons, budget=budget))
    assert max(len(share.microbatches) for share in shares) > 1
    history = train(tiny_engine(), iter(shares), OBJECTIVE)
    for found, expected in zip(history, reference, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        assert found["margin"] == pytest.approx(expected["margin"], rel=1e-4, abs=1e-6)
        assert found["tokens"] == expected["tokens"]


@pytest.mark.parametrize("budget", [170, 250, 400])
def test_the_micro_batch_budget_changes_no_accuracy(decided: list[EncodedComparison], budget: int) -> None:
    assert len(decided) >= 80
    engine = tiny_engine()
    whole = validate(engine, make_shares(decided, per_step=len(decided), budget=100_000), OBJECTIVE)
    cut = validate(engine, make_shares(decided, per_step=len(decided), budget=budget), OBJECTIVE)
    assert 0.0 < whole["accuracy"] < 1.0
    assert cut["accuracy"] == whole["accuracy"]
    assert cut["margin"] == pytest.approx(whole["margin"], abs=1e-6)


def test_gradient_checkpointing_changes_no_step(comparisons: list[EncodedComparison], reference: list[dict[str, float]]) -> None:
    history = train(tiny_engine(gradient_checkpointing=True), make_shares(comparisons, budget=300), OBJECTIVE, stop_step=5)
    for found, expected in zip(history, reference, strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_same_comparisons_again_are_learned(comparisons: list[EncodedComparison]) -> None:
    def repeated() -> Iterator[StepShare]:
        (only,) = make_shares(comparisons[:8])
        for step in range(20):
            yield StepShare(step, 0, 1, only.microbatches)

    history = train(tiny_engine(), repeated(), OBJECTIVE)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.05), "a fresh head starts near indifference"
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_metrics_of_a_step(comparisons: list[EncodedComparison], reference: list[dict[str, float]]) -> None:
    first = comparisons[:8]
    tokens, unshared = sum(c.num_tokens for c in first), sum(c.num_tokens_unshared for c in first)
    metrics = reference[0]
    assert (metrics["comparisons"], metrics["tokens"], metrics["padding_fraction"]) == (8, tokens, 0.0)
    assert metrics["tokens_saved_fraction"] == pytest.approx(1 - tokens / unshared)
    assert metrics["learning_rate"] == SCHEDULE.at(0)
    assert metrics["step_s"] > 0


def test_weights_and_pairs_are_divided_by_the_count_of_the_whole_step(comparisons: list[EncodedComparison]) -> None:
    share = next(make_shares(comparisons, budget=170))
    engine = tiny_engine()
    with torch.no_grad():
        losses = [OBJECTIVE.loss(engine.forward(b), [c.labels for c in b.comparisons]).loss_sum.item() for b in share.microbatches]
    assert train_step(engine, share, OBJECTIVE, 0.0)["loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)


def test_the_schedule_by_hand() -> None:
    schedule = Schedule(learning_rate=1.0, total_steps=10, warmup_fraction=0.2, min_lr_fraction=0.1)
    found = [schedule.at(step) for step in range(10)]
    assert found[:2] == [0.5, 1.0]
    assert found[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert found[9] == pytest.approx(0.1)
    assert found[1:] == sorted(found[1:], reverse=True)


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 0.1), (1.0, 1.0), (0.03, 1.0)])
def test_a_run_of_one_step(warmup: float, first: float) -> None:
    assert Schedule(1.0, 1, warmup, 0.1).at(0) == pytest.approx(first)


def test_a_floor_of_one_is_a_constant_rate() -> None:
    schedule = Schedule(2.0, 7, 0.0, 1.0)
    assert {schedule.at(step) for step in range(7)} == {2.0}


def test_weights_that_are_not_finite_stop_the_step_and_name_the_rows(comparisons: list[EncodedComparison]) -> None:
    engine = tiny_engine()
    with torch.no_grad():
        engine.reward_model.model.score.weight[0, 0] = torch.nan
    share = next(make_shares(comparisons, budget=300))
    before = [p.detach().clone() for p in engine.reward_model.parameters()]
    with pytest.raises(NonFiniteError) as caught:
        train_step(engine, share, OBJECTIVE, 1e-3)
    assert caught.value.step == 0
    assert sorted(caught.value.comparison_ids) == sorted(c.id for c in comparisons[:8])
    assert "the loss of step 0 is not finite" in caught.value.problem
    assert caught.value.comparison_ids[0] in caught.value.problem
    assert not caught.value.retryable
    for mine, theirs in zip(engine.reward_model.parameters(), before, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0)), "nothing may be applied"


def test_only_the_micro_batch_at_fault_is_named(comparisons: list[EncodedComparison]) -> None:
    engine = tiny_engine()
    share = next(make_shares(comparisons, budget=300))
    assert len(share.microbatches) > 1
    bad = share.microbatches[1].comparisons[0]
    token = next(t for t in bad.prefix_ids if all(t not in b.input_ids for b in share.microbatches if b is not share.microbatches[1]))
    with torch.no_grad():
        engine.reward_model.backbone.get_input_embeddings().weight[token] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        train_step(engine, share, OBJECTIVE, 1e-3)
    assert set(caught.value.comparison_ids) == {c.id for c in share.microbatches[1].comparisons}


def test_a_gradient_that_is_not_finite_is_not_applied(comparisons: list[EncodedComparison]) -> None:
    engine = tiny_engine()
    share = next(make_shares(comparisons))
    engine.reward_model.model.score.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = [p.detach().clone() for p in engine.reward_model.parameters()]
    with pytest.raises(NonFiniteError, match="the gradient of step 0") as caught:
        train_step(engine, share, OBJECTIVE, 1e-3)
    assert set(caught.value.comparison_ids) == set(share.comparison_ids)
    assert all(torch.equal(p, q) for p, q in zip(engine.reward_model.parameters(), before, strict=True))


def test_a_step_that_is_not_due_stops_the_run(comparisons: list[EncodedComparison]) -> None:
    shares = make_shares(comparisons, first_step=1)
    with pytest.raises(StreamOrderError, match=r"rank 0 of 1 waits for step 0 and the stream has \(1, 0, 1\)"):
        train(tiny_engine(), shares, OBJECTIVE)


def test_the_share_of_another_rank_stops_the_run(comparisons: list[EncodedComparison]) -> None:
    share = next(make_shares(comparisons))
    for other in (StepShare(0, 1, 2, share.microbatches), StepShare(0, 0, 2, share.microbatches)):
        with pytest.raises(StreamOrderError):
            train(tiny_engine(), iter([other]), OBJECTIVE)


def test_a_share_is_for_a_data_parallel_rank_not_for_a_process(comparisons: list[EncodedComparison]) -> None:
    # Process 2 of 4, which computes with process 3 on the shares of the second of two.
    engine = tiny_engine()
    engine.rank, engine.world_size, engine.data_parallel_rank, engine.data_parallel_size = 2, 4, 1, 2
    batches = next(make_shares(comparisons)).microbatches
    run = partial(run_steps, objective=OBJECTIVE, schedule=SCHEDULE, first_step=0, stop_step=1, on_step=lambda _step, _metrics: None)
    run(engine, iter([StepShare(0, 1, 2, batches)]))
    with pytest.raises(StreamOrderError, match="rank 1 of 2 waits for step 0"):
        run(engine, iter([StepShare(0, 2, 4, batches)]))


def test_a_stream_that_ends_early_stops_the_run(comparisons: list[EncodedComparison]) -> None:
    seen: list[int] = []
    with pytest.raises(StreamOrderError, match="waits for step 2 and the stream has ended"):
        run_steps(
            tiny_engine(),
            make_shares(comparisons[:16]),
            objective=OBJECTIVE,
            schedule=SCHEDULE,
            first_step=0,
            stop_step=3,
            on_step=lambda step, _metrics: seen.append(step),
        )
    assert seen == [1, 2]


def test_validation_counts_over_all_shares(decided: list[EncodedComparison]) -> None:
    engine, clear = tiny_engine(), decided[:40]
    by_eight = validate(engine, make_shares(clear), OBJECTIVE)
    at_once = validate(engine, make_shares(clear, per_step=40, budget=100_000), OBJECTIVE)
    assert by_eight["comparisons"] == 40
    assert by_eight == pytest.approx(at_once, rel=1e-5, abs=1e-9)
    assert all(p.grad is None for p in engine.reward_model.parameters())
    assert validate(engine, iter([]), OBJECTIVE)["comparisons"] == 0
