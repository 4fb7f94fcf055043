"""Objectives of single completions: right or wrong as a whole, step by step, and text alone. Rows of the table in `objectives`.

Torch and numpy are imported inside the functions. Shapes: N completions, R readings of the head, one output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayward.contract.reading import DEFAULT_SEPARATOR, Aggregate, RewardReadout
from rayward.errors import ConfigError
from rayward.objectives.base import LabelFacts, ObjectiveOutput, ObjectiveSettings, ratings_of
from rayward.objectives.sums import ranking_sums, reads_of, rewards_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.batch.comparison import Labels


class OutcomeObjective(ObjectiveSettings):
    """Right or wrong, completion by completion: one label each (format `pointwise`), no comparison needed."""

    type: Literal["outcome"] = "outcome"
    """The method."""
    attribute: str = "label"
    """Attribute of the data that holds the label: 1 right, 0 wrong, between them a probability; missing labels are left out."""
    read: Literal["end", "tokens", "mean_logit"] = "end"
    """The label is learned at the end token, at every token of the completion (mean of their losses), or by the mean of their logits."""
    aggregate: Aggregate = "last"
    """Of `read: tokens`, how the probabilities of the tokens become one reward; `mean_logit` always takes the mean logit."""

    def reading(self, separator: str | None) -> RewardReadout | None:
        if self.read == "end":
            return None
        return RewardReadout(at="tokens", aggregate="mean_logit" if self.read == "mean_logit" else self.aggregate)

    def check(self, data: LabelFacts) -> None:
        if self.attribute not in data.attributes:
            raise ConfigError(
                f"objective outcome learns the attribute {self.attribute!r}; data.attributes is {', '.join(data.attributes) or 'empty'}",
                remedy=f"name it there: data.attributes=[{self.attribute}] data.attribute_range=[0,1]",
            )
        if data.num_unrated:
            raise ConfigError(
                f"objective outcome needs labels; {data.num_unrated} rows have none", remedy="use labelled rows, or another objective"
            )


def outcome(outputs: Tensor, labels: Sequence[Labels], config: OutcomeObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """Cross-entropy of sigmoid(r) against the label (outcome reward, arXiv 2110.14168 and 2305.20050).

    r is read at the end; or at every token, and the losses of a completion's tokens are averaged, so that a long completion weighs no
    more than a short one; or it is the mean logit of the tokens.

    Args:
        outputs: float32 [R, 1].
    """
    import numpy as np
    import torch

    reading = config.reading(None)
    metrics = ranking_sums(outputs[:, 0] if reading is None else rewards_of(outputs.detach(), labels, reading), labels)
    if not labels:
        return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=metrics)
    ratings, weight = ratings_of(labels)
    target = ratings[:, attributes.index(config.attribute)]
    num_reads = np.array(reads_of(labels))
    logits = outputs[:, 0]
    if config.read == "mean_logit":
        logits = torch.stack([part.mean() for part in torch.split(logits, num_reads.tolist())])
        num_reads = np.ones_like(num_reads)
    share = np.repeat(weight / num_reads, num_reads).astype(np.float32)
    return ObjectiveOutput(loss_sum=_cross_entropy(logits, np.repeat(target, num_reads), share), metrics=metrics)


def outcome_count(labels: Sequence[Labels], config: OutcomeObjective, attributes: tuple[str, ...]) -> float:
    """Number of labels, weighted by their comparisons."""
    if not labels:
        return 0.0
    import numpy as np

    ratings, weight = ratings_of(labels)
    known = ~np.isnan(ratings[:, attributes.index(config.attribute)])
    return float(weight[known].sum(dtype=np.float64))


class ProcessObjective(ObjectiveSettings):
    """Right or wrong, step by step (format `stepwise`): the head is read at the last token of every step."""

    type: Literal["process"] = "process"
    """The method."""
    aggregate: Aggregate = "minimum"
    """How the probabilities of the steps become the reward of a completion."""

    def reading(self, separator: str | None) -> RewardReadout:
        return RewardReadout(at="steps", separator=separator or DEFAULT_SEPARATOR, aggregate=self.aggregate)

    def check(self, data: LabelFacts) -> None:
        if data.num_without_steps:
            raise ConfigError(
                f"objective process needs a label for every step; {data.num_without_steps} rows have none",
                remedy="use data of format stepwise, or objective.type=outcome",
            )


def process(outputs: Tensor, labels: Sequence[Labels], config: ProcessObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """Cross-entropy of sigmoid(r) against the label of each step; unlabelled steps are left out (process reward, arXiv 2305.20050).

    Every labelled step has the weight of its comparison, so a completion weighs by its steps.

    Args:
        outputs: float32 [R, 1], step by step.
    """
    import numpy as np

    metrics = ranking_sums(rewards_of(outputs.detach(), labels, config.reading(None)), labels)
    if not labels:
        return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=metrics)
    target, weight = _steps(labels)
    return ObjectiveOutput(loss_sum=_cross_entropy(outputs[:, 0], target, weight.astype(np.float32)), metrics=metrics)


def process_count(labels: Sequence[Labels], config: ProcessObjective, attributes: tuple[str, ...]) -> float:
    """Number of labelled steps, weighted by their comparisons."""
    if not labels:
        return 0.0
    import numpy as np

    target, weight = _steps(labels)
    return float(weight[~np.isnan(target)].sum(dtype=np.float64))


def _steps(labels: Sequence[Labels]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    import numpy as np

    rows: list[npt.NDArray[np.float32]] = []
    weights: list[npt.NDArray[np.float64]] = []
    for label in labels:
        if label.step_labels is None:
            raise ConfigError("objective process received a comparison without labels of steps", remedy="use data of format stepwise")
        rows += label.step_labels
        weights += [np.full(len(row), label.weight) for row in label.step_labels]
    return np.concatenate(rows), np.concatenate(weights)


def _cross_entropy(logits: Tensor, target: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> Tensor:
    # Weighted sum; missing targets (NaN) are left out before anything is computed of them.
    import numpy as np
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    known = np.flatnonzero(~np.isnan(target))

    def put(values: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values[known]).to(logits.device)

    judged = binary_cross_entropy_with_logits(logits[torch.from_numpy(known)], put(target), reduction="none")
    return (put(weight) * judged).sum()
