"""Objectives: pure functions from the rewards and labels of one micro-batch to a loss sum and its count.

An objective returns sums; the loop divides by the count over the whole optimizer step and all ranks, so neither the
micro-batches nor the workers can change the loss. `OBJECTIVES` is the one table.

Shapes: N completions in the micro-batch, comparison by comparison; A outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rayward.config import BradleyTerryObjective
from rayward.data.packing import Labels
from rayward.errors import ConfigError

METRIC_SUMS = ("pairs", "correct", "tied", "margin", "rewards", "reward", "reward_squared")
"""Sums that every ranking objective reports: pairs with different ranks, how many of them are ordered right, how many have
exactly equal rewards, sum of margins, number of rewards, their sum and sum of squares."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Sums over one micro-batch.

    Attributes:
        loss_sum: fp32 scalar with gradient; 0 (still attached to the graph) for an empty micro-batch.
        metrics: detached fp64 [len(METRIC_SUMS)].
    """

    loss_sum: Tensor
    metrics: Tensor


def bradley_terry(rewards: Tensor, labels: Sequence[Labels], config: BradleyTerryObjective) -> ObjectiveOutput:
    """Bradley-Terry over all pairs of each comparison.

    Per pair with d = r_better - r_worse - margin: (1 - e) softplus(-d) + e softplus(d), softplus(-d) = -log sigmoid(d)
    (Askell et al. 2021, arXiv 2112.00861, eq. 3.1; margin: arXiv 2307.09288, section 3.2.2, used when the data has one).
    A tie trains towards probability one half: (softplus(d) + softplus(-d)) / 2. With K > 2 the pairs of a comparison are
    averaged (arXiv 2203.02155, eq. 1) or, with balance="pair", summed.

    Args:
        rewards: float32 [N, 1].
    """
    table = _pair_table(labels, config)
    scores = rewards[:, 0]
    if len(table.better) == 0:
        return ObjectiveOutput(loss_sum=rewards.sum() * 0.0, metrics=_ranking_metrics(scores, None, table))
    device = rewards.device
    better = torch.from_numpy(table.better).to(device)
    worse = torch.from_numpy(table.worse).to(device)
    weight = torch.from_numpy(table.weight).to(device)
    gap = scores[better] - scores[worse]
    shifted = gap - torch.from_numpy(table.margin).to(device)
    flip = torch.from_numpy(table.flip).to(device)
    loss = (1.0 - flip) * softplus(-shifted) + flip * softplus(shifted)
    if config.center_coefficient:
        loss = loss + config.center_coefficient * (scores[better] + scores[worse]) ** 2
    return ObjectiveOutput(loss_sum=(weight * loss).sum(), metrics=_ranking_metrics(scores, gap, table))


def bradley_terry_count(labels: Sequence[Labels], config: BradleyTerryObjective) -> float:
    """What the loss sum is divided by: the summed weights of the comparisons (or of their pairs)."""
    return float(_pair_table(labels, config).weight.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class _PairTable:
    better: np.ndarray[Any, np.dtype[np.int64]]
    worse: np.ndarray[Any, np.dtype[np.int64]]
    weight: np.ndarray[Any, np.dtype[np.float32]]
    margin: np.ndarray[Any, np.dtype[np.float32]]
    flip: np.ndarray[Any, np.dtype[np.float32]]
    strict: np.ndarray[Any, np.dtype[np.bool_]]


def _pair_table(labels: Sequence[Labels], config: BradleyTerryObjective) -> _PairTable:
    # Pairs (i, j) with rank_i < rank_j, and the ties with i < j, as positions in the micro-batch.
    better: list[int] = []
    worse: list[int] = []
    weight: list[float] = []
    margin: list[float] = []
    strict: list[bool] = []
    offset = 0
    for label in labels:
        ranks = _ranks(label)
        first, second = np.triu_indices(len(ranks), k=1)
        swap = ranks[first] > ranks[second]
        better += (np.where(swap, second, first) + offset).tolist()
        worse += (np.where(swap, first, second) + offset).tolist()
        strict += (ranks[first] != ranks[second]).tolist()
        share = label.weight / (len(first) if config.balance == "prompt" else 1)
        weight += [share] * len(first)
        margin += [0.0 if np.isnan(label.margin) else label.margin] * len(first)
        offset += len(ranks)
    is_strict = np.array(strict, dtype=np.bool_)
    return _PairTable(
        better=np.array(better, dtype=np.int64),
        worse=np.array(worse, dtype=np.int64),
        weight=np.array(weight, dtype=np.float32),
        margin=np.where(is_strict, np.array(margin, dtype=np.float32), np.float32(0)),
        flip=np.where(is_strict, np.float32(config.label_smoothing), np.float32(0.5)).astype(np.float32),
        strict=is_strict,
    )


def _ranks(label: Labels) -> np.ndarray[Any, np.dtype[np.float32]]:
    if label.ranks is None:
        raise ConfigError(
            "objective bradley_terry received a comparison without a ranking",
            remedy="use data with chosen/rejected or ranks, or an objective that learns from ratings",
        )
    return label.ranks


def _ranking_metrics(scores: Tensor, gap: Tensor | None, table: _PairTable) -> Tensor:
    with torch.no_grad():
        wide = scores.double()
        if gap is None:
            pair_sums = [torch.zeros((), dtype=torch.float64, device=scores.device)] * 4
        else:
            strict = torch.from_numpy(table.strict).to(scores.device)
            judged = gap[strict].double()
            pair_sums = [strict.sum().double(), (judged > 0).sum().double(), (judged == 0).sum().double(), judged.sum()]
        count = torch.tensor(float(len(scores)), dtype=torch.float64, device=scores.device)
        return torch.stack([*pair_sums, count, wide.sum(), (wide * wide).sum()])


LossFunction = Callable[[Tensor, Sequence[Labels], Any], ObjectiveOutput]
CountFunction = Callable[[Sequence[Labels], Any], float]

OBJECTIVES: dict[str, tuple[LossFunction, CountFunction]] = {
    "bradley_terry": (bradley_terry, bradley_terry_count),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective with its settings bound."""

    config: BradleyTerryObjective

    def loss(self, rewards: Tensor, labels: Sequence[Labels]) -> ObjectiveOutput:
        return OBJECTIVES[self.config.type][0](rewards, labels, self.config)

    def count(self, labels: Sequence[Labels]) -> float:
        return OBJECTIVES[self.config.type][1](labels, self.config)


def ranking_metrics(sums: Sequence[float]) -> dict[str, float]:
    """Turn summed `METRIC_SUMS` into accuracy, margin, reward mean and spread (population standard deviation)."""
    named = dict(zip(METRIC_SUMS, sums, strict=True))
    pairs, rewards = max(named["pairs"], 1.0), max(named["rewards"], 1.0)
    mean = named["reward"] / rewards
    return {
        "accuracy": named["correct"] / pairs,
        "tied": named["tied"] / pairs,
        "margin": named["margin"] / pairs,
        "reward_mean": mean,
        "reward_std": max(named["reward_squared"] / rewards - mean * mean, 0.0) ** 0.5,
    }
