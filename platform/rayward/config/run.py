"""Typed configuration: YAML files plus dotted overrides, resolved once, before anything heavy is imported.

Unknown keys, wrong types and contradictions raise `ConfigError` naming key, value, rule and remedy. Every field is
documented by the string under it; units and scope are in the names. No torch, Ray or DeepSpeed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from rayward.config.data import DataConfig
from rayward.config.model import ModelConfig
from rayward.config.training import CheckpointConfig, TrackingConfig, TrainingConfig
from rayward.objectives.base import ObjectiveSettings
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import OBJECTIVES
from rayward.schema import Frozen


class RunConfig(Frozen):
    name: str = Field("rayward", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A new driver with the same name and storage path continues the run."""
    storage_path: str = "runs"
    """Directory or URI (s3://…, gs://…, any scheme of fsspec) for prepared data, checkpoints, logs and exports."""
    seed: int = Field(0, ge=0)
    """Seeds weight initialisation, the data order and the split."""


def _objective(value: Any) -> Any:
    # The block's own schema is the table's row of its type: a new method needs no change here.
    if not isinstance(value, Mapping):
        return value
    name = value.get("type", DEFAULT_OBJECTIVE.type)
    if name not in OBJECTIVES:
        raise ValueError(f"objective.type is {name!r}; the rule is one of {', '.join(OBJECTIVES)}; correct it")
    return OBJECTIVES[name].settings.model_validate(value)


DEFAULT_OBJECTIVE = BradleyTerryObjective()
ObjectiveConfig = Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(_objective)]
"""The settings of the method that `type` names; fields and methods in `rayward.objectives`."""


class Config(Frozen):
    """The whole configuration of `prepare`, `train` and `export`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = BradleyTerryObjective()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the head's outputs."""
        return self.objective.outputs(self.data.attributes)

    @property
    def group_tokens(self) -> int | None:
        """Largest comparison in tokens that `data.group_pairs` makes; None: it makes none."""
        # Never a matter of the micro-batches: the data of a run must not change with their budget.
        return (self.data.group_tokens or 2 * self.model.max_tokens) if self.data.group_pairs else None

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if not self.outputs:
            raise ValueError("objective.type is regression and data.attributes is empty; name the ratings to learn in data.attributes")
        self.objective.reward_weights(self.outputs)
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limit, budget = self.model.max_tokens, self.training.tokens_per_microbatch
        if budget < limit:
            raise ValueError(
                f"training.tokens_per_microbatch is {budget}, less than model.max_tokens {limit}; one conversation must fit a "
                "micro-batch; raise the first or lower the second"
            )
        return self
