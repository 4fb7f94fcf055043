"""`rayward score`: JSON lines in, rewards or errors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rayward.config.placement import Placement
from rayward.config.scoring import ScoringConfig
from rayward.errors import RaywardError
from rayward.wire.items import Asked, ItemError, ItemResult


def score_lines(
    model: str, lines: Iterable[str], *, asked: Asked = Asked(), placement: Placement = Placement()
) -> Iterator[dict[str, Any]]:
    """Score JSON lines with the scorer that serving uses; a line that is no valid item gets an error of its own."""
    from rayward.scoring.load import load_scored_model
    from rayward.wire.rules import parse_request

    scorer = load_scored_model(model, placement)
    limits = ScoringConfig().limits
    for line in lines:
        if not line.strip():
            continue
        try:
            (item,), _ = parse_request(f'{{"items": [{line}]}}'.encode("utf-8", errors="surrogatepass"), limits)
        except RaywardError as exc:
            yield ItemResult(error=ItemError("invalid_item", exc.problem)).as_json()
            continue
        (result,) = scorer.score([replace(item, asked=asked)])
        found = result.as_json()
        if "outputs" in found:
            found["outputs"] = [dict(zip(scorer.facts.outputs, row, strict=True)) for row in found["outputs"]]
        yield found
