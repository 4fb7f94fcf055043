"""Directories that score by a rule over other models, as data. Needs neither torch nor Ray.

ensemble.json   {"rule": "mean" | "minimum" | "lower_bound" | "safety_gate", "members": [directory, ...], ...}
implicit.json   {"policy": directory, "reference": directory, "beta": 0.1}
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayward.contract.contract import Normaliser
from rayward.errors import ModelLoadError
from rayward.schema import Versioned, write_atomically


class ScoringRule(Versioned):
    """Content of a rule's file.

    Attributes:
        normaliser: statistics for centred and standardised rewards.
    """

    kind: ClassVar[str] = "rule"
    remedy: ClassVar[str] = "correct the file"
    file: ClassVar[str]
    normaliser: Normaliser | None = None

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the rule's file.

        Raises:
            ModelLoadError: it cannot be read, breaks a rule, or is of a version that is not read here.
        """
        path = directory / cls.file
        try:
            text = path.read_bytes()
        except OSError as exc:
            raise ModelLoadError(f"{path} cannot be read ({exc.strerror})", remedy="check that it is there and may be read") from exc
        return cls.parse(text, where=str(path), error=ModelLoadError)

    def save(self, directory: Path) -> None:
        """Write the rule's file; a reader sees the old one or the new one."""
        write_atomically(directory / self.file, self.model_dump_json(indent=2) + "\n")


class EnsembleRule(ScoringRule):
    """Content of `ensemble.json`.

    Attributes:
        members: directories of exported models, relative to the file or absolute; for `safety_gate` the helpfulness model, then the
            safety model.
        penalty: of `lower_bound`: the mean less this many spreads (conservative scores against reward hacking, arXiv 2310.02743).
        threshold: of `safety_gate`: where sigmoid(safety reward) is below it, the safety reward is the reward, else the helpfulness reward
            (Llama 2, arXiv 2307.09288 section 3.2.3, without its list of safety prompts: a request does not say where it comes from).
    """

    file = "ensemble.json"
    rule: Literal["mean", "minimum", "lower_bound", "safety_gate"]
    members: tuple[str, ...] = Field(min_length=2)
    penalty: float = Field(1.0, ge=0.0)
    threshold: float = Field(0.15, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _two_for_the_gate(self) -> Self:
        if self.rule == "safety_gate" and len(self.members) != 2:
            raise ValueError(f"safety_gate has {len(self.members)} members; the rule is two: helpfulness, then safety")
        return self

    def moved(self, source: Path, target: Path) -> Self:
        """The same rule for a file in `target`: relative directories lead to where they led from `source`."""
        return self.model_copy(update={"members": tuple(_from(target, source, name) for name in self.members)})

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


class ImplicitRule(ScoringRule):
    """Content of `implicit.json`.

    Attributes:
        policy, reference: directories of causal language models with one tokenizer, relative to the file or absolute.
        beta: strength of the KL penalty that the policy was trained with.
        max_tokens: longest conversation.
        per_token: divide by the number of completion tokens (length-normalised).
    """

    file = "implicit.json"
    policy: str
    reference: str
    beta: float = Field(0.1, gt=0.0)
    max_tokens: int = Field(2048, ge=8)
    per_token: bool = False

    def moved(self, source: Path, target: Path) -> Self:
        """The same rule for a file in `target`: relative directories lead to where they led from `source`."""
        return self.model_copy(update={"policy": _from(target, source, self.policy), "reference": _from(target, source, self.reference)})


def _from(target: Path, source: Path, name: str) -> str:
    return name if Path(name).is_absolute() else os.path.relpath(source / name, target)


def rule_kind(directory: Path) -> type[EnsembleRule] | type[ImplicitRule] | None:
    """The kind of rule that lies in a directory, None for a model."""
    kinds: tuple[type[EnsembleRule] | type[ImplicitRule], ...] = (EnsembleRule, ImplicitRule)
    return next((kind for kind in kinds if (directory / kind.file).is_file()), None)
