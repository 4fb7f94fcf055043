"""Regression to ratings of attributes. Torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayward.contract.weight_sets import weight_set
from rayward.errors import ConfigError
from rayward.objectives.base import LabelFacts, ObjectiveOutput, ObjectiveSettings, ratings_of
from rayward.objectives.sums import ranking_sums

if TYPE_CHECKING:
    from torch import Tensor

    from rayward.batch.comparison import Labels


class RegressionObjective(ObjectiveSettings):
    """Ratings of attributes, one output of the head for each name in `data.attributes`."""

    type: Literal["regression"] = "regression"
    """The method."""
    weights: str | dict[str, float] | None = None
    """How the attributes become one reward: a published set by name, a mapping from attribute to weight, or None for their mean."""

    def outputs(self, attributes: tuple[str, ...]) -> tuple[str, ...]:
        return attributes

    def reward_weights(self, outputs: tuple[str, ...]) -> tuple[float, ...]:
        if self.weights is None:
            return (1.0 / len(outputs),) * len(outputs)
        named = weight_set(self.weights) if isinstance(self.weights, str) else self.weights
        unknown = sorted(set(named) - set(outputs))
        if unknown:
            raise ConfigError(
                f"objective.weights names {', '.join(unknown)}; the attributes are {', '.join(outputs) or 'none'}",
                remedy="add them to data.attributes, or choose other weights",
            )
        return tuple(float(named.get(name, 0.0)) for name in outputs)

    def check(self, data: LabelFacts) -> None:
        if not data.attributes:
            raise ConfigError(
                "objective regression needs ratings and data.attributes is empty",
                remedy="name the attributes to learn, for example data.attributes=[helpfulness,correctness]",
            )
        if data.num_unrated:
            raise ConfigError(
                f"objective regression needs ratings; {data.num_unrated} rows have none of {', '.join(data.attributes)}",
                remedy="use rated data only, or an objective that learns from rankings",
            )
        self.reward_weights(self.outputs(data.attributes))


def regression(outputs: Tensor, labels: Sequence[Labels], config: RegressionObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """Masked squared error: sum over the given ratings of (prediction - rating)^2; missing ratings are left out of sum and count.

    HelpSteer2 and Nemotron-4-340B-Reward (arXiv 2406.08673, 2406.11704), divided by the count of the whole step, not micro-batch
    by micro-batch.

    Args:
        outputs: float32 [N, A].
    """
    import numpy as np
    import torch

    weights = torch.tensor(config.reward_weights(attributes), dtype=torch.float32, device=outputs.device)
    metrics = ranking_sums((outputs.detach() @ weights), labels)
    if not labels:
        return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=metrics)
    ratings, weight = ratings_of(labels)
    # Masked before the difference: NaN times 0 is NaN.
    known = torch.from_numpy(~np.isnan(ratings)).to(outputs.device)
    target = torch.from_numpy(np.nan_to_num(ratings, nan=0.0)).to(outputs.device)
    error = torch.where(known, outputs - target, torch.zeros_like(outputs))
    return ObjectiveOutput(loss_sum=(torch.from_numpy(weight).to(outputs.device)[:, None] * error**2).sum(), metrics=metrics)


def regression_count(labels: Sequence[Labels], config: RegressionObjective, attributes: tuple[str, ...]) -> float:
    """Number of given ratings, weighted by their comparisons."""
    import numpy as np

    if not labels:
        return 0.0
    ratings, weight = ratings_of(labels)
    return float((~np.isnan(ratings) * weight[:, None].astype(np.float64)).sum())
