"""What every block of the configuration is, and what every objective adds to it. Light: no torch, no numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from rayward.errors import ConfigError
from rayward.reading import Place, Reading, place_of

Normalise: TypeAlias = Literal["raw", "centred", "standardised"]
"""What a request may ask for: the reward as it is, minus the reference mean, or that divided by the reference deviation."""

WEIGHT_SETS: dict[str, dict[str, float]] = {
    "helpsteer2_llama3_70b": {"helpfulness": 0.65, "correctness": 0.80, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.40},
    "helpsteer2_nemotron4_340b": {"helpfulness": 0.30, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33},
    "helpsteer2_goodness": {"helpfulness": 0.65, "correctness": 0.80, "coherence": 0.45},
}
"""Published ways to make one reward of HelpSteer2's attributes (arXiv 2406.08673). The first two were searched on RewardBench: a
RewardBench figure that uses them is tuned on the benchmark. The third is the one that selects data and rewards the policy there."""


class Section(BaseModel):
    """One block of a YAML file. Every field carries its documentation in the string under it; units and scope are in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """What prepared data says about its labels, over both splits.

    Attributes:
        attributes: names, as in `data.attributes`.
        num_unranked: comparisons without ranks.
        num_unrated: comparisons without a single rating.
        num_without_strength: comparisons without a strength.
        num_without_steps: comparisons without labels of steps.
        weakest, strongest: range of the strengths, None without any.
    """

    attributes: tuple[str, ...] = ()
    num_unranked: int = 0
    num_unrated: int = 0
    num_without_strength: int = 0
    num_without_steps: int = 0
    weakest: float | None = None
    strongest: float | None = None


class ObjectiveSection(Section):
    """Settings that every objective has; each method adds its own."""

    type: str
    """Name in the table of objectives."""
    language_coefficient: float = Field(0.0, ge=0.0)
    """Adds this times the language-model loss, the mean cross-entropy of the taught tokens (arXiv 2112.00861; critiques: 2408.11791)."""
    language_target: Literal["best", "all"] = "best"
    """Whose tokens are taught: the best completions' (all of an unranked comparison), or all completions'."""

    def outputs(self, attributes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the head's outputs, given the attributes that the data carries (`data.attributes`)."""
        return ("reward",)

    def reward_weights(self, outputs: tuple[str, ...]) -> tuple[float, ...]:
        """How the outputs become one reward: its weights, in the order of the outputs."""
        return (1.0,) * len(outputs)

    @property
    def place(self) -> Place:
        """Where the head is read."""
        return place_of(self.reading(None))

    def reading(self, separator: str | None) -> Reading | None:
        """How readings at several places become one reward; None where the head is read at the end alone."""
        return None

    def check(self, data: LabelFacts) -> None:
        """Compare the settings with what the prepared data knows.

        Raises:
            ConfigError: the data cannot teach this objective.
        """
        if data.num_unranked:
            raise ConfigError(
                f"objective {self.type} learns from rankings; {data.num_unranked} rows have none",
                remedy="use data with chosen/rejected or ranks, set data.rank_by to an attribute, or use objective.type=regression",
            )


def weight_set(name: str) -> Mapping[str, float]:
    """A published set of weights.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in WEIGHT_SETS:
        raise ConfigError(
            f"weight set {name!r} is not known", remedy=f"use one of {', '.join(WEIGHT_SETS)}, or give the weights themselves"
        )
    return WEIGHT_SETS[name]
