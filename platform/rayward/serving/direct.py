"""Scoring from inside of the cluster, past HTTP: the clients of `rayward.client`, by deployment handles.

    from rayward import AsyncRewardClient
    from rayward.serving.direct import direct

    async with AsyncRewardClient(direct()) as client:
        rewards = await client.score("What is the capital of France?", ["Paris.", "Lyon."])

The process reads the table of routes itself and sends to scorers, as an ingress does: versions, canaries, repeats after a death and
quarantine are the same. Keys and limits per key are the ingress's, and do not hold here: whoever may call handles runs code in the cluster.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from rayward.client.core import check_alone
from rayward.client.exchange import CHARS_PER_TOKEN, Entry, Item, Question, Reply, TryFailedError, check_counts
from rayward.client.links import REPLY_S, REPLY_SHARE, Link
from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import strings_in
from rayward.errors import ConfigError, OverloadedError, RuleError, ScoringError, UnavailableError
from rayward.serving.dispatch import Dispatcher
from rayward.serving.metrics import Recorder
from rayward.serving.routes import RouteTable
from rayward.wire.dialects.reading import text_items
from rayward.wire.items import ScoreItem
from rayward.wire.native import Health, ModelInfo
from rayward.wire.rules import Limits


def direct(front: str = "rayward", *, state: str | None = None) -> Callable[[], Link]:
    """What `RewardClient` and `AsyncRewardClient` take in place of a URL; may be copied to other processes of the cluster.

    Args:
        front: name of the Serve application that has the ingress.
        state: as in its configuration.
    """
    return partial(_link, front, state)


def _link(front: str, state: str | None) -> Link:
    # Ray and its Serve take seconds to load, and only a process of a cluster has them.
    import ray

    if not ray.is_initialized():
        raise ConfigError(
            "this process has not joined a Ray cluster, so that there are no handles",
            remedy="call ray.init(address='auto') before the first request, or give the URL of the server",
        )
    from rayward.serving.applications import table_store
    from rayward.serving.handles import ServeHandles

    read = table_store(ScoringConfig(state=state), front).read
    handles = ServeHandles(front, lambda model, version: (dispatcher.table or RouteTable()).application(front, model, version))
    caller = f"{socket.gethostname()}-{os.getpid()}"
    dispatcher = Dispatcher(read, handles, recorder=Recorder(f"client-{caller}", "ingress"))
    return DirectLink(dispatcher, caller)


class DirectLink:
    """A `Link` over a dispatcher of this process.

    Args:
        caller: whose turn it is in the queues of the scorers.
    """

    num_endpoints = 1

    def __init__(self, dispatcher: Dispatcher, caller: str) -> None:
        self._dispatcher = dispatcher
        self._caller = caller
        self._reading: asyncio.Task[None] | None = None

    def prepare(self, index: int, item: Item) -> Entry:
        """An item past the rules of the wire."""
        if isinstance(item, ScoreItem) and item.form == "text":
            raise ConfigError(f"item {index} is a whole text", remedy="use score_texts")
        checked = check_alone(index, item, Limits())
        num_chars = sum(map(len, strings_in([list(checked.prompt), list(checked.completions)])))
        return Entry(index, checked, num_chars // CHARS_PER_TOKEN, len(checked.completions))

    async def score(self, entries: Sequence[Entry], question: Question, budget_s: float, tried: Collection[int]) -> Reply:
        """By the dispatcher, which repeats by itself what a replica's death interrupts."""
        items = [replace(entry.payload, asked=question.asked, trace=question.trace) for entry in entries]
        reply = await self._dispatched(items, question, budget_s)
        check_counts(entries, reply.results)
        return reply

    async def texts(
        self, texts: Sequence[str], prompts: Sequence[str] | None, question: Question, budget_s: float, tried: Collection[int]
    ) -> Reply:
        """Whole texts, as the flat dialects give them."""
        reply = await self._dispatched(list(text_items(texts, Limits(max_items=len(texts)), "texts", prompts=prompts)), question, budget_s)
        check_counts([Entry(index, None, 0, 1) for index in range(len(texts))], reply.results)
        return reply

    async def models(self, budget_s: float, tried: Collection[int]) -> list[ModelInfo]:
        """What the table of routes says now."""
        await self._dispatcher.refresh()
        return self._dispatcher.models()

    async def health(self, budget_s: float, tried: Collection[int]) -> Health:
        """The default model's version, once every model has one that can score."""
        models = await self.models(budget_s, tried)
        table = self._dispatcher.table
        name = table.default_model if table is not None else None
        found = next((info for info in models if name in (None, info.id)), None)
        if found is None or not self._dispatcher.ready():
            raise TryFailedError(UnavailableError("not every model has a version that can score", remedy="wait"), unheard=True)
        return Health(model=found.id, version=found.version)

    async def close(self) -> None:
        """Stop to read the table."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None
        await self._dispatcher.close()

    async def _dispatched(self, items: list[ScoreItem], question: Question, budget_s: float) -> Reply:
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._dispatcher.run())
        left_s = budget_s - min(REPLY_S, REPLY_SHARE * budget_s)
        try:
            model, scored = await self._dispatcher.score(
                items,
                request_id=question.request_id,
                caller=self._caller,
                budget_s=left_s,
                model=question.model,
                version=question.version,
            )
        except RuleError:
            raise
        except ScoringError as exc:
            if not exc.retryable:
                raise
            raise TryFailedError(exc, wait_s=exc.retry_after_s if isinstance(exc, OverloadedError) else 0.0) from exc
        return Reply(scored.results, model, scored.version)
