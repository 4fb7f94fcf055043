"""Objectives: pure functions from the outputs and labels of one micro-batch to a loss sum, its count and metric sums.

An objective returns sums; the loop divides by the count over the whole optimizer step and all ranks, so neither the
micro-batches nor the workers can change the loss. `OBJECTIVES` is the one table: a method is a settings class and two functions, and
nothing else in the project names it. Torch and numpy are imported inside the functions, because the configuration reads this table.

Shapes: N completions in the micro-batch, comparison by comparison; K completions of one comparison; A outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rayward.correctness import (
    LanguageObjective,
    OutcomeObjective,
    ProcessObjective,
    language,
    language_count,
    outcome,
    outcome_count,
    process,
    process_count,
)
from rayward.errors import ConfigError
from rayward.ranking import ObjectiveOutput, PairTable, pair_table, ranked_order, ranking_sums, ranks_of, ratings_of, stage_table
from rayward.section import LabelFacts, ObjectiveSection, weight_set

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.data.packing import Labels, PackedBatch, TaughtTokens

MARGIN_LEVELS = 3.0
"""Largest strength of a preference in Llama 2's and HelpSteer2's scales: significantly (3), better (2), slightly (1), negligibly (0)."""


# ---- Bradley-Terry: regular, margin, scaled; all pairs of a ranking -----------------------------------------------


class BradleyTerryObjective(ObjectiveSection):
    """Pairs, or all pairs of a ranking."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """The method."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Probability that a label is wrong: (1-e) softplus(-d) + e softplus(d)."""
    center_coefficient: float = Field(0.0, ge=0.0)
    """Adds c (r_chosen + r_rejected)^2 per pair (arXiv 2312.09244)."""
    balance: Literal["prompt", "pair"] = "prompt"
    """Weight of one K > 2 ranking: that of one comparison (arXiv 2203.02155 eq. 1) or that of each of its pairs (MLE_2 of 2301.11270)."""
    margin: Literal["none", "column", "strength", "small", "large"] = "column"
    """Gap asked for: the row's `margin`, its strength, or by strength Llama 2's small (0, 1/3, 2/3, 1) or large (0, 1, 2, 3) table."""
    scale: Literal["none", "strength"] = "none"
    """`strength` multiplies the loss of a pair by its strength: scaled Bradley-Terry (arXiv 2410.01257)."""
    safety_coefficient: float = Field(0.0, ge=0.0)
    """Weight of Llama 2's auxiliary loss, the cross-entropy of sigmoid(reward) against `safety_attribute` (arXiv 2307.09288)."""
    safety_attribute: str = "is_safe"
    """Attribute of the data that says whether a completion is safe: 1, 0, or missing."""

    def check(self, data: LabelFacts) -> None:
        super().check(data)
        by_strength = [f"objective.margin={self.margin}"] if self.margin in ("strength", "small", "large") else []
        by_strength += ["objective.scale=strength"] if self.scale == "strength" else []
        if by_strength and data.num_without_strength:
            raise ConfigError(
                f"{by_strength[0]} needs the strength of every preference; {data.num_without_strength} rows have none",
                remedy="use data with strengths (HelpSteer, `strength` column, scores), or objective.margin=none and objective.scale=none",
            )
        if self.margin in ("small", "large") and data.strongest is not None and data.strongest > MARGIN_LEVELS:
            raise ConfigError(
                f"objective.margin={self.margin} reads strengths 0 to 3; the data has {data.strongest:g}",
                remedy="use objective.margin=strength, or bring the strengths to that scale",
            )
        if self.scale == "strength" and data.weakest == 0:
            raise ConfigError(
                "objective.scale=strength and a row of strength 0: its loss is 0, so it teaches nothing",
                remedy="set data.ties=quarantine, or remove the rows of strength 0",
            )
        if self.safety_coefficient and self.safety_attribute not in data.attributes:
            raise ConfigError(
                f"objective.safety_coefficient is {self.safety_coefficient:g} and the data has no attribute {self.safety_attribute!r} "
                f"(data.attributes: {', '.join(data.attributes) or 'none'})",
                remedy="name it in data.attributes, or set objective.safety_coefficient=0",
            )


def bradley_terry(outputs: Tensor, labels: Sequence[Labels], config: BradleyTerryObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """Bradley-Terry over all pairs of each comparison.

    Per pair with d = r_better - r_worse - margin: (1 - e) softplus(-d) + e softplus(d), softplus(-d) = -log sigmoid(d)
    (Askell et al. 2021, arXiv 2112.00861, eq. 3.1; margin: arXiv 2307.09288, section 3.2.2; times the strength: arXiv 2410.01257).
    A tie trains towards probability one half: (softplus(d) + softplus(-d)) / 2. With K > 2 the pairs of a comparison are
    averaged (arXiv 2203.02155, eq. 1) or, with balance="pair", summed. The safety term's formula is not printed in the paper; this is
    its usual reading: the mean over the rated completions of a comparison.

    Args:
        outputs: float32 [N, 1].
    """
    import numpy as np
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, softplus

    table = _pair_table(labels, config)
    scores = outputs[:, 0]
    metrics = ranking_sums(scores, labels)
    if len(table.better) == 0:
        return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=metrics)

    def put(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(outputs.device)

    better, worse, flip = put(table.better), put(table.worse), put(table.flip)
    shifted = scores[better] - scores[worse] - put(table.margin)
    loss = ((1.0 - flip) * softplus(-shifted) + flip * softplus(shifted)) * put(table.scale)
    if config.center_coefficient:
        loss = loss + config.center_coefficient * (scores[better] + scores[worse]) ** 2
    loss_sum = (put(table.weight) * loss).sum()
    if config.safety_coefficient:
        is_safe, share = _safety(labels, attributes.index(config.safety_attribute), config)
        rated = put(np.flatnonzero(share > 0))
        judged = binary_cross_entropy_with_logits(scores[rated], put(is_safe)[rated], reduction="none")
        loss_sum = loss_sum + config.safety_coefficient * (put(share)[rated] * judged).sum()
    return ObjectiveOutput(loss_sum=loss_sum, metrics=metrics)


def bradley_terry_count(labels: Sequence[Labels], config: BradleyTerryObjective, attributes: tuple[str, ...]) -> float:
    """What the loss sum is divided by: the summed weights of the comparisons (or of their pairs)."""
    import numpy as np

    return float(_pair_table(labels, config).weight.sum(dtype=np.float64))


def _pair_table(labels: Sequence[Labels], config: BradleyTerryObjective) -> PairTable:
    def margin_of(label: Labels) -> float:
        if config.margin in ("none", "column"):
            return label.margin if config.margin == "column" and label.margin == label.margin else 0.0  # not NaN
        return label.strength / (MARGIN_LEVELS if config.margin == "small" else 1.0)

    return pair_table(
        labels,
        config.type,
        by_prompt=config.balance == "prompt",
        margin_of=margin_of,
        scaled=config.scale == "strength",
        smoothing=config.label_smoothing,
    )


def _safety(
    labels: Sequence[Labels], column: int, config: BradleyTerryObjective
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    # Target of each completion and its share of the comparison's weight; 0 where it has no rating.
    import numpy as np

    targets: list[npt.NDArray[np.float32]] = []
    shares: list[npt.NDArray[np.float32]] = []
    for label in labels:
        num_completions = len(ranks_of(label, config.type))
        rated = np.full(num_completions, np.nan, np.float32) if label.attributes is None else label.attributes[:, column]
        known = ~np.isnan(rated)
        weight = label.weight * (1 if config.balance == "prompt" else num_completions * (num_completions - 1) / 2)
        targets.append(np.where(known, rated, 0).astype(np.float32))
        shares.append((known * (weight / max(int(known.sum()), 1))).astype(np.float32))
    return np.concatenate(targets), np.concatenate(shares)


# ---- K-wise: Plackett-Luce ----------------------------------------------------------------------------------------


class PlackettLuceObjective(ObjectiveSection):
    """The likelihood of a whole ranking."""

    type: Literal["plackett_luce"] = "plackett_luce"
    """The method."""
    reduction: Literal["mean_stage", "sum"] = "mean_stage"
    """A ranking's loss: over its stages divided by K - 1, or their sum."""
    ties: Literal["breslow", "drop"] = "breslow"
    """Completions of one rank: each is chosen from all that remain (Breslow), or they are left out of the ranking."""
    top_m: int | None = Field(None, ge=1)
    """Only the first so many stages count (a partial ranking); None: all of them."""


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


class RegressionObjective(ObjectiveSection):
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


# ---- the table ----------------------------------------------------------------------------------------------------


LossFunction = Callable[["Tensor", Sequence["Labels"], Any, tuple[str, ...]], ObjectiveOutput]
CountFunction = Callable[[Sequence["Labels"], Any, tuple[str, ...]], float]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        settings: the `objective:` block of the configuration.
        loss: sums over a micro-batch from its outputs.
        count: what the loss sum of a micro-batch contributes to the divisor; from the labels alone, because the loop needs it first.
    """

    settings: type[ObjectiveSection]
    loss: LossFunction
    count: CountFunction


OBJECTIVES: dict[str, Method] = {
    "bradley_terry": Method(BradleyTerryObjective, bradley_terry, bradley_terry_count),
    "plackett_luce": Method(PlackettLuceObjective, plackett_luce, plackett_luce_count),
    "regression": Method(RegressionObjective, regression, regression_count),
    "outcome": Method(OutcomeObjective, outcome, outcome_count),
    "process": Method(ProcessObjective, process, process_count),
    "language": Method(LanguageObjective, language, language_count),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective with its settings bound.

    Attributes:
        attributes: names of the columns of `Labels.attributes`.
    """

    config: ObjectiveSection
    attributes: tuple[str, ...] = ()

    def loss(self, outputs: Tensor, labels: Sequence[Labels]) -> ObjectiveOutput:
        return OBJECTIVES[self.config.type].loss(outputs, labels, self.config, self.attributes)

    def count(self, labels: Sequence[Labels]) -> float:
        return OBJECTIVES[self.config.type].count(labels, self.config, self.attributes)

    def taught(self, batch: PackedBatch) -> TaughtTokens | None:
        """The tokens of the language-model loss; None where the settings have none."""
        from rayward.data.packing import taught_tokens

        return taught_tokens(batch, self.config.language_target) if self.config.language_coefficient else None
