"""The scorer's deployment: holds the model, merges the requests that wait into one call of it."""

import asyncio
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray import serve

from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import strings_in, turns_of
from rayward.errors import ServerError, marking
from rayward.scoring.scored_model import ScoredModel
from rayward.wire.items import ItemResult, ScoreItem
from rayward.wire.native import ModelInfo, WireNormaliser

logger = logging.getLogger("ray.serve")
CHARS_PER_TOKEN = 4
"""Guess used for grouping requests only; the scorer counts real tokens."""

OVERHEAD_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """Results of one request and the version that computed them."""

    version: str
    results: list[ItemResult]


@dataclass(frozen=True, slots=True)
class _Call:
    # One request in the batch queue; `share` is its part of a full batch in units of 1 / max_ongoing_requests.
    items: Sequence[ScoreItem]
    share: int


def _sum_shares(calls: list[_Call]) -> int:
    return sum(call.share for call in calls)


def score_calls(scorer: ScoredModel, calls: Sequence[Sequence[ScoreItem]]) -> list[list[ItemResult] | Exception]:
    """The results of every call: all in one; where that raises, each alone, once, and only those that raise again have the exception."""
    try:
        results = iter(scorer.score([item for call in calls for item in call]))
        return [[next(results) for _ in call] for call in calls]
    # Broad on purpose: the calls are those of different clients.
    except Exception:
        logger.exception("%d requests failed together; each is repeated alone", len(calls))
    replies: list[list[ItemResult] | Exception] = []
    for call in calls:
        try:
            replies.append(scorer.score(call))
        # Broad on purpose, as above.
        except Exception as exc:
            replies.append(exc)
    return replies


@serve.deployment(name="scorer")
class ScorerDeployment:
    """Holds one `Scorer`; merges the requests that wait into one call of it."""

    # Of a constructor that fails, Serve keeps the text of the traceback only.
    @marking
    def __init__(self, config: ScoringConfig, model_name: str) -> None:
        import torch

        from rayward.scoring.load import load_scored_model

        torch.set_num_threads(config.threads_per_replica)
        self._config = config
        self._scorer = load_scored_model(config.model or "", config.placement)
        facts = self._scorer.facts
        self._info = ModelInfo(
            id=model_name,
            version=self._scorer.version,
            max_tokens=facts.max_tokens,
            outputs=list(facts.outputs),
            weight_sets=list(facts.weight_sets),
            normaliser=None if facts.normaliser is None else WireNormaliser(**facts.normaliser.model_dump()),
            writes_critiques=facts.writes_critiques,
        )
        # The forward blocks; in the event loop it would starve health checks and the queue.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: str | None = None
        # Units of 1 / max_ongoing_requests of the token budget: Serve warns when a batch can hold more than a replica may run.
        self._score_batch.set_max_batch_size(config.max_ongoing_requests)
        self._score_batch.set_batch_wait_timeout_s(0.005)

    def info(self) -> ModelInfo:
        """What is served."""
        return self._info

    def check_health(self) -> None:
        """Called by Serve; a replica whose forward failed is replaced.

        Raises:
            ServerError: the last forward failed.
        """
        if self._failure is not None:
            raise ServerError(f"the last forward failed: {self._failure}", remedy="none; Serve replaces the replica")

    async def score(self, items: Sequence[ScoreItem]) -> ScoredRequest:
        """Rewards or errors of one request's items, in order.

        Raises:
            Exception: they failed in company and alone.
        """
        # Serve closes a batch after its wait even while another one runs; held back here, batches grow under load instead.
        await self._idle.wait()
        results: list[ItemResult] | Exception = await self._score_batch(_Call(items, self._share(items)))
        if isinstance(results, Exception):
            raise results
        return ScoredRequest(self._info.version, results)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0, max_concurrent_batches=1, batch_size_fn=_sum_shares)  # type: ignore[untyped-decorator]
    async def _score_batch(self, calls: list[_Call]) -> list[list[ItemResult] | Exception]:
        self._idle.clear()
        try:
            replies = await asyncio.get_running_loop().run_in_executor(
                self._thread, score_calls, self._scorer, [call.items for call in calls]
            )
        finally:
            self._idle.set()
        for reply in replies:
            if isinstance(reply, Exception):
                # The scorer leaves no item's own fault unanswered: the device is broken, or out of memory for a single item.
                self._failure = f"{type(reply).__name__}: {reply}"
        return replies

    def _share(self, items: Sequence[ScoreItem]) -> int:
        num_chars = sum(_num_chars(item) for item in items)
        num_texts = sum(len(item.completions) for item in items)
        tokens = num_chars / CHARS_PER_TOKEN + num_texts * OVERHEAD_TOKENS
        units = self._config.max_ongoing_requests
        # A request over the budget is a batch of its own; Serve refuses sizes above the maximum.
        return max(1, min(units, math.ceil(tokens * units / self._config.tokens_per_batch)))


def _num_chars(item: ScoreItem) -> int:
    turns = [turn for part in (item.prompt, *map(turns_of, item.completions)) for turn in part]
    given = [value for turn in turns for name, value in turn.items() if name != "role"]
    return sum(map(len, strings_in((given, item.tools, item.chat_template_kwargs))))
