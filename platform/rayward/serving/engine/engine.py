"""The engine of a replica: items of calls are encoded beside the compute thread, computed with whatever waits, and answered one by one.

    event loop   score(call)  --Job-->  encoder processes  --Entry-->  Backlog  --forward-->  finishing  --result-->  event loop
                 [theirs]               [one thread each]             [compute thread]        [a thread]

The compute thread takes the next forward from the backlog as soon as the last one has ended, and never waits for a reply. Knows no Ray; a
model is whatever keeps `UnitModel`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from rayward.config.scoring import ReplicaConfig
from rayward.contract.conversation import strings_in, turns_of
from rayward.errors import OverloadedError, ServerError, UnavailableError
from rayward.scoring.units import EncodedItem, UnitModel, Values
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoreCall, ScoredCall, Stats
from rayward.serving.engine.backlog import Backlog, Entry
from rayward.serving.engine.compute import INTERRUPTED, Computed, compute, interrupted
from rayward.serving.engine.counts import Counts
from rayward.serving.engine.encoders import Encoders, Job
from rayward.serving.engine.fair import FairQueue
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult, ScoreItem

logger = logging.getLogger("ray.serve")

FORWARD_S = 0.1
"""Seconds that a forward over several units should take at the measured speed, within the token budget: who comes next waits no longer."""

FEW_TOKENS = 512
"""Below these a forward is not made smaller, however slow: its overhead would show."""

FIRST_TOKENS = 2048
"""Tokens of a forward while the speed is not known."""

CHARS_PER_TOKEN = 4.0
"""Before the first items are encoded."""

TEXT_CHARS = 32
"""What a text costs besides its characters, on its way to a process."""

SHUT_DOWN = "it was shut down"

HANG_S = 900.0
"""A forward that takes longer hangs, and its replica is replaced."""


@dataclass(eq=False, slots=True)
class _Work:
    # One item of a call. `held` are the tokens that the backlog keeps room for until its units are there.
    pending: _Pending
    index: int
    item: ScoreItem
    held: int
    job: Job | None = None
    encoded: EncodedItem | None = None
    entries: list[Entry] = field(default_factory=list)
    values: list[Values | None] = field(default_factory=list)
    num_left: int = 0
    gone: bool = False
    encoded_at: float = math.nan
    started_at: float = math.nan
    ended_at: float = math.nan


@dataclass(eq=False, slots=True)
class _Pending:
    # One call. Results are set in its event loop only.
    call: ScoreCall
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    arrived: float
    deadline: float
    results: list[ItemResult | None]
    works: list[_Work] = field(default_factory=list)
    num_left: int = 0


class Engine:
    """Scores the calls of many callers with one model.

    Args:
        model: computes in one thread of the engine, and nowhere else.
        config: token budget, bounds of the queue, encoders.
        model_name: in its statistics.
        name: of this replica, in replies and statistics.
        clock: seconds, monotone.

    Raises:
        RaywardError: the encoder cannot be loaded in another process.
    """

    def __init__(
        self,
        model: UnitModel,
        config: ReplicaConfig,
        *,
        model_name: str = "",
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._config = config
        self._name = name
        self._clock = clock
        self.counts = Counts(name, model=model_name, version=model.version, normaliser=model.facts.normaliser)
        self._changed = threading.Condition()
        self._backlog = Backlog(max_tokens=config.max_queued_tokens, max_s=config.max_queue_s, padded=model.layout == "padded")
        self._chars_per_token = CHARS_PER_TOKEN
        # Items that the compute thread encodes itself, because the model is needed for it.
        self._raw: FairQueue[_Work] = FairQueue(lambda work: not work.gone)
        self._live: set[_Work] = set()
        self._finishing: SimpleQueue[tuple[list[Entry], Computed] | None] = SimpleQueue()
        self._failure: str | None = None
        self._dead = False
        self._closed = False
        self._forward_since = math.inf
        spec = model.encoder_spec()
        self._encoders = (
            None
            if spec is None
            else Encoders(
                spec,
                num_processes=config.encoder_processes,
                timeout_s=config.encoding_timeout_s,
                done=self._on_encoded,
                restarted=lambda reason: self.counts.add("encoder_restarts_total", reason=reason),
            )
        )
        if self._encoders is not None:
            self._encoders.wait_ready()
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=f"rayward-{name}", daemon=True)
            for name, run in (("compute", self._compute_loop), ("finish", self._finish_loop))
        ]
        for thread in self._threads:
            thread.start()

    async def score(self, call: ScoreCall) -> ScoredCall:
        """Rewards or errors of the call's items, in order.

        Items that were not computed when the call's budget ran out have the error `deadline_exceeded`; the others have what they have. A
        call whose task is cancelled is forgotten.

        Raises:
            OverloadedError: there is no room for it in the backlog; nothing was done.
            UnavailableError: this replica has failed and is about to be replaced.
        """
        pending = self._begin(call)
        timer = None
        if call.budget_s is not None:
            timer = pending.loop.call_later(max(call.budget_s, 0.0), self._expire, pending)
        try:
            await pending.done
        except asyncio.CancelledError:
            self._forget(pending, "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()
        results = tuple(result for result in pending.results if result is not None)
        assert len(results) == len(call.items)
        timings = self._timings(pending)
        self.counts.answered(call.items, results, timings)
        return ScoredCall(version=self._model.version, results=results, timings=timings, replica=self._name)

    def stats(self) -> Stats:
        """What was counted, and how the replica stands; never waits for a forward."""
        with self._changed:
            gauges = {
                QUEUED_TOKENS: self._backlog.queued_tokens,
                TOKENS_PER_S: self._backlog.speed.tokens_per_s,
                "queued_shadow_tokens": self._backlog.shadow_tokens,
                "queued_items": len(self._live),
                "waiting_callers": self._backlog.num_callers,
            }
        gauges["encoder_processes"] = 0 if self._encoders is None else self._encoders.num_alive
        gauges["healthy"] = self.failure is None
        for name, value in gauges.items():
            self.counts.set(name, value)
        return self.counts.stats()

    def load(self) -> dict[str, float]:
        """What the autoscaling policy reads."""
        with self._changed:
            return {QUEUED_TOKENS: float(self._backlog.queued_tokens), TOKENS_PER_S: self._backlog.speed.tokens_per_s}

    @property
    def failure(self) -> str | None:
        """Why this replica should be replaced, or None; known without waiting for anything."""
        if self._failure is not None:
            return f"a forward failed: {self._failure}"
        if self._encoders is not None and self._encoders.failure is not None:
            return self._encoders.failure
        if not self._closed and not all(thread.is_alive() for thread in self._threads):
            return "a thread of the replica ended"
        if self._clock() - self._forward_since > HANG_S:
            return f"a forward has not ended in {HANG_S:g} s"
        return None

    def check_health(self) -> None:
        """Checks what is known; a full queue is not a dead server.

        Raises:
            ServerError: the replica should be replaced.
        """
        if (failure := self.failure) is not None:
            raise ServerError(failure, remedy="none; the replica is replaced")

    def close(self) -> None:
        """Ends threads and processes; what still waits is answered with `interrupted`, what is being computed with its rewards."""
        with self._changed:
            self._closed = True
            left = self._drain()
            self._changed.notify_all()
        self._interrupt(left, SHUT_DOWN)
        if self._encoders is not None:
            self._encoders.close()
        compute_thread, finish_thread = self._threads
        compute_thread.join()
        self._finishing.put(None)
        finish_thread.join()
        self._interrupt_all(SHUT_DOWN)

    # In the event loop of the call.

    def _begin(self, call: ScoreCall) -> _Pending:
        if (failure := self.failure) is not None or self._closed:
            self.counts.add("refusals_total", reason="unavailable")
            raise UnavailableError(f"the replica is going away ({failure or 'shut down'})", remedy="retry; another replica answers")
        loop, now = asyncio.get_running_loop(), self._clock()
        deadline = math.inf if call.budget_s is None else now + call.budget_s
        pending = _Pending(call, loop, loop.create_future(), now, deadline, [None] * len(call.items), num_left=len(call.items))
        num_chars = [count_chars(item) for item in call.items]
        try:
            with self._changed:
                estimates = [math.ceil(chars / self._chars_per_token) for chars in num_chars]
                self._backlog.hold(sum(estimates), charged=call.charged)
        except OverloadedError:
            self.counts.add("refusals_total", reason="overloaded" if call.charged else "shadow")
            raise
        pending.works = [_Work(pending, i, item, held) for i, (item, held) in enumerate(zip(call.items, estimates, strict=True))]
        with self._changed:
            self._live.update(pending.works)
        if not pending.works:
            pending.done.set_result(None)
        elif self._encoders is None:
            with self._changed:
                for work in pending.works:
                    self._raw.push(call.caller, work, work.held)
                self._changed.notify_all()
        else:
            jobs = []
            for work, chars in zip(pending.works, num_chars, strict=True):
                work.job = Job(work, work.item, call.caller, chars, call.charged)
                jobs.append(work.job)
            self._encoders.submit(jobs)
        return pending

    def _settle(self, results: Sequence[tuple[_Work, ItemResult]]) -> None:
        for work, result in results:
            pending = work.pending
            if pending.results[work.index] is None:
                pending.results[work.index] = result
                pending.num_left -= 1
                if not pending.num_left and not pending.done.done():
                    pending.done.set_result(None)

    def _expire(self, pending: _Pending) -> None:
        if pending.done.done():
            return
        self._forget(pending, "deadline")
        self._settle([(work, _too_late()) for work in pending.works if pending.results[work.index] is None])

    def _forget(self, pending: _Pending, reason: str) -> None:
        # Nobody waits for the rest of the call any more.
        num_dropped = 0
        with self._changed:
            for work in pending.works:
                if not work.gone:
                    num_dropped += sum(self._backlog.discard(entry) for entry in work.entries)
                    self._leave(work)
        if num_dropped:
            self.counts.add("dropped_units_total", num_dropped, reason=reason)

    def _timings(self, pending: _Pending) -> Timings:
        encoded = [work.encoded_at for work in pending.works if work.encoded_at == work.encoded_at]
        computed = [work for work in pending.works if work.ended_at == work.ended_at]
        return Timings(
            queue_s=max((work.started_at - work.encoded_at for work in computed), default=0.0),
            encode_s=max(encoded, default=pending.arrived) - pending.arrived,
            compute_s=max(work.ended_at for work in computed) - min(work.started_at for work in computed) if computed else 0.0,
            total_s=self._clock() - pending.arrived,
        )

    # In any thread.

    def _leave(self, work: _Work) -> None:
        # Under the lock. The work takes no room any more, whatever becomes of its call.
        work.gone = True
        if work.job is not None:
            work.job.gone = True
        self._backlog.release(work.held, charged=work.pending.call.charged)
        work.held = 0
        self._live.discard(work)

    def _deliver(self, results: Sequence[tuple[_Work, ItemResult]]) -> None:
        with self._changed:
            for work, _ in results:
                if not work.gone:
                    self._leave(work)
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Work, ItemResult]]] = {}
        for work, result in results:
            loops.setdefault(work.pending.loop, []).append((work, result))
        for loop, part in loops.items():
            try:
                loop.call_soon_threadsafe(self._settle, part)
            except RuntimeError:
                # The loop is closed, and whoever waited in it is gone.
                logger.info("%d results have nobody to go to", len(part))

    def _interrupt(self, works: Iterable[_Work], failure: str) -> None:
        self._deliver([(work, ItemResult(error=interrupted(failure))) for work in works])

    def _interrupt_all(self, failure: str) -> None:
        with self._changed:
            left = list(self._live)
            for work in left:
                for entry in work.entries:
                    self._backlog.discard(entry)
        self._interrupt(left, failure)

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        # Broad on purpose: whoever waits for this thread would wait for ever.
        except BaseException as exc:
            logger.exception("a thread of the replica ended")
            self._failure, self._dead = type(exc).__name__, True
            self._interrupt_all(self._failure)

    def _drain(self) -> list[_Work]:
        # Under the lock: all that waits for the compute thread.
        found = {entry.owner[0]: None for entry in self._backlog.drain()}
        while (work := self._raw.pop()) is not None:
            found[work] = None
        return [work for work in found if not work.gone]

    def _on_encoded(self, encoded: Sequence[tuple[Job, EncodedItem]]) -> None:
        failed: list[tuple[_Work, ItemResult]] = []
        with self._changed:
            for job, found in encoded:
                work: _Work = job.owner
                if not work.gone:
                    self._enqueue(work, found, job.num_chars, failed)
            self._changed.notify_all()
        if failed:
            self._deliver(failed)

    def _enqueue(self, work: _Work, encoded: EncodedItem, num_chars: int, failed: list[tuple[_Work, ItemResult]]) -> None:
        call = work.pending.call
        work.encoded_at = self._clock()
        if encoded.error is not None or not encoded.units:
            error = encoded.error or ItemError.of("failed", "it became no tokens")
            failed.append((work, ItemResult(error=error, taken_as=encoded.taken_as)))
            return
        if self._dead or self._closed:
            failed.append((work, ItemResult(error=interrupted(self._failure or SHUT_DOWN))))
            return
        work.encoded = encoded
        work.values = [None] * len(encoded.units)
        work.num_left = len(encoded.units)
        work.entries = [
            Entry((work, index), unit, call.caller, work.pending.deadline, call.charged, call.alone)
            for index, unit in enumerate(encoded.units)
        ]
        self._backlog.release(work.held, charged=call.charged)
        work.held = 0
        self._backlog.put(work.entries)
        # The texts that were seen last count most.
        self._chars_per_token += 0.02 * (min(max(num_chars / max(encoded.num_tokens, 1), 0.5), 16.0) - self._chars_per_token)

    # In the compute thread.

    def _compute_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._backlog) or len(self._raw))
                if self._closed:
                    return
                raw = self._next_raw()
                taken = self._backlog.take(self._budget(), self._clock())
            if raw:
                self._encode_here(raw)
            if taken.expired:
                self.counts.add("dropped_units_total", len(taken.expired), reason="deadline")
                late = {entry.owner[0]: None for entry in taken.expired}
                self._deliver([(work, _too_late()) for work in late])
            if taken.entries:
                self._forward(taken.entries, taken.num_tokens)

    def _budget(self) -> int:
        budget, speed = self._config.tokens_per_batch, self._backlog.speed.tokens_per_s
        return min(budget, max(round(speed * FORWARD_S), FEW_TOKENS) if speed else FIRST_TOKENS)

    def _next_raw(self) -> list[_Work]:
        # Under the lock: about as many as one forward takes, because critiques of several items are written together.
        found: list[_Work] = []
        while sum(work.held for work in found) < self._config.tokens_per_batch and (work := self._raw.pop()) is not None:
            found.append(work)
        return found

    def _encode_here(self, works: list[_Work]) -> None:
        start = self._forward_since = self._clock()
        try:
            encoded = self._model.encode([work.item for work in works])
        # Broad on purpose: a model answers for what its items do; what it raises is the device's.
        except Exception as exc:
            logger.exception("%d items could not be encoded", len(works))
            self._failure = type(exc).__name__
            encoded = [EncodedItem(work.item, error=interrupted(self._failure)) for work in works]
        self._forward_since = math.inf
        self.counts.add("compute_seconds_total", self._clock() - start)
        jobs = [Job(work, work.item, work.pending.call.caller, count_chars(work.item)) for work in works]
        self._on_encoded(list(zip(jobs, encoded, strict=True)))

    def _forward(self, entries: list[Entry], num_tokens: int) -> None:
        start = self._forward_since = self._clock()
        computed = compute(self._model, [entry.unit for entry in entries])
        end = self._clock()
        self._forward_since = math.inf
        left: list[_Work] = []
        with self._changed:
            for entry in entries:
                self._backlog.release(entry.num_tokens, charged=entry.charged)
                work: _Work = entry.owner[0]
                work.started_at = min(start, work.started_at) if work.started_at == work.started_at else start
                work.ended_at = end
            if computed.failure is None:
                self._backlog.speed.add(num_tokens, end - start)
            else:
                self._failure = computed.failure
                if not computed.any_good:
                    self._dead = True
                    left = self._drain()
        self._finishing.put((entries, computed))
        self._interrupt(left, computed.failure or "")
        self.counts.forward(num_units=len(entries), num_tokens=num_tokens, budget=self._config.tokens_per_batch, seconds=end - start)

    # In the finishing thread.

    def _finish_loop(self) -> None:
        while (batch := self._finishing.get()) is not None:
            entries, computed = batch
            results = []
            for entry, value in zip(entries, computed.values, strict=True):
                work, index = entry.owner
                work.values[index] = value
                work.num_left -= 1
                if not work.num_left and not work.gone:
                    results.append((work, self._finish(work)))
            if results:
                self._deliver(results)

    def _finish(self, work: _Work) -> ItemResult:
        assert work.encoded is not None
        values = [value for value in work.values if value is not None]
        lost = next((value for value in values if isinstance(value, ItemError) and value.code == INTERRUPTED), None)
        if lost is not None:
            return ItemResult(error=lost)
        try:
            return self._model.finish(work.encoded, values)
        # Broad on purpose: the thread is for the items of everybody.
        except Exception as exc:
            logger.exception("the result of an item could not be made")
            return ItemResult(error=ItemError.of("failed", f"{type(exc).__name__} while its result was made"))


def _too_late() -> ItemResult:
    return ItemResult(error=ItemError.of("deadline_exceeded", "the time of its request was up before it was computed"))


def count_chars(item: ScoreItem) -> int:
    """Characters of an item's texts, and some for every text."""
    turns = [turn for part in (item.prompt, *map(turns_of, item.completions)) for turn in part]
    given = [value for turn in turns for name, value in turn.items() if name != "role"]
    texts = strings_in((given, item.tools, item.chat_template_kwargs, item.critiques))
    return sum(len(text) + TEXT_CHARS for text in texts) + round(CHARS_PER_TOKEN) * len(item.token_ids or ())
