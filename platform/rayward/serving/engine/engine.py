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

from rayward.config.scoring import ReplicaConfig
from rayward.errors import OverloadedError, ServerError, UnavailableError
from rayward.scoring.units import EncodedItem, UnitModel
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoreCall, ScoredCall, Stats
from rayward.serving.engine.backlog import Backlog, Entry
from rayward.serving.engine.computing import Computing, interrupted, too_late
from rayward.serving.engine.counts import Counts
from rayward.serving.engine.encoders import Encoders
from rayward.serving.engine.work import CHARS_PER_TOKEN, Job, Pending, Work, count_chars
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult

logger = logging.getLogger("ray.serve")

SHUT_DOWN = "it was shut down"

HANG_S = 900.0
"""A forward that takes longer hangs, and its replica is replaced."""


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
        self._live: set[Work] = set()
        self._closed = False
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
        self._computing = Computing(
            model,
            config,
            self._backlog,
            self._changed,
            self.counts,
            clock=clock,
            deliver=self._deliver,
            encoded=self._on_encoded,
            answer_all=self._interrupt_all,
        )
        self._computing.start()

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
        computing = self._computing
        if computing.failure is not None:
            return f"a forward failed: {computing.failure}"
        if self._encoders is not None and self._encoders.failure is not None:
            return self._encoders.failure
        if not self._closed and not computing.is_alive():
            return "a thread of the replica ended"
        if self._clock() - computing.busy_since > HANG_S:
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
            left = self._computing.drain()
        self._interrupt(left, SHUT_DOWN)
        if self._encoders is not None:
            self._encoders.close()
        self._computing.close()
        self._interrupt_all(SHUT_DOWN)

    # In the event loop of the call.

    def _begin(self, call: ScoreCall) -> Pending:
        if (failure := self.failure) is not None or self._closed:
            self.counts.add("refusals_total", reason="unavailable")
            raise UnavailableError(f"the replica is going away ({failure or 'shut down'})", remedy="retry; another replica answers")
        loop, now = asyncio.get_running_loop(), self._clock()
        deadline = math.inf if call.budget_s is None else now + call.budget_s
        pending = Pending(call, loop, loop.create_future(), now, deadline, [None] * len(call.items), num_left=len(call.items))
        num_chars = [count_chars(item) for item in call.items]
        try:
            with self._changed:
                estimates = [math.ceil(chars / self._chars_per_token) for chars in num_chars]
                self._backlog.hold(sum(estimates), charged=call.charged)
        except OverloadedError:
            self.counts.add("refusals_total", reason="overloaded" if call.charged else "shadow")
            raise
        pending.works = [Work(pending, i, item, held) for i, (item, held) in enumerate(zip(call.items, estimates, strict=True))]
        with self._changed:
            self._live.update(pending.works)
        if not pending.works:
            pending.done.set_result(None)
        elif self._encoders is None:
            with self._changed:
                for work in pending.works:
                    self._computing.raw.push(call.caller, work, work.held)
                self._changed.notify_all()
        else:
            jobs = []
            for work, chars in zip(pending.works, num_chars, strict=True):
                work.job = Job(work, work.item, call.caller, chars, call.charged)
                jobs.append(work.job)
            self._encoders.submit(jobs)
        return pending

    def _settle(self, results: Sequence[tuple[Work, ItemResult]]) -> None:
        for work, result in results:
            pending = work.pending
            if pending.results[work.index] is None:
                pending.results[work.index] = result
                pending.num_left -= 1
                if not pending.num_left and not pending.done.done():
                    pending.done.set_result(None)

    def _expire(self, pending: Pending) -> None:
        if pending.done.done():
            return
        self._forget(pending, "deadline")
        self._settle([(work, too_late()) for work in pending.works if pending.results[work.index] is None])

    def _forget(self, pending: Pending, reason: str) -> None:
        # Nobody waits for the rest of the call any more.
        num_dropped = 0
        with self._changed:
            for work in pending.works:
                if not work.gone:
                    num_dropped += sum(self._backlog.discard(entry) for entry in work.entries)
                    self._leave(work)
        if num_dropped:
            self.counts.add("dropped_units_total", num_dropped, reason=reason)

    def _timings(self, pending: Pending) -> Timings:
        encoded = [work.encoded_at for work in pending.works if work.encoded_at == work.encoded_at]
        computed = [work for work in pending.works if work.ended_at == work.ended_at]
        return Timings(
            queue_s=max((work.started_at - work.encoded_at for work in computed), default=0.0),
            encode_s=max(encoded, default=pending.arrived) - pending.arrived,
            compute_s=max(work.ended_at for work in computed) - min(work.started_at for work in computed) if computed else 0.0,
            total_s=self._clock() - pending.arrived,
        )

    # In any thread.

    def _leave(self, work: Work) -> None:
        # Under the lock. The work takes no room any more, whatever becomes of its call.
        work.gone = True
        if work.job is not None:
            work.job.gone = True
        self._backlog.release(work.held, charged=work.pending.call.charged)
        work.held = 0
        self._live.discard(work)

    def _deliver(self, results: Sequence[tuple[Work, ItemResult]]) -> None:
        with self._changed:
            for work, _ in results:
                if not work.gone:
                    self._leave(work)
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Work, ItemResult]]] = {}
        for work, result in results:
            loops.setdefault(work.pending.loop, []).append((work, result))
        for loop, part in loops.items():
            try:
                loop.call_soon_threadsafe(self._settle, part)
            except RuntimeError:
                # The loop is closed, and whoever waited in it is gone.
                logger.info("%d results have nobody to go to", len(part))

    def _interrupt(self, works: Iterable[Work], failure: str) -> None:
        self._deliver([(work, ItemResult(error=interrupted(failure))) for work in works])

    def _interrupt_all(self, failure: str) -> None:
        with self._changed:
            left = list(self._live)
            for work in left:
                for entry in work.entries:
                    self._backlog.discard(entry)
        self._interrupt(left, failure)

    def _on_encoded(self, encoded: Sequence[tuple[Job, EncodedItem]]) -> None:
        failed: list[tuple[Work, ItemResult]] = []
        with self._changed:
            for job, found in encoded:
                work: Work = job.owner
                if not work.gone:
                    self._enqueue(work, found, job.num_chars, failed)
            self._changed.notify_all()
        if failed:
            self._deliver(failed)

    def _enqueue(self, work: Work, encoded: EncodedItem, num_chars: int, failed: list[tuple[Work, ItemResult]]) -> None:
        call = work.pending.call
        work.encoded_at = self._clock()
        if encoded.error is not None or not encoded.units:
            error = encoded.error or ItemError.of("failed", "it became no tokens")
            failed.append((work, ItemResult(error=error, taken_as=encoded.taken_as)))
            return
        if self._computing.is_dead or self._closed:
            failed.append((work, ItemResult(error=interrupted(self._computing.failure or SHUT_DOWN))))
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
