"""Plackett-Luce: the likelihood of a whole ranking. Torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rayward.errors import ConfigError
from rayward.objectives.base import LabelFacts, ObjectiveOutput, ObjectiveSettings, ranks_of
from rayward.objectives.sums import ranking_sums

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.batch.comparison import Labels


class PlackettLuceObjective(ObjectiveSettings):
    """The likelihood of a whole ranking."""

    type: Literal["plackett_luce"] = "plackett_luce"
    """The method."""
    reduction: Literal["mean_stage", "sum"] = "mean_stage"
    """A ranking's loss: over its stages divided by K - 1, or their sum."""
    ties: Literal["breslow", "drop"] = "breslow"
    """Completions of one rank: each is chosen from all that remain (Breslow), or they are left out of the ranking."""
    top_m: int | None = Field(None, ge=1)
    """Only the first so many stages count (a partial ranking); None: all of them."""

    def check(self, data: LabelFacts) -> None:
        super().check(data)
        if data.num_with_shares:
            raise ConfigError(
                f"objective {self.type} learns an order, and {data.num_with_shares} rows have shares of votes, which it would not read",
                remedy="set data.votes=majority, or use objective.type=bradley_terry",
            )


def plackett_luce(outputs: Tensor, labels: Sequence[Labels], config: PlackettLuceObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """Plackett-Luce: per ranking, sum over stages k of logsumexp(r_k, ..., r_{K-1}) - r_k, best completion first.

    Zhu, Jordan, Jiao 2023 (arXiv 2301.11270); the objective of Starling-RM. With K = 2 it is Bradley-Terry.

    Args:
        outputs: float32 [N, 1].
    """
    import numpy as np
    import torch

    scores = outputs[:, 0]
    metrics = ranking_sums(scores, labels)
    table = stage_table(labels, config.type, ties=config.ties, by_stage=config.reduction == "mean_stage", top_m=config.top_m)
    if table.order.size == 0:
        return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=metrics)

    def put(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(outputs.device)

    present = put(table.order >= 0)
    ranked = scores[put(np.maximum(table.order, 0))].masked_fill(~present, -1e30)  # not -inf: its gradient would be NaN
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)
    terms = remaining.gather(1, put(table.level_start)) - ranked
    loss_sum = (put(table.weight) * terms.masked_fill(~put(table.weight > 0), 0.0)).sum()
    return ObjectiveOutput(loss_sum=loss_sum, metrics=metrics)


def plackett_luce_count(labels: Sequence[Labels], config: PlackettLuceObjective, attributes: tuple[str, ...]) -> float:
    """Summed weights of the rankings that have a stage."""
    import numpy as np

    usable = [label.weight for label in labels if len(ranked_order(ranks_of(label, config.type), config.ties)) > 1]
    return float(np.sum(usable, dtype=np.float64))


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
