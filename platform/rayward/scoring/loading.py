"""Whatever scores, from its directory: a reward model, an ensemble, or the implicit reward of a policy. No Ray."""

from __future__ import annotations

from pathlib import Path

from rayward.scoring.combining import ENSEMBLE_FILE, IMPLICIT_FILE
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scorer import Device, ScoredModel, Scorer


def load_scored_model(path: str | Path, *, device: Device = "auto", tokens_per_batch: int = 8192, verify: bool = True) -> ScoredModel:
    """Load what lies in the directory; raises as the `load` of its kind does."""
    kinds: dict[str, type[Ensemble] | type[ImplicitScorer]] = {ENSEMBLE_FILE: Ensemble, IMPLICIT_FILE: ImplicitScorer}
    kind = next((found for name, found in kinds.items() if (Path(path) / name).is_file()), Scorer)
    return kind.load(path, device=device, tokens_per_batch=tokens_per_batch, verify=verify)
