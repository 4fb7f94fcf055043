"""From a request to the scorer that answers it: routes, repeats after a death, suspects, shadows. No Ray: handles are given.

    table.choose -> items that are refused | suspects, one by one | all others in one call -> results in order, of one version

Scoring is idempotent, so whatever a replica did not answer is asked again elsewhere for as long as the caller's time allows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from rayward.errors import DeadlineError, OverloadedError, RaywardError, ServerError, UnavailableError
from rayward.serving.calls import ScoreCall, ScoredCall, Stats
from rayward.serving.flights import Flights
from rayward.serving.metrics import Recorder
from rayward.serving.poison import Convictions, Quarantine
from rayward.serving.routes import Choice, RouteTable
from rayward.serving.shadow import Shadows
from rayward.serving.view import REFRESH_S, Handles, ReadTable, ScorerHandle, TableView
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult, ScoreItem
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""Between two tries where nobody answered; doubled each time, with jitter."""

MAX_OVERLOADED_TRIES = 3
"""Replicas that are asked before the refusal of one is the caller's: another one may have room."""

MAX_REPEATS = 5
"""Tries of items that come back interrupted, before the caller is told so."""

REPLY_SHARE = 0.05
REPLY_S = 0.25
"""What is kept of the caller's time for the way back, as a share of it and at most: the replica ends early enough to say what it has."""

REQUESTS = "dispatched_requests_total"
"""Labels: model, version, outcome (answered, or the error's type)."""

REPEATS = "dispatch_repeats_total"
"""Tries beyond the first; label reason: died, unavailable, overloaded, interrupted, moved (to replicas that were added)."""

DEATHS = "replica_deaths_total"
"""Calls that a replica died under; label cause: crash, or order (its node went, or somebody ended it)."""

POISONED_ITEMS = "poisoned_items_total"
QUARANTINED = "quarantined_contents"
TABLE_AGE = "route_table_age_seconds"
TABLE_GENERATION = "route_table_generation"


class ReplicaDiedError(UnavailableError):
    """A replica died under the call.

    Args:
        by_order: its node went away or somebody ended it, so no item is to blame.
    """

    def __init__(self, problem: str, *, remedy: str = "retry", by_order: bool = False) -> None:
        super().__init__(problem, remedy=remedy)
        self.by_order = by_order


@dataclass(slots=True)
class _Request:
    items: tuple[ScoreItem, ...]
    request_id: str
    caller: str
    deadline: float | None
    model: str | None
    version: str | None
    tries: int = 0
    repeats: int = 0
    answers: dict[int, ItemResult] = field(default_factory=dict)
    answered_by: str = ""
    timings: Timings = Timings()
    replica: str = ""

    def take(self, scored: ScoredCall, indices: Sequence[int]) -> None:
        """Keep what one call answered."""
        for index, result in zip(indices, scored.results, strict=True):
            self.answers[index] = result
        mine, other = self.timings, scored.timings
        self.timings = Timings(
            max(mine.queue_s, other.queue_s), max(mine.encode_s, other.encode_s), max(mine.compute_s, other.compute_s), mine.total_s
        )
        self.replica = scored.replica

    def refuse(self, index: int, code: str, message: str) -> None:
        """An item that is not asked (again)."""
        self.answers[index] = ItemResult(error=ItemError.of(code, message))

    @property
    def open(self) -> list[int]:
        """Items without an answer, in order."""
        return [index for index in range(len(self.items)) if index not in self.answers]


class Dispatcher:
    """The scorers as the ingress sees them; implements `Backends`.

    Args:
        read: the table of routes in storage.
        handles: the scorers.
        recorder: of this process; None: one of its own.
        clock: monotonic seconds.
        sleep, jitter: between tries.
        quarantine: what is known of items that kill replicas.
        convictions: where other ingresses of the application read it; None: there are none.
    """

    def __init__(
        self,
        read: ReadTable,
        handles: Handles,
        *,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        quarantine: Quarantine | None = None,
        convictions: Convictions | None = None,
    ) -> None:
        self._view = TableView(read, handles, clock)
        self._handles = handles
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._quarantine = quarantine or Quarantine(clock)
        self._convictions = convictions
        self._flights = Flights()
        self._recorder = recorder or Recorder("ingress", "ingress")
        self._shadows = Shadows(self._recorder)
        # Suspects of one version go through one by one, so that a death has one cause.
        self._lanes: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self) -> None:
        """Read the table every second, until cancelled."""
        while True:
            await self.refresh()
            await self._sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read the table now, and what other ingresses know of poisonous items; give replicas that were added their share of the calls."""
        await self._view.refresh()
        for key in self._flights.waiting():
            num_replicas = await self._handles.of(*key).num_replicas()
            if num_replicas is not None:
                self._flights.seen(key, num_replicas)
        if self._convictions is not None:
            self._quarantine.hear(await asyncio.to_thread(self._convictions.exchange, self._quarantine.untold()))

    @property
    def table(self) -> RouteTable | None:
        """As it was read last; None: not yet."""
        return self._view.table

    def models(self) -> list[ModelInfo]:
        """Every model that is served, with the version that answers for it; without waiting for a replica."""
        return self._view.models()

    def ready(self) -> bool:
        """Whether every model has a version that can score, or can be started from zero."""
        return self._view.ready()

    async def score(
        self, items: Sequence[ScoreItem], *, request_id: str, caller: str, budget_s: float | None, model: str | None, version: str | None
    ) -> tuple[str, ScoredCall]:
        """The model's name and what one version of it answered; see `Backends`.

        Raises:
            RaywardError: `UnavailableError`, `OverloadedError`, `DeadlineError`, `VersionError`, `ServerError` or a `RuleError`.
        """
        deadline = None if budget_s is None else self._clock() + budget_s
        request = _Request(tuple(items), request_id, caller, deadline, model, version)
        choice, outcome = None, "cancelled"
        try:
            async with asyncio.timeout(budget_s):
                choice = await self._view.choose(request.model, request.version, request.request_id)
                choice = await self._until_answered(choice, request)
            outcome = "answered"
        except TimeoutError as exc:
            outcome = "DeadlineError"
            raise DeadlineError(
                f"no answer within the {budget_s:g} s that the caller gave", remedy="allow more time, send less at once, or add replicas"
            ) from exc
        except RaywardError as exc:
            outcome = type(exc).__name__
            raise
        finally:
            # A name that is not served is the caller's text, and no label.
            served = {"model": choice.model, "version": choice.version} if choice is not None else {"model": "", "version": ""}
            self._recorder.add(REQUESTS, outcome=outcome, **served)
        results = tuple(request.answers[index] for index in range(len(request.items)))
        scored = ScoredCall(choice.version, results, request.timings, request.replica)
        if choice.shadow is not None:
            shadow = self._handles.of(choice.model, choice.shadow)
            self._shadows.send(shadow.score, choice, request.items, scored, request_id=request_id, caller=caller)
        return choice.model, scored

    async def _until_answered(self, choice: Choice, request: _Request) -> Choice:
        pause_s = FIRST_PAUSE_S
        while True:
            reason = await self._try(choice, request)
            if reason is None:
                return choice
            self._recorder.add(REPEATS, reason=reason)
            # Half to one and a half: callers of one dead replica do not come back all at once.
            await self._sleep(pause_s * (0.5 + self._jitter()))
            pause_s = min(2.0 * pause_s, LONGEST_PAUSE_S)
            # The version may have been retired in the meantime; the same request id meets the same canary.
            again = await self._view.choose(request.model, request.version, request.request_id)
            if again.version != choice.version:
                request.answers.clear()
            choice = again

    async def _try(self, choice: Choice, request: _Request) -> str | None:
        # None: all items are answered; else why another try is needed.
        request.tries += 1
        handle = self._handles.of(choice.model, choice.version)
        indices = request.open
        company, alone, refused = (
            [indices[i] for i in part] for part in self._quarantine.split([request.items[index] for index in indices])
        )
        for index in refused:
            self._poisoned(request, index)
        try:
            if company:
                scored = await self._call(handle, choice, request, company)
                request.take(scored, company)
                self._quarantine.suspect([request.items[i] for i in company if _interrupted(request.answers[i])])
            for index in alone:
                await self._try_alone(handle, choice, request, index)
        except ReplicaDiedError as exc:
            self._recorder.add(DEATHS, cause="order" if exc.by_order else "crash")
            if not exc.by_order:
                self._quarantine.suspect([request.items[index] for index in company if index not in request.answers])
            return "died"
        except UnavailableError:
            return "unavailable"
        return self._to_repeat(request)

    def _to_repeat(self, request: _Request) -> str | None:
        # What came back as interrupted is asked again, a few times.
        again = [
            i for i, result in request.answers.items() if result.error is not None and result.error.code in ("interrupted", "encoder_lost")
        ]
        if not again or request.repeats >= MAX_REPEATS:
            return None
        request.repeats += 1
        for index in again:
            del request.answers[index]
        return "interrupted"

    async def _try_alone(self, handle: ScorerHandle, choice: Choice, request: _Request, index: int) -> None:
        item = request.items[index]
        async with self._lanes[choice.model, choice.version]:
            # While it waited, the same content in another request may have been judged.
            company, _, refused = self._quarantine.split([item])
            if refused:
                self._poisoned(request, index)
                return
            try:
                scored = await self._call(handle, choice, request, [index], alone=not company)
            except ReplicaDiedError as exc:
                if exc.by_order:
                    raise
                self._recorder.add(DEATHS, cause="crash")
                self._convict(request, index)
                return
            except (OverloadedError, DeadlineError) as exc:
                if not request.answers:
                    raise
                request.refuse(index, "overloaded" if isinstance(exc, OverloadedError) else "deadline_exceeded", exc.problem)
                return
        (result,) = scored.results
        if _interrupted(result):
            self._convict(request, index)
            return
        self._quarantine.clear(item)
        request.take(scored, [index])

    def _convict(self, request: _Request, index: int) -> None:
        self._quarantine.convict(request.items[index])
        logger.error("an item of request %s was there when two replicas died, the second time alone; it is refused now", request.request_id)
        self._poisoned(request, index)

    def _poisoned(self, request: _Request, index: int) -> None:
        self._recorder.add(POISONED_ITEMS)
        request.refuse(index, "poisoned", "replicas died when they computed this item; it is refused for a while")

    async def _call(
        self, handle: ScorerHandle, choice: Choice, request: _Request, indices: Sequence[int], *, alone: bool = False
    ) -> ScoredCall:
        call = ScoreCall([request.items[i] for i in indices], request_id=request.request_id, caller=request.caller, alone=alone)
        tries_left, scored = self._num_tries(choice), None
        while scored is None:
            sent = handle.score(replace(call, budget_s=self._budget_s(request)))
            try:
                scored = await sent if alone else await self._flights.follow((choice.model, choice.version), sent)
            except OverloadedError:
                tries_left -= 1
                if not tries_left:
                    raise
                self._recorder.add(REPEATS, reason="overloaded")
            else:
                if scored is None:
                    self._recorder.add(REPEATS, reason="moved")
        if scored.version != choice.version or len(scored.results) != len(indices):
            raise ServerError(
                f"version {choice.version} of {choice.model} was asked for {len(indices)} items, and {len(scored.results)} results of "
                f"version {scored.version} came back",
                remedy="publish the model again; nothing of this is given to the caller",
            )
        return scored

    def _num_tries(self, choice: Choice) -> int:
        release = self._view.release(choice.model, choice.version)
        return 1 if release is None else min(release.config.max_replicas, MAX_OVERLOADED_TRIES)

    def _budget_s(self, request: _Request) -> float | None:
        if request.deadline is None:
            return None
        left_s = max(0.0, request.deadline - self._clock())
        return left_s - min(REPLY_S, REPLY_SHARE * left_s)

    def stats(self) -> Stats:
        """What was counted since the start."""
        self._recorder.set(QUARANTINED, self._quarantine.num_convicts)
        if self._view.table is not None:
            self._recorder.set(TABLE_GENERATION, self._view.table.generation)
            self._recorder.set(TABLE_AGE, self._view.age_s)
        return self._recorder.stats()

    async def close(self) -> None:
        """End what runs in the background."""
        await self._view.close()
        await self._shadows.close()


def _interrupted(result: ItemResult) -> bool:
    return result.error is not None and result.error.code == "interrupted"
