"""Sums of the rewards of a micro-batch that add up over micro-batches and ranks. Torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rayward.batch.comparison import Labels
    from rayward.contract.reading import RewardReadout


METRIC_SUMS = ("pairs", "correct", "tied", "margin", "rewards", "reward", "reward_squared")
"""Sums that every objective reports: pairs with different ranks, how many of them are ordered right, how many have
exactly equal rewards, sum of margins, number of rewards, their sum and sum of squares."""


def rewards_of(outputs: Tensor, labels: Sequence[Labels], reading: RewardReadout) -> Tensor:
    """Rewards [N] of an objective that reads several outputs a completion, [R, 1]."""
    return reading.combine(outputs, reads_of(labels))[:, 0]


def reads_of(labels: Sequence[Labels]) -> list[int]:
    """How many outputs each completion has."""
    return [count for label in labels for count in label.num_reads or (1,) * label.num_completions]


def ranking_sums(scores: Tensor, labels: Sequence[Labels]) -> Tensor:
    """`METRIC_SUMS` of the rewards [N] of a micro-batch; comparisons without ranks have no pairs. Detached fp64."""
    import numpy as np
    import torch

    better: list[int] = []
    worse: list[int] = []
    offset = 0
    for label in labels:
        if label.ranks is not None:
            first, second = np.nonzero(label.ranks[:, None] < label.ranks[None, :])
            better += (first + offset).tolist()
            worse += (second + offset).tolist()
        offset += label.num_completions
    with torch.no_grad():
        wide = scores.detach().double()
        gap = wide[torch.tensor(better, dtype=torch.int64)] - wide[torch.tensor(worse, dtype=torch.int64)]
        counts = [float(len(better)), float((gap > 0).sum()), float((gap == 0).sum()), float(gap.sum()), float(len(scores))]
        head = torch.tensor(counts, dtype=torch.float64, device=scores.device)
        return torch.cat([head, torch.stack([wide.sum(), (wide * wide).sum()])])


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
