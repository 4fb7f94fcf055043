"""Bradley-Terry: pairs, or all pairs of a ranking. Torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

MARGIN_LEVELS = 3.0
"""Largest strength of a preference in Llama 2's and HelpSteer2's scales: significantly (3), better (2), slightly (1), negligibly (0)."""


class BradleyTerryObjective(ObjectiveSettings):
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
    A tie trains towards probability one half: (softplus(d) + softplus(-d)) / 2. Where p of the votes are for the better one, the target
    is p: p softplus(-d) + (1 - p) softplus(d), and with smoothing e each vote is wrong with probability e: p (1 - e) + (1 - p) e.
    With K > 2 the pairs of a comparison are averaged (arXiv 2203.02155, eq. 1) or, with balance="pair", summed. The safety term's formula
    is not printed in the paper; this is its usual reading: the mean over the rated completions of a comparison.

    Args:
        outputs: float32 [N, 1].
    """
    import numpy as np
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, softplus

    table = pairs_of(labels, config)
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

    return float(pairs_of(labels, config).weight.sum(dtype=np.float64))


def pairs_of(labels: Sequence[Labels], config: BradleyTerryObjective) -> PairTable:
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


@dataclass(frozen=True, slots=True)
class PairTable:
    """All pairs of a micro-batch: those with rank_i < rank_j, and the ties with i < j.

    Attributes:
        better, worse: int64 [P], positions in the micro-batch.
        weight: float32 [P], share of the comparison's weight.
        margin: float32 [P], 0 for ties; scale: float32 [P].
        flip: float32 [P], probability that the label is wrong: by smoothing and, where votes were counted, their share for the worse
            one; one half for ties.
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
        smoothing: probability that one judgement is wrong; `flip` of pairs with a winner and no votes.
    """
    import numpy as np

    rows: list[npt.NDArray[np.float64]] = []
    offset = 0
    for label in labels:
        ranks = ranks_of(label, objective)
        first, second = np.triu_indices(len(ranks), k=1)
        swap, strict = ranks[first] > ranks[second], ranks[first] != ranks[second]
        against = np.where(strict, 0.0, 0.5)
        if label.vote_shares is not None:
            shares = label.vote_shares.astype(np.float64)
            against = np.where(swap, shares, 1.0 - shares)
        rows.append(
            np.stack(
                [
                    np.where(swap, second, first) + offset,
                    np.where(swap, first, second) + offset,
                    np.full(len(first), label.weight / (len(first) if by_prompt else 1)),
                    np.where(strict, margin_of(label), 0.0),
                    np.full(len(first), label.strength if scaled else 1.0),
                    against * (1.0 - smoothing) + (1.0 - against) * smoothing,
                ]
            )
        )
        offset += len(ranks)
    table = np.concatenate(rows, axis=1) if rows else np.zeros((6, 0))
    return PairTable(*table[:2].astype(np.int64), *table[2:].astype(np.float32))
