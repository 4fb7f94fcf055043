"""What a call of a client does: split, send a bounded number at once, repeat what may be repeated, put together. One core for all clients.

    score_items -> chunks by tokens -> per chunk: tries until answered -> items that failed for now, again -> Scores

Everything is bounded by one deadline, and nothing is repeated that another try cannot better.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from rayward.client.exchange import (
    Entry,
    Item,
    Outcome,
    Question,
    Reply,
    Scores,
    TryFailedError,
    item_error,
    json_item,
    partial_error,
)
from rayward.client.links import Link
from rayward.errors import ConfigError, DeadlineError, RaywardError, RequestError, RuleError
from rayward.wire.items import Asked, ItemError, ScoreItem
from rayward.wire.rules import Limits, check_request

BACKOFF_BASE_S = 0.1
BACKOFF_MAX_S = 5.0
TOO_LARGE = frozenset({"body_too_large", "too_many_items"})
"""Codes of requests that are halved and sent again."""

ANY_SIZE = Limits(2**40, 2**40, 2**40, 2**40, 2**40)
"""Sizes are the server's to judge."""

BadItems: TypeAlias = Literal["raise", "report"]
"""An item that breaks a rule of the schema: raises RequestError for the call, or becomes an error of that item."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Until:
    """The end of a call: at a time of the clock, and how long that was from its start."""

    at: float
    deadline_s: float

    def passed(self, problem: str) -> DeadlineError:
        """The error of a call that ends here."""
        remedy = "raise deadline_s, send less at once, or serve more replicas"
        return DeadlineError(f"{problem} (deadline_s={self.deadline_s:g})", remedy=remedy)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client behaves; see `rayward.client.client.RewardClient`."""

    deadline_s: float = 60.0
    max_retries: int | None = None
    max_items_per_request: int = 256
    max_tokens_per_request: int = 32_768
    max_concurrency: int = 32
    hedge_after_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random


class Core:
    """Calls over one link, on one event loop."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self.link = link
        self._settings = settings
        self._permits = asyncio.Semaphore(settings.max_concurrency)

    async def score_items(self, items: Sequence[Item], question: Question, deadline_s: float, bad_items: BadItems) -> Scores:
        """A result for every item, in order.

        Raises:
            RequestError: an item breaks a rule and `bad_items` is raise, or the request as a whole is wrong.
            PartialError: some requests were answered and others not.
            ScoringError: none was; the first one's error.
        """
        if not items:
            raise RequestError("no items were given", remedy="give at least one")
        until = self._until(deadline_s)
        outcome = Outcome(len(items))
        entries = self._prepared(items, outcome, bad_items)
        chunks = self._chunks(entries)
        if len(chunks) == 1:
            await self._chunk(chunks[0], question, until, outcome, bad_items)
        else:
            await self._all(chunks, question, until, outcome, bad_items)
        return outcome.scores(question.request_id)

    async def score_texts(self, texts: Sequence[str], prompts: Sequence[str] | None, question: Question, deadline_s: float) -> list[float]:
        """The rewards of whole texts, in order, of one request.

        Raises:
            ConfigError: the question has options that a flat request cannot carry.
            ScoringError: a text has no reward.
        """
        if question.model is not None or question.asked != Asked():
            raise ConfigError(
                "model, weights, normalise and critiques cannot be asked for with whole texts",
                remedy="use score or score_items, with prompts and completions",
            )
        if not texts:
            raise RequestError("no texts were given", remedy="give at least one")
        if prompts is not None and len(prompts) != len(texts):
            raise RequestError(f"{len(texts)} texts and {len(prompts)} prompts were given", remedy="give one prompt for each text, or none")

        async def one(budget_s: float, tried: Collection[int]) -> Reply:
            return await self.link.texts(texts, prompts, question, budget_s, tried)

        reply = await self._repeated(one, self._until(deadline_s))
        return [reward for rewards in Scores(reply.results, "", ()).rewards() for reward in rewards]

    async def once(self, what: Callable[[float, Collection[int]], Awaitable[T]], deadline_s: float) -> T:
        """Something besides scoring, repeated in the same way.

        Args:
            what: one try, given what is left of the time and the endpoints that failed just now.
        """
        return await self._repeated(what, self._until(deadline_s))

    async def close(self) -> None:
        """Let go of the link."""
        await self.link.close()

    def _prepared(self, items: Sequence[Item], outcome: Outcome, bad_items: BadItems) -> list[Entry]:
        entries = []
        for index, item in enumerate(items):
            try:
                entry = self.link.prepare(index, item)
                if bad_items == "report":
                    check_alone(index, item)
            except RequestError as exc:
                if bad_items == "raise":
                    raise
                outcome.fail(index, ItemError(getattr(exc, "code", "invalid_item"), exc.problem))
            else:
                entries.append(entry)
        return entries

    def _chunks(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        settings = self._settings
        chunks: list[list[Entry]] = []
        tokens = 0
        for entry in entries:
            full = not chunks or len(chunks[-1]) == settings.max_items_per_request
            if full or tokens + entry.num_tokens > settings.max_tokens_per_request:
                chunks.append([])
                tokens = 0
            chunks[-1].append(entry)
            tokens += entry.num_tokens
        return chunks

    async def _all(self, chunks: Sequence[list[Entry]], question: Question, until: Until, outcome: Outcome, bad_items: BadItems) -> None:
        tasks = [asyncio.ensure_future(self._chunk(chunk, question, until, outcome, bad_items)) for chunk in chunks]
        pending: set[asyncio.Future[None]] = set(tasks)
        failures: dict[int, RaywardError] = {}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
                for number, task in enumerate(tasks):
                    exc = task.exception() if task in done else None
                    # What breaks a rule, asks for another version or has no key will not be better in the other requests.
                    if exc is not None and (isinstance(exc, RequestError) or not isinstance(exc, RaywardError)):
                        raise exc
                    if isinstance(exc, RaywardError):
                        failures[number] = exc
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not failures:
            return
        first = failures[min(failures)]
        if not outcome.versions:
            raise first
        for number, exc in failures.items():
            for entry in chunks[number]:
                if entry.index not in outcome.results:
                    outcome.fail(entry.index, item_error(exc))
        raise partial_error(outcome.scores(question.request_id).results) from first

    async def _chunk(self, entries: Sequence[Entry], question: Question, until: Until, outcome: Outcome, bad_items: BadItems) -> None:
        waiting = list(entries)
        rounds = 0
        while waiting:
            try:
                reply = await self._answered(waiting, question, until)
            except RaywardError as exc:
                if rounds:
                    # The items have errors of their own already, which are as true as this one.
                    return
                if isinstance(exc, RuleError) and exc.code in TOO_LARGE and exc.item is None and len(waiting) > 1:
                    half = len(waiting) // 2
                    await self._chunk(waiting[:half], question, until, outcome, bad_items)
                    await self._chunk(waiting[half:], question, until, outcome, bad_items)
                    return
                refused = next((entry for entry in waiting if entry.index == getattr(exc, "item", None)), None)
                if refused is None or bad_items == "raise":
                    raise
                outcome.fail(refused.index, item_error(exc))
                waiting.remove(refused)
                continue
            outcome.take(waiting, reply)
            waiting = [entry for entry, result in zip(waiting, reply.results, strict=True) if result.error and result.error.retryable]
            max_retries = self._settings.max_retries
            delay = self._backoff(rounds)
            if (max_retries is not None and rounds >= max_retries) or self._settings.clock() + delay >= until.at:
                return
            if waiting:
                await self._settings.sleep(delay)
                rounds += 1

    async def _answered(self, entries: Sequence[Entry], question: Question, until: Until) -> Reply:
        async def one(budget_s: float, tried: Collection[int]) -> Reply:
            return await self.link.score(entries, question, budget_s, tried)

        if self._settings.hedge_after_s is None:
            return await self._repeated(one, until)

        async def hedged(budget_s: float, tried: Collection[int]) -> Reply:
            return await self._hedged(one, budget_s, tried)

        return await self._repeated(hedged, until)

    async def _repeated(self, what: Callable[[float, Collection[int]], Awaitable[T]], until: Until) -> T:
        settings = self._settings
        tried: set[int] = set()
        waits: list[float] = []
        num_tries = num_counted = rounds = 0
        while True:
            remaining = until.at - settings.clock()
            if remaining <= 0:
                raise until.passed("the deadline passed before an answer came")
            try:
                async with asyncio.timeout(remaining), self._permits:
                    return await what(until.at - settings.clock(), tried)
            except TryFailedError as exc:
                failed = exc
            except TimeoutError as exc:
                raise until.passed("no answer came in time") from exc
            num_tries += 1
            num_counted += not failed.unheard
            tried.add(failed.endpoint)
            waits.append(failed.wait_s)
            exhausted = settings.max_retries is not None and num_counted > settings.max_retries
            if not exhausted and len(tried) < self.link.num_endpoints:
                continue
            delay = 0.0 if exhausted else max(self._backoff(rounds), min(waits))
            if settings.clock() + delay >= until.at:
                raise until.passed(f"the last of {num_tries} attempts failed: {failed.error.problem}") from failed.error
            if exhausted:
                error = failed.error
                error.problem = f"{num_tries} attempts failed; the last one: {error.problem}"
                raise error
            await settings.sleep(delay)
            rounds += 1
            tried.clear()
            waits.clear()

    async def _hedged(self, one: Callable[[float, Collection[int]], Awaitable[Reply]], budget_s: float, tried: Collection[int]) -> Reply:
        # The second request holds no permit of its own: it replaces one that has stopped to move.
        until = self._settings.clock() + budget_s
        tasks = [asyncio.ensure_future(one(budget_s, tried))]
        try:
            await asyncio.wait(tasks, timeout=self._settings.hedge_after_s)
            if not tasks[0].done():
                tasks.append(asyncio.ensure_future(one(until - self._settings.clock(), tried)))
            while True:
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = next((task for task in done if task.exception() is None), None)
                if good is not None:
                    return good.result()
                if not pending:
                    return tasks[0].result()
                tasks = [*pending]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _until(self, deadline_s: float) -> Until:
        return Until(self._settings.clock() + deadline_s, deadline_s)

    def _backoff(self, num_before: int) -> float:
        ceiling = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0 ** min(num_before, 30))
        return ceiling * (0.5 + 0.5 * self._settings.jitter())


def check_alone(index: int, item: Item, limits: Limits = ANY_SIZE) -> ScoreItem:
    """One item past every rule that needs no tokenizer.

    Raises:
        RuleError: of the item at this index.
    """
    try:
        return check_request({"items": [json_item(item)]}, limits)[0][0]
    except RuleError as exc:
        raise RuleError(exc.code, exc.problem.replace("item 0:", f"item {index}:"), remedy=exc.remedy, item=index) from exc
