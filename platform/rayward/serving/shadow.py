"""Shadow traffic: what another version says of the same items, compared with what was answered, and thrown away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations

from rayward.errors import RaywardError
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.metrics import Recorder
from rayward.serving.routes import Choice
from rayward.wire.items import ItemResult, ScoreItem

logger = logging.getLogger("ray.serve")

BUDGET_S = 60.0
"""A shadow version that is slower than this is not waited for."""

MAX_OUTSTANDING = 64
"""Shadow calls of one ingress at a time; more are skipped and counted."""

COMPLETIONS = "shadow_completions_total"
"""Completions that both versions gave a reward; labels of all of these: model, current, shadow."""

ABS_DIFFERENCE = "shadow_abs_difference_total"
"""Sum of |difference| of their rewards; over COMPLETIONS the mean."""

DIFFERENCE = "shadow_difference_sum"
"""Sum of shadow minus current, as a gauge, because it may fall; over COMPLETIONS the shift."""

MAX_DIFFERENCE = "shadow_max_abs_difference"
"""Largest |difference| seen."""

PAIRS = "shadow_pairs_total"
"""Pairs of completions of one prompt that the current version does not tie."""

AGREEING_PAIRS = "shadow_agreeing_pairs_total"
"""Of these, the ones that the shadow orders alike."""

UNCOMPARED = "shadow_uncompared_total"
"""Items that were not compared; label reason: skipped (too many at a time), failed (the call), item (one of the two has no reward)."""


class Shadows:
    """Sends uncharged copies of answered calls to a shadow version, in the background, and tallies how far its rewards are off."""

    def __init__(self, recorder: Recorder, *, max_outstanding: int = MAX_OUTSTANDING) -> None:
        self._recorder = recorder
        self._max_outstanding = max_outstanding
        self._tasks: set[asyncio.Task[None]] = set()

    def send(
        self,
        score: Callable[[ScoreCall], Awaitable[ScoredCall]],
        choice: Choice,
        items: Sequence[ScoreItem],
        answered: ScoredCall,
        *,
        request_id: str,
        caller: str,
    ) -> None:
        """Compare in the background what `score` says; nothing that goes wrong there reaches anybody."""
        labels = {"model": choice.model, "current": answered.version, "shadow": choice.shadow or ""}
        if len(self._tasks) >= self._max_outstanding:
            self._recorder.add(UNCOMPARED, len(items), reason="skipped", **labels)
            return
        call = ScoreCall(items, request_id=request_id, caller=caller, budget_s=BUDGET_S, charged=False)
        task = asyncio.get_running_loop().create_task(self._compare(score, call, answered, labels))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self, score: Callable[[ScoreCall], Awaitable[ScoredCall]], call: ScoreCall, answered: ScoredCall, labels: dict[str, str]
    ) -> None:
        try:
            async with asyncio.timeout(BUDGET_S):
                scored = await score(call)
        except (RaywardError, TimeoutError) as exc:
            logger.info("shadow version %s did not answer: %s", labels["shadow"], type(exc).__name__)
            self._recorder.add(UNCOMPARED, len(call.items), reason="failed", **labels)
            return
        for current, shadow in zip(answered.results, scored.results, strict=True):
            self._record(current, shadow, labels)

    def _record(self, current: ItemResult, shadow: ItemResult, labels: dict[str, str]) -> None:
        if current.rewards is None or shadow.rewards is None:
            self._recorder.add(UNCOMPARED, reason="item", **labels)
            return
        differences = [b - a for a, b in zip(current.rewards, shadow.rewards, strict=True)]
        self._recorder.add(COMPLETIONS, len(differences), **labels)
        self._recorder.add(ABS_DIFFERENCE, sum(map(abs, differences)), **labels)
        self._recorder.move(DIFFERENCE, sum(differences), **labels)
        self._recorder.raise_to(MAX_DIFFERENCE, max(map(abs, differences)), **labels)
        for (a, b), (c, d) in zip(combinations(current.rewards, 2), combinations(shadow.rewards, 2), strict=True):
            if a != b:
                self._recorder.add(PAIRS, **labels)
                self._recorder.add(AGREEING_PAIRS, float((a < b) == (c < d) and c != d), **labels)

    async def close(self) -> None:
        """End what is outstanding."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
