"""How the rewards of several models become one: the rule of an ensemble, as data. Needs neither torch nor Ray.

ensemble.json   {"rule": "mean" | "minimum" | "lower_bound" | "safety_gate", "members": [directory, ...], ...}
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayward.contract import Normaliser
from rayward.errors import ModelLoadError

ENSEMBLE_FILE = "ensemble.json"
IMPLICIT_FILE = "implicit.json"


class EnsembleRule(BaseModel):
    """Content of `ensemble.json`.

    Attributes:
        members: directories of exported models, relative to the file or absolute; for `safety_gate` the helpfulness model, then the
            safety model.
        penalty: of `lower_bound`: the mean less this many spreads (conservative scores against reward hacking, arXiv 2310.02743).
        threshold: of `safety_gate`: where sigmoid(safety reward) is below it, the safety reward is the reward, else the helpfulness reward
            (Llama 2, arXiv 2307.09288 section 3.2.3, without its list of safety prompts: a request does not say where it comes from).
        normaliser: statistics for centred and standardised rewards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    rule: Literal["mean", "minimum", "lower_bound", "safety_gate"]
    members: tuple[str, ...] = Field(min_length=2)
    penalty: float = Field(1.0, ge=0.0)
    threshold: float = Field(0.15, gt=0.0, lt=1.0)
    normaliser: Normaliser | None = None

    @model_validator(mode="after")
    def _two_for_the_gate(self) -> Self:
        if self.rule == "safety_gate" and len(self.members) != 2:
            raise ValueError(f"safety_gate has {len(self.members)} members; the rule is two: helpfulness, then safety")
        return self

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `ensemble.json`.

        Raises:
            ModelLoadError: it cannot be read or breaks a rule.
        """
        path = directory / ENSEMBLE_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as exc:
            raise ModelLoadError(f"{path} is not a valid ensemble: {exc}", remedy="correct the file") from exc

    def save(self, directory: Path) -> None:
        """Write `ensemble.json`."""
        (directory / ENSEMBLE_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def combine(self, rewards: Sequence[float]) -> float:
        """One reward from those of the members."""
        match self.rule:
            case "mean":
                return statistics.fmean(rewards)
            case "minimum":
                return min(rewards)
            case "lower_bound":
                return statistics.fmean(rewards) - self.penalty * statistics.pstdev(rewards)
            case _:
                helpful, safe = rewards
                # sigmoid is monotonic: the reward is compared with the threshold's logit, which cannot overflow.
                return safe if safe < math.log(self.threshold / (1.0 - self.threshold)) else helpful
