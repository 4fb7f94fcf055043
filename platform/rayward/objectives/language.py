"""Text alone: the language-model loss without a reward. Torch is loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rayward.objectives.base import LabelFacts, ObjectiveOutput, ObjectiveSettings
from rayward.objectives.sums import ranking_sums

if TYPE_CHECKING:
    from torch import Tensor

    from rayward.batch.comparison import Labels


class LanguageObjective(ObjectiveSettings):
    """Text alone: the language-model loss, no reward (critique SFT, the first stage of arXiv 2408.11791)."""

    type: Literal["language"] = "language"
    """The method."""
    language_coefficient: float = Field(1.0, gt=0.0)
    """Factor of the language-model loss, the mean cross-entropy of its tokens."""
    language_target: Literal["best", "all"] = "all"
    """Whose tokens it covers: the best completions' (all of an unranked comparison), or all completions'."""

    def check(self, data: LabelFacts) -> None:
        """Any text will do."""


def language(outputs: Tensor, labels: Sequence[Labels], config: LanguageObjective, attributes: tuple[str, ...]) -> ObjectiveOutput:
    """No loss of the rewards; their sums are reported all the same.

    Args:
        outputs: float32 [N, 1].
    """
    return ObjectiveOutput(loss_sum=outputs.sum() * 0.0, metrics=ranking_sums(outputs[:, 0], labels))


def language_count(labels: Sequence[Labels], config: LanguageObjective, attributes: tuple[str, ...]) -> float:
    """Summed weights of the comparisons."""
    return float(sum(label.weight for label in labels))
