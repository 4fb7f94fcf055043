"""What every objective starts from and returns: labels read with a clear error, sums that add up over micro-batches and ranks.

Light to import: torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayward.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.data.packing import Labels
    from rayward.reading import Reading

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


def rewards_of(outputs: Tensor, labels: Sequence[Labels], reading: Reading) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class PairTable:
    """All pairs of a micro-batch: those with rank_i < rank_j, and the ties with i < j.

    Attributes:
        better, worse: int64 [P], positions in the micro-batch.
        weight: float32 [P], share of the comparison's weight.
        margin: float32 [P], 0 for ties; scale: float32 [P].
        flip: float32 [P], probability that the label is wrong; one half for ties.
    """

    better: npt.NDArray[np.int64]
    worse: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    flip: npt.NDArray[np.float32]


def pair_table(
    labels: Sequence[Labels], objective: str, *, by_prompt: bool, margin_of: Callable[[Labels], float], scaled: bool, smoothing: float
) -> PairTable:
    """The pairs of a micro-batch.

    Args:
        objective: name for the error message.
        by_prompt: a comparison's pairs share its weight; else each has all of it.
        margin_of: margin of the pairs of a comparison.
        scaled: scale by the strength.
        smoothing: `flip` of pairs with a winner.
    """
    import numpy as np

    rows: list[npt.NDArray[np.float64]] = []
    offset = 0
    for label in labels:
        ranks = ranks_of(label, objective)
        first, second = np.triu_indices(len(ranks), k=1)
        swap, strict = ranks[first] > ranks[second], ranks[first] != ranks[second]
        rows.append(
            np.stack(
                [
                    np.where(swap, second, first) + offset,
                    np.where(swap, first, second) + offset,
                    np.full(len(first), label.weight / (len(first) if by_prompt else 1)),
                    np.where(strict, margin_of(label), 0.0),
                    np.full(len(first), label.strength if scaled else 1.0),
                    np.where(strict, smoothing, 0.5),
                ]
            )
        )
        offset += len(ranks)
    table = np.concatenate(rows, axis=1) if rows else np.zeros((6, 0))
    return PairTable(*table[:2].astype(np.int64), *table[2:].astype(np.float32))


@dataclass(frozen=True, slots=True)
class StageTable:
    """Rankings of a micro-batch, best completion first; each array is [comparisons, K of the largest].

    Attributes:
        order: int64, position in the micro-batch of the k-th best, -1 where there is none.
        level_start: int64, the place where completions of its rank begin.
        weight: float32, weight of its stage, 0 where there is none.
    """

    order: npt.NDArray[np.int64]
    level_start: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]


def stage_table(labels: Sequence[Labels], objective: str, *, ties: str, by_stage: bool, top_m: int | None) -> StageTable:
    """The stages of a micro-batch's rankings.

    Args:
        objective: name for the error message.
        ties: `drop` leaves completions of equal rank out.
        by_stage: a ranking's K - 1 stages share its weight; else each has all of it.
        top_m: only so many stages count; None: all.
    """
    import numpy as np

    ranks = [ranks_of(label, objective) for label in labels]
    width = max((len(r) for r in ranks), default=0)
    order = np.full((len(labels), width), -1, dtype=np.int64)
    level_start = np.tile(np.arange(width, dtype=np.int64), (len(labels), 1))
    weight = np.zeros((len(labels), width), dtype=np.float32)
    offset = 0
    for row, (label, values) in enumerate(zip(labels, ranks, strict=True)):
        best_first = ranked_order(values, ties)
        size = len(best_first)
        if size > 1:
            ordered = values[best_first]
            starts = np.searchsorted(ordered, ordered, side="left")
            order[row, :size] = best_first + offset
            level_start[row, :size] = starts
            weight[row, :size] = np.where(starts < (top_m or size), label.weight / (size - 1 if by_stage else 1), 0.0)
        offset += len(values)
    return StageTable(order, level_start, weight)


def ranked_order(ranks: npt.NDArray[np.float32], ties: str) -> npt.NDArray[np.int64]:
    """Indices of the completions, best first; with `drop`, without those that share a rank."""
    import numpy as np

    order = np.argsort(ranks, kind="stable").astype(np.int64)
    if ties == "drop":
        values, counts = np.unique(ranks, return_counts=True)
        order = order[np.isin(ranks[order], values[counts == 1])]
    return order
