"""What every objective starts from and returns: labels read with a clear error, sums that add up over micro-batches and ranks.

Light to import: torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayward.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.data.packing import Labels

METRIC_SUMS = ("pairs", "correct", "tied", "margin", "rewards", "reward", "reward_squared")
"""Sums that every objective reports: pairs with different ranks, how many of them are ordered right, how many have
exactly equal rewards, sum of margins, number of rewards, their sum and sum of squares."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Sums over one micro-batch.

    Attributes:
        loss_sum: fp32 scalar with gradient; 0 (still attached to the graph) for an empty micro-batch.
        metrics: detached fp64 [len(ranking.METRIC_SUMS)].
    """

    loss_sum: Tensor
    metrics: Tensor


def ranks_of(label: Labels, objective: str) -> npt.NDArray[np.float32]:
    """float32 [K] ranks.

    Raises:
        ConfigError: the comparison has none.
    """
    if label.ranks is None:
        raise ConfigError(
            f"objective {objective} received a comparison without a ranking",
            remedy="use data with chosen/rejected or ranks, or an objective that learns from ratings",
        )
    return label.ranks


def ratings_of(labels: Sequence[Labels]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """float32 [N, A] ratings, NaN where missing, and float32 [N] weights.

    Raises:
        ConfigError: a comparison has none.
    """
    import numpy as np

    rows = []
    for label in labels:
        if label.attributes is None:
            raise ConfigError(
                "objective regression received a comparison without ratings", remedy="name the attributes to learn in data.attributes"
            )
        rows.append(label.attributes)
    weights = [np.full(len(row), label.weight, np.float32) for row, label in zip(rows, labels, strict=True)]
    return np.concatenate(rows), np.concatenate(weights)


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
