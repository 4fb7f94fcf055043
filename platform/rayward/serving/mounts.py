"""Every path that scores: the native schema and the dialects. What is mounted beside them: `seeing` and `assembly`. No Ray."""

from __future__ import annotations

from rayward.wire.dialect import Route
from rayward.wire.dialects.table import ROUTES, with_pairs
from rayward.wire.endpoints import BEST_OF_N, SCORE


def all_routes() -> tuple[Route, ...]:
    """Every path that scores."""
    return (with_pairs(SCORE), BEST_OF_N, *ROUTES)
