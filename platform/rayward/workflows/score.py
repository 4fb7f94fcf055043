"""`rayward score`: JSON lines in, rewards or errors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from rayward.config.scoring import ScoringConfig
from rayward.errors import RaywardError

if TYPE_CHECKING:
    from rayward.contract.contract import Normalise


def score_lines(
    model: str,
    lines: Iterable[str],
    *,
    device: str,
    tokens_per_batch: int,
    verify: bool,
    weights: str | None = None,
    normalise: Normalise = "raw",
    n_critiques: int = 1,
    temperature: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Score JSON lines with the scorer that serving uses; a line that is no valid item gets an error of its own."""
    from rayward.scoring.load import load_scored_model
    from rayward.wire.rules import parse_request

    scorer = load_scored_model(model, device=cast(Any, device), tokens_per_batch=tokens_per_batch, verify=verify)
    limits = ScoringConfig().limits
    for line in lines:
        if not line.strip():
            continue
        try:
            (item,), _ = parse_request(f'{{"items": [{line}]}}'.encode("utf-8", errors="surrogatepass"), limits)
        except RaywardError as exc:
            yield {"error": {"code": "invalid_item", "message": exc.problem}}
            continue
        asked = replace(item, weights=weights, normalise=normalise, n_critiques=n_critiques, temperature=temperature)
        (result,) = scorer.score([asked])
        if result.error is not None:
            yield {"error": {"code": result.error.code, "message": result.error.message}}
            continue
        outputs = result.outputs and [dict(zip(scorer.facts.outputs, row, strict=True)) for row in result.outputs]
        found = {"outputs": outputs, "steps": result.steps, "critiques": result.critiques, "reward_std": result.reward_std}
        yield {"rewards": result.rewards, **{name: value for name, value in found.items() if value is not None}}
