from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayward.batch.comparison import Labels
from rayward.data.record import pairwise_in_order
from rayward.errors import ConfigError
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.sums import METRIC_SUMS, ranking_metrics
from rayward.objectives.table import Objective


def ranked(*ranks: float, margin: float = math.nan, weight: float = 1.0, shares: Sequence[float] | None = None, **others: Any) -> Labels:
    votes = None if shares is None else np.array(shares, dtype=np.float32)
    return Labels(ranks=np.array(ranks, dtype=np.float32), margin=margin, weight=weight, vote_shares=votes, **others)


PAIR = ranked(0, 1)


def column(*rewards: float) -> Tensor:
    return torch.tensor(rewards, dtype=torch.float32)[:, None].requires_grad_()


def mean_loss(rewards: Tensor, labels: list[Labels], **config: object) -> Tensor:
    objective = Objective(BradleyTerryObjective.model_validate(config))
    return objective.loss(rewards, labels).loss_sum / objective.count(labels)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (0.0, 0.6931471806),
        (1.0, 0.3132616875),
        (-1.0, 1.3132616875),
        (2.0, 0.1269280110),
        (1.5, 0.2014132780),
        (-1.5, 1.7014132780),
        (30.0, 9.3576e-14),
        (-30.0, 30.0),
        (100.0, 0.0),
        (-100.0, 100.0),
    ],
)
def test_bradley_terry_values(gap: float, expected: float) -> None:
    loss = mean_loss(column(gap, 0.0), [PAIR])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert torch.equal(loss.detach(), -torch.nn.functional.logsigmoid(torch.tensor(gap))) or loss.item() == pytest.approx(
        -torch.nn.functional.logsigmoid(torch.tensor(gap)).item(), rel=1e-6
    )


@pytest.mark.parametrize(("gap", "slope"), [(1.5, 0.1824255238), (0.0, 0.5), (100.0, 0.0), (-100.0, 1.0)])
def test_the_gradient_of_a_pair_is_finite_and_sums_to_zero(gap: float, slope: float) -> None:
    rewards = column(gap, 0.0)
    mean_loss(rewards, [PAIR]).backward()
    assert rewards.grad is not None
    assert rewards.grad.flatten().tolist() == pytest.approx([-slope, slope], abs=1e-7)


def test_the_exponential_is_of_the_difference() -> None:
    # log(1 + exp(r_worse) - exp(r_better)), as it is sometimes misprinted, has no value at (1, 0) and moves with a shift.
    assert math.isnan(torch.log(torch.tensor(1.0 + 1.0 - math.e)).item())
    assert mean_loss(column(1.0, 0.0), [PAIR]).item() == pytest.approx(0.3132616875)
    assert mean_loss(column(8.0, 7.0), [PAIR]).item() == pytest.approx(0.3132616875)


def test_which_completion_is_better_is_read_from_the_ranks() -> None:
    assert mean_loss(column(0.0, 1.5), [ranked(1, 0)]).item() == pytest.approx(0.2014132780)
    assert mean_loss(column(0.0, 1.5), [ranked(7, 3)]).item() == pytest.approx(0.2014132780)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(0.0, 0.2014132780), (1 / 3, 0.2710977272), (2 / 3, 0.3608848159), (1.0, 0.4740769842), (2.0, 0.9740769842), (3.0, 1.7014132780)],
)
def test_the_margin_is_asked_of_the_gap(margin: float, expected: float) -> None:
    assert mean_loss(column(1.5, 0.0), [ranked(0, 1, margin=margin)]).item() == pytest.approx(expected, rel=1e-6)


def test_an_unknown_margin_is_no_margin_bit_for_bit() -> None:
    assert torch.equal(mean_loss(column(1.5, 0.0), [PAIR]), mean_loss(column(1.5, 0.0), [ranked(0, 1, margin=0.0)]))


def test_label_smoothing_by_both_spellings() -> None:
    smoothed = mean_loss(column(1.5, 0.0), [PAIR], label_smoothing=0.1).item()
    assert smoothed == pytest.approx(0.3514132780, rel=1e-6)
    assert smoothed == pytest.approx(mean_loss(column(1.5, 0.0), [PAIR]).item() + 0.1 * 1.5, rel=1e-6)


def test_centering() -> None:
    # 0.2014132780 + 0.01 * (1.2 - 0.3)^2
    assert mean_loss(column(1.2, -0.3), [PAIR], center_coefficient=0.01).item() == pytest.approx(0.2095132780, rel=1e-6)


def test_a_tie_trains_towards_one_half() -> None:
    tie = ranked(0, 0)
    assert mean_loss(column(0.7, 0.7), [tie]).item() == pytest.approx(math.log(2.0), rel=1e-6)
    assert mean_loss(column(0.2, 1.5), [tie]).item() == mean_loss(column(1.5, 0.2), [tie]).item()
    # Neither smoothing nor a margin applies to it.
    plain = mean_loss(column(0.2, 1.5), [tie]).item()
    assert mean_loss(column(0.2, 1.5), [ranked(0, 0, margin=2.0)], label_smoothing=0.2).item() == plain
    rewards = column(0.7, 0.7)
    mean_loss(rewards, [tie]).backward()
    assert rewards.grad is not None
    assert rewards.grad.abs().max() == 0


def test_votes_are_a_soft_target_by_hand() -> None:
    # softplus(-1.5) = .2014132780, softplus(1.5) = 1.7014132780; three votes of four for the first.
    soft = ranked(0, 1, shares=(0.75,))
    assert mean_loss(column(1.5, 0.0), [soft]).item() == pytest.approx(0.75 * 0.2014132780 + 0.25 * 1.7014132780, rel=1e-6)
    assert mean_loss(column(0.0, 1.5), [ranked(1, 0, shares=(0.25,))]).item() == pytest.approx(0.5764132780, rel=1e-6)
    # The same votes as rows of their own.
    rows = mean_loss(column(1.5, 0.0, 1.5, 0.0, 1.5, 0.0, 1.5, 0.0), [PAIR, PAIR, PAIR, ranked(1, 0)])
    assert mean_loss(column(1.5, 0.0), [soft]).item() == pytest.approx(rows.item(), rel=1e-6)
    # All votes are the label, half of them a tie, and a judge who errs with probability e is smoothing: 1 - e of the votes.
    assert torch.equal(mean_loss(column(1.5, 0.0), [ranked(0, 1, shares=(1.0,))]), mean_loss(column(1.5, 0.0), [PAIR]))
    assert torch.equal(mean_loss(column(1.5, 0.0), [ranked(0, 0, shares=(0.5,))]), mean_loss(column(1.5, 0.0), [ranked(0, 0)]))
    smoothed = mean_loss(column(1.5, 0.0), [PAIR], label_smoothing=0.1)
    assert mean_loss(column(1.5, 0.0), [ranked(0, 1, shares=(0.9,))]).item() == pytest.approx(smoothed.item(), rel=1e-6)


def test_votes_with_smoothing_margin_scale_and_centering_by_hand() -> None:
    soft = ranked(0, 1, shares=(0.75,), margin=1.0, strength=2.0)
    # Each vote is wrong with probability .1: .75 * .9 + .25 * .1 = .7; gap 1.5 - 1 = .5; softplus(-.5) = .4740769842.
    expected = 2.0 * (0.7 * 0.4740769842 + 0.3 * 0.9740769842) + 0.01 * 1.5**2
    settings = {"label_smoothing": 0.1, "scale": "strength", "center_coefficient": 0.01}
    assert mean_loss(column(1.5, 0.0), [soft], **settings).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 1.0])
def test_the_gradient_of_a_soft_target_vanishes_where_the_model_says_its_share(share: float) -> None:
    ranks = (0, 0) if share == 0.5 else (0, 1)
    for gap in (-2.0, 0.0, 1.5):
        rewards = column(gap, 0.0)
        mean_loss(rewards, [ranked(*ranks, shares=(share,))]).backward()
        assert rewards.grad is not None
        slope = 1.0 / (1.0 + math.exp(-gap)) - share
        assert rewards.grad.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-6)
        for index, size in ((0, 1e-2), (1, 1e-2)):
            moved = [column(*(value + sign * size * (place == index) for place, value in enumerate((gap, 0.0)))) for sign in (1, -1)]
            losses = [mean_loss(point, [ranked(*ranks, shares=(share,))]).item() for point in moved]
            assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(rewards.grad[index].item(), abs=2e-4)


def test_every_pair_of_a_ranking_has_its_share() -> None:
    rewards = column(1.0, 0.0, -0.5)
    # (a, b) .5, (a, c) .75, (b, c) .25; by the means a, b, c have 1.25, .75, 1: the pair (b, c) stands as (c, b) with .75.
    soft = mean_loss(rewards, [ranked(0, 2, 1, shares=(0.5, 0.75, 0.25))]).item()
    pairs = [((1.0, 0.0), 0.5), ((1.0, -0.5), 0.75), ((0.0, -0.5), 0.25)]
    single = [mean_loss(column(*gap), [ranked(*((0, 0) if p == 0.5 else (0, 1)), shares=(p,))]).item() for gap, p in pairs]
    assert soft == pytest.approx(sum(single) / 3, rel=1e-6)


@pytest.mark.parametrize("value", [1e9, -1e9])
def test_the_largest_margin_strength_and_weight_that_prepare_lets_through_give_a_finite_loss(value: float) -> None:
    labels = [ranked(0, 1, margin=value, strength=1e9, weight=1e9), ranked(0, 1, strength=1.0)]
    for settings in ({}, {"scale": "strength"}, {"margin": "strength", "scale": "strength"}, {"label_smoothing": 0.1}):
        rewards = column(1.5, 0.0, 0.0, 0.5)
        loss = mean_loss(rewards, labels, **settings)
        loss.backward()
        assert torch.isfinite(loss)
        assert rewards.grad is not None
        assert torch.isfinite(rewards.grad).all()


def test_the_pairs_of_a_ranking_are_averaged() -> None:
    rewards = column(2.0, 1.0, 0.5, -1.0)
    loss = mean_loss(rewards, [ranked(0, 1, 2, 3)])
    assert loss.item() == pytest.approx(0.2276134317, rel=1e-6)
    loss.backward()
    assert rewards.grad is not None
    assert rewards.grad.flatten().tolist() == pytest.approx([-0.08313214, -0.03796703, 0.06292344, 0.05817572], abs=1e-7)


def test_the_balance_decides_what_a_ranking_weighs() -> None:
    rewards, labels = column(2.0, 1.0, 0.5, -1.0, 0.0, 0.0), [ranked(0, 1, 2, 3), PAIR]
    by_prompt = mean_loss(rewards, labels).item()
    by_pair = mean_loss(rewards, labels, balance="pair").item()
    assert by_prompt == pytest.approx((1.3656805903 / 6 + math.log(2)) / 2, rel=1e-6)
    assert by_pair == pytest.approx((1.3656805903 + math.log(2)) / 7, rel=1e-6)


def test_weights_weigh() -> None:
    first, second = mean_loss(column(1.0, 0.0), [PAIR]).item(), mean_loss(column(0.0, 2.0), [PAIR]).item()
    both = mean_loss(column(1.0, 0.0, 0.0, 2.0), [ranked(0, 1, weight=3.0), ranked(0, 1, weight=1.0)]).item()
    assert both == pytest.approx((3 * first + second) / 4, rel=1e-6)
    assert mean_loss(column(1.0, 0.0, 0.0, 2.0), [PAIR, ranked(0, 1, weight=0.0)]).item() == pytest.approx(first, rel=1e-6)


def test_an_empty_micro_batch_is_exactly_zero_and_reaches_the_parameters() -> None:
    head = torch.nn.Linear(4, 1)
    out = Objective(BradleyTerryObjective()).loss(head(torch.zeros(0, 4)), [])
    assert out.loss_sum.item() == 0.0
    assert out.metrics.tolist() == [0.0] * len(METRIC_SUMS)
    out.loss_sum.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() == 0
    assert Objective(BradleyTerryObjective()).count([]) == 0.0


def _sample(seed: int) -> tuple[Tensor, list[Labels]]:
    generator = np.random.default_rng(seed)
    labels = []
    for _ in range(24):
        count = int(generator.integers(2, 6))
        margin = float(generator.normal()) if generator.random() < 0.3 else math.nan
        shares = generator.uniform(0, 1, count * (count - 1) // 2).tolist() if generator.random() < 0.5 else None
        ranks = generator.integers(0, 3, count).tolist()
        labels.append(ranked(*ranks, margin=margin, weight=float(generator.uniform(0.1, 3.0)), shares=shares))
    total = sum(len(label.ranks) for label in labels if label.ranks is not None)
    return torch.from_numpy(generator.normal(0, 2, total).astype(np.float32))[:, None], labels


@pytest.mark.parametrize("balance", ["prompt", "pair"])
@pytest.mark.parametrize("seed", range(4))
def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient_nor_metrics(seed: int, balance: str) -> None:
    rewards, labels = _sample(seed)
    objective = Objective(BradleyTerryObjective.model_validate({"balance": balance, "label_smoothing": 0.05, "center_coefficient": 0.01}))
    count = objective.count(labels)
    whole = rewards.clone().requires_grad_()
    out = objective.loss(whole, labels)
    (out.loss_sum / count).backward()
    sizes = [len(label.ranks) for label in labels if label.ranks is not None]
    starts = np.cumsum([0, *sizes])
    for trial in range(5):
        cuts = np.sort(np.random.default_rng([seed, trial]).integers(0, len(labels) + 1, 4))
        bounds = [0, *cuts.tolist(), len(labels)]
        parts = rewards.clone().requires_grad_()
        loss_sum, metrics, counts = 0.0, torch.zeros(len(METRIC_SUMS), dtype=torch.float64), 0.0
        for first, last in pairwise(bounds):
            piece = objective.loss(parts[starts[first] : starts[last]], labels[first:last])
            (piece.loss_sum / count).backward()
            loss_sum += piece.loss_sum.double().item()
            metrics += piece.metrics
            counts += objective.count(labels[first:last])
        assert counts == pytest.approx(count, rel=1e-12)
        assert loss_sum == pytest.approx(out.loss_sum.item(), rel=1e-6)
        torch.testing.assert_close(metrics, out.metrics, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_completions_and_constant_shift_do_not_matter(seed: int) -> None:
    rewards, labels = _sample(seed)
    reference = mean_loss(rewards, labels).item()
    assert mean_loss(rewards + 3.0, labels).item() == pytest.approx(reference, rel=1e-5)
    generator, permuted, shuffled, start = np.random.default_rng(seed), [], [], 0
    for label in labels:
        assert label.ranks is not None
        order = generator.permutation(len(label.ranks))
        shares = None if label.vote_shares is None else pairwise_in_order(label.vote_shares.tolist(), order.tolist())
        permuted.append(ranked(*label.ranks[order].tolist(), margin=label.margin, weight=label.weight, shares=shares))
        shuffled.append(rewards[start : start + len(order)][torch.from_numpy(order)])
        start += len(order)
    assert mean_loss(torch.cat(shuffled), permuted).item() == pytest.approx(reference, rel=1e-5)


def test_metrics_by_hand() -> None:
    labels = [PAIR, ranked(1, 0), ranked(0, 0), ranked(0, 1, 2)]
    rewards = column(1.0, 0.0, 1.0, 0.0, 5.0, 5.0, 2.0, 2.0, 1.0)
    metrics = Objective(BradleyTerryObjective()).loss(rewards, labels).metrics
    named = dict(zip(METRIC_SUMS, metrics.tolist(), strict=True))
    # Pairs with a winner: +1, -1, and 0, +1, +1 of the ranking; the tie of the third is no pair.
    assert named == {
        "pairs": 5.0, "correct": 3.0, "tied": 1.0, "margin": 2.0, "rewards": 9.0, "reward": 17.0, "reward_squared": 61.0,
    }  # fmt: skip
    shown = ranking_metrics(metrics.tolist())
    assert (shown["accuracy"], shown["tied"], shown["margin"]) == (0.6, 0.2, 0.4)
    assert shown["reward_mean"] == pytest.approx(17 / 9)
    assert shown["reward_std"] == pytest.approx(float(np.std([1, 0, 1, 0, 5, 5, 2, 2, 1])))


def test_a_comparison_without_a_ranking_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a ranking"):
        mean_loss(column(1.0, 0.0), [Labels(attributes=np.zeros((2, 3), dtype=np.float32))])
