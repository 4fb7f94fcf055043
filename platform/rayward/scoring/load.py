"""Whatever scores, from its directory: a reward model, an ensemble, or the implicit reward of a policy. No Ray."""

from __future__ import annotations

from pathlib import Path

from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scored_model import Device, ScoredModel
from rayward.scoring.scorer import Scorer


def load_scored_model(path: str | Path, *, device: Device = "auto", tokens_per_batch: int = 8192, verify: bool = True) -> ScoredModel:
    """Load what lies in the directory; raises as the `load` of its kind does."""
    kinds: dict[object, type[Scorer] | type[Ensemble] | type[ImplicitScorer]] = {EnsembleRule: Ensemble, ImplicitRule: ImplicitScorer}
    return kinds.get(rule_kind(Path(path)), Scorer).load(path, device=device, tokens_per_batch=tokens_per_batch, verify=verify)
