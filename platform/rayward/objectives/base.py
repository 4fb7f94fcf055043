"""What every objective starts from and returns: its settings, facts about labels, labels read with a clear error.

Light to import: torch and numpy are loaded by the functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rayward.contract.reading import Place, RewardReadout, place_of
from rayward.errors import ConfigError
from rayward.schema import Frozen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from rayward.batch.comparison import Labels
    from rayward.contract.reading import RewardReadout


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """What prepared data says about its labels, over both splits.

    Attributes:
        attributes: names, as in `data.attributes`.
        num_unranked: comparisons without ranks.
        num_unrated: comparisons without a single rating.
        num_without_strength: comparisons without a strength.
        num_without_steps: comparisons without labels of steps.
        num_with_shares: comparisons with shares of votes (`data.votes=soft`).
        missing: by label (columns of the prepared rows), comparisons in which it is unknown; a label that is always known is not in it.
        weakest, strongest: range of the strengths, None without any.
    """

    attributes: tuple[str, ...] = ()
    num_unranked: int = 0
    num_unrated: int = 0
    num_without_strength: int = 0
    num_without_steps: int = 0
    num_with_shares: int = 0
    weakest: float | None = None
    strongest: float | None = None
    missing: Mapping[str, int] = field(default_factory=dict)


class ObjectiveSettings(Frozen):
    """Settings that every objective has; each method adds its own."""

    type: str
    """Name in the table of objectives."""
    language_coefficient: float = Field(0.0, ge=0.0)
    """Adds this times the language-model loss, the mean cross-entropy of its tokens (arXiv 2112.00861; critiques: 2408.11791)."""
    language_target: Literal["best", "all"] = "best"
    """Whose tokens it covers: the best completions' (all of an unranked comparison), or all completions'."""

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

    def reading(self, separator: str | None) -> RewardReadout | None:
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
