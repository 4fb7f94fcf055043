"""Whatever scores, from its directory: a reward model, an ensemble, or the implicit reward of a policy. No Ray."""

from __future__ import annotations

from pathlib import Path

from rayward.config.scoring import HashWeights
from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scored_model import Device, ScoredModel
from rayward.scoring.scorer import Scorer


def load_scored_model(
    path: str | Path,
    *,
    device: Device = "auto",
    tokens_per_batch: int = 8192,
    verify: bool = True,
    hash_weights: HashWeights = "sampled",
) -> ScoredModel:
    """Load what lies in the directory; raises as the `load` of its kind does."""
    kinds: dict[object, type[Scorer] | type[Ensemble] | type[ImplicitScorer]] = {EnsembleRule: Ensemble, ImplicitRule: ImplicitScorer}
    kind = kinds.get(rule_kind(Path(path)), Scorer)
    return kind.load(path, device=device, tokens_per_batch=tokens_per_batch, verify=verify, hash_weights=hash_weights)
