"""Objectives: pure functions from the outputs and labels of one micro-batch to a loss sum, its count and metric sums.

An objective returns sums; the loop divides by the count over the whole optimizer step and all ranks, so neither the
micro-batches nor the workers can change the loss. `OBJECTIVES` is the one table: a method is a settings class and two functions, and
nothing else in the project names it. Torch and numpy are imported inside the functions, because the configuration reads this table.

Shapes: N completions in the micro-batch, comparison by comparison; K completions of one comparison; A outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayward.objectives.base import ObjectiveOutput, ObjectiveSettings
from rayward.objectives.correctness import OutcomeObjective, ProcessObjective, outcome, outcome_count, process, process_count
from rayward.objectives.language import LanguageObjective, language, language_count
from rayward.objectives.pairs import BradleyTerryObjective, bradley_terry, bradley_terry_count
from rayward.objectives.rankings import PlackettLuceObjective, plackett_luce, plackett_luce_count
from rayward.objectives.ratings import RegressionObjective, regression, regression_count

if TYPE_CHECKING:
    from torch import Tensor

    from rayward.batch.comparison import Labels
    from rayward.batch.layout import LanguageLossTokens, PackedBatch

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

    settings: type[ObjectiveSettings]
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

    config: ObjectiveSettings
    attributes: tuple[str, ...] = ()

    def loss(self, outputs: Tensor, labels: Sequence[Labels]) -> ObjectiveOutput:
        return OBJECTIVES[self.config.type].loss(outputs, labels, self.config, self.attributes)

    def count(self, labels: Sequence[Labels]) -> float:
        return OBJECTIVES[self.config.type].count(labels, self.config, self.attributes)

    def language_tokens(self, batch: PackedBatch) -> LanguageLossTokens | None:
        """The tokens of the language-model loss; None where the settings have none."""
        from rayward.batch.layout import language_loss_tokens

        return language_loss_tokens(batch, self.config.language_target) if self.config.language_coefficient else None
