"""Outcome and process rewards: fixtures, hand-worked values, and how readings become a reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayward.batch.comparison import Labels
from rayward.contract.reading import Aggregate, RewardReadout
from rayward.objectives.correctness import OutcomeObjective, ProcessObjective
from rayward.objectives.table import Objective

LOGITS = [0.5, -1.0, 2.0]


def labelled(label: float, num_reads: int, *, weight: float = 1.0) -> Labels:
    return Labels(attributes=np.array([[label]], dtype=np.float32), num_reads=(num_reads,), weight=weight)


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].requires_grad_()


@pytest.mark.parametrize(("read", "expected"), [("tokens", 0.6380888942), ("mean_logit", 0.4740769842)])
def test_the_published_variants_of_the_outcome_loss(read: str, expected: float) -> None:
    objective = Objective(OutcomeObjective.model_validate({"read": read}), ("label",))
    labels = [labelled(1.0, 3)]
    out = objective.loss(column(LOGITS), labels)
    assert objective.count(labels) == 1.0
    assert out.loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_a_long_completion_weighs_no_more_than_a_short_one() -> None:
    objective = Objective(OutcomeObjective(read="tokens"), ("label",))
    labels = [labelled(1.0, 3), labelled(0.0, 1, weight=2.0), labelled(math.nan, 2)]
    outputs = column([*LOGITS, 0.25, 9.0, -9.0])
    loss = objective.loss(outputs, labels).loss_sum / objective.count(labels)
    assert loss.item() == pytest.approx((0.6380888942 + 2 * np.logaddexp(0, 0.25)) / 3, rel=1e-6)
    loss.backward()
    assert outputs.grad is not None
    sigmoid = 1 / (1 + np.exp(-np.array([*LOGITS, 0.25])))
    assert outputs.grad[:4, 0].tolist() == pytest.approx([*(sigmoid[:3] - 1) / 9, 2 * sigmoid[3] / 3], rel=1e-5)
    assert outputs.grad[4:].abs().max() == 0.0


def test_the_cross_entropy_of_steps_by_hand() -> None:
    steps = (np.array([1.0, 0.0], dtype=np.float32), np.array([0.5, math.nan, 1.0], dtype=np.float32))
    labels = [Labels(step_labels=steps, num_reads=(2, 3), weight=2.0)]
    objective = Objective(ProcessObjective())
    outputs = column([2.0, -1.0, 0.5, 7.0, 0.0])
    assert objective.count(labels) == 8.0
    expected = np.logaddexp(0, -2.0) + np.logaddexp(0, -1.0) + (np.logaddexp(0, 0.5) + np.logaddexp(0, -0.5)) / 2 + math.log(2)
    assert objective.loss(outputs, labels).loss_sum.item() == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("last", 0.4), ("mean", 0.7), ("minimum", 0.4), ("product", math.exp(-1.2447947988)), ("product", 0.288)]
)
def test_step_probabilities_become_one_reward(aggregate: Aggregate, expected: float) -> None:
    probabilities = torch.tensor([0.9, 0.8, 0.4])
    reading = RewardReadout(at="steps", separator="|", aggregate=aggregate)
    found = reading.combine(torch.logit(probabilities)[:, None], [3])
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_readings_are_combined_completion_by_completion() -> None:
    logits = torch.tensor([[0.3], [-2.0], [1.0], [4.0]])
    mean = RewardReadout(at="tokens", aggregate="mean_logit").combine(logits, [3, 1])
    assert mean[:, 0].tolist() == pytest.approx([1 / (1 + math.exp(0.7 / 3)), 1 / (1 + math.exp(-4.0))], rel=1e-6)
    assert RewardReadout(at="tokens", aggregate="product").combine(torch.zeros(0, 1), []).shape == (0, 1)
    # Far from 0 the product stays a number.
    assert RewardReadout(at="tokens", aggregate="product").combine(torch.full((50, 1), -90.0), [50]).item() == 0.0
