"""Typed configuration of a mixture of objectives; YAML files and overrides as everywhere."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from rayward.config.data import DataConfig
from rayward.config.placement import Device, Placement
from rayward.config.run import RunConfig
from rayward.schema import Frozen


class MixtureConfig(Frozen):
    """What `rayward mixture` takes."""

    run: RunConfig = RunConfig(name="mixture")
    """Name and storage of the run, and its seed."""
    model: str = "model"
    """Directory of an exported reward model; its backbone is frozen."""
    ratings: DataConfig = DataConfig()
    """Rated rows for the regression; `attributes` names the objectives."""
    preferences: DataConfig = DataConfig()
    """Pairs or rankings for the gate."""
    verbosity_attribute: str | None = None
    """Objective whose influence is taken out of the others; None: nothing is taken out."""
    correlation_limit: float = Field(0.03, ge=-1.0, le=1.0)
    """Largest Spearman correlation with it that an objective may keep."""
    gate_width: int = Field(1024, ge=1)
    """Units of each hidden layer of the gate."""
    gate_depth: int = Field(3, ge=1)
    """Hidden layers of the gate."""
    gate_temperature: float = Field(10.0, gt=0.0)
    """Divides the gate's logits."""
    gate_dropout: float = Field(0.2, ge=0.0, lt=1.0)
    """After each hidden layer, in training only."""
    gate_steps: int = Field(2000, ge=1)
    """Optimizer steps of the gate."""
    gate_batch_size: int = Field(1024, ge=1)
    """Pairs in one step."""
    gate_learning_rate: float = Field(1e-3, gt=0.0)
    """AdamW, cosine to zero."""
    scorers: int = Field(1, ge=1)
    """Copies of the backbone that compute features side by side."""
    gpus_per_scorer: float = Field(0.0, ge=0.0)
    """GPUs that each of them reserves."""
    device: Device = "auto"
    """Where they compute."""
    tokens_per_batch: int = Field(8192, ge=64)
    """Token budget of one forward."""

    @model_validator(mode="after")
    def _objectives(self) -> Self:
        names = self.ratings.attributes
        if not names:
            raise ValueError("ratings.attributes is empty; the rule is one objective or more; name the ratings to learn")
        if self.verbosity_attribute is not None and self.verbosity_attribute not in names:
            raise ValueError(
                f"verbosity_attribute is {self.verbosity_attribute!r}; the rule is one of ratings.attributes: {', '.join(names)}"
            )
        return self

    @property
    def placement(self) -> Placement:
        """Where features are computed."""
        return Placement(
            device=self.device, actors=self.scorers, gpus_per_actor=self.gpus_per_scorer, tokens_per_batch=self.tokens_per_batch
        )
