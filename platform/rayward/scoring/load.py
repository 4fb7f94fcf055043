"""Whatever scores, from its directory: a reward model, an ensemble, or the implicit reward of a policy. No Ray."""

from __future__ import annotations

from pathlib import Path

from rayward.config.placement import Placement
from rayward.errors import ModelLoadError
from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scored_model import ScoredModel
from rayward.scoring.scorer import Scorer
from rayward.scoring.units import UnitModel


def load_scored_model(path: str | Path, placement: Placement = Placement()) -> UnitModel:
    """Load what lies in the directory; raises as the `load` of its kind does."""
    kinds: dict[object, type[Scorer] | type[Ensemble] | type[ImplicitScorer]] = {EnsembleRule: Ensemble, ImplicitRule: ImplicitScorer}
    kind = kinds.get(rule_kind(Path(path)), Scorer)
    return kind.load(
        path,
        device=placement.device,
        tokens_per_batch=placement.tokens_per_batch,
        verify=placement.verify,
        hash_weights=placement.hash_weights,
        batch_invariant=placement.batch_invariant,
    )


def reward_model_of(model: ScoredModel) -> Scorer:
    """The model itself, where its hidden states or critiques are wanted.

    Raises:
        ModelLoadError: it is a rule over other models and has none.
    """
    if not isinstance(model, Scorer):
        raise ModelLoadError(f"{model.model_id} is a rule over other models", remedy="point at one exported reward model")
    return model
