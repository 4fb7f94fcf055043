"""Every path that scores: the native schema and all dialects."""

from __future__ import annotations

from rayward.wire.dialect import Route
from rayward.wire.dialects.table import ROUTES, with_pairs
from rayward.wire.endpoints import BEST_OF_N, SCORE


def all_routes() -> tuple[Route, ...]:
    """What an ingress mounts; `/v1/score` takes vLLM's requests of this path too."""
    return (with_pairs(SCORE), BEST_OF_N, *ROUTES)
