"""The two threads of a replica that follow the model: one computes whatever waits, the other makes results of what was computed."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from rayward.config.scoring import ReplicaConfig
from rayward.scoring.units import EncodedItem, Unit, UnitModel, Values
from rayward.serving.engine.backlog import Backlog, Entry
from rayward.serving.engine.counts import Counts
from rayward.serving.engine.fair import FairQueue
from rayward.serving.engine.work import Job, Work, count_chars
from rayward.wire.items import ItemError, ItemResult

logger = logging.getLogger("ray.serve")

INTERRUPTED = "interrupted"

FORWARD_S = 0.1
"""Seconds that a forward over several units should take at the measured speed, within the token budget: who comes next waits no longer."""

FEW_TOKENS = 512
"""Below these a forward is not made smaller, however slow: its overhead would show."""

FIRST_TOKENS = 2048
"""Tokens of a forward while the speed is not known."""


def too_late() -> ItemResult:
    """Of an item whose request ran out of time."""
    return ItemResult(error=ItemError.of("deadline_exceeded", "the time of its request was up before it was computed"))


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of the units of one forward.

    Attributes:
        values: of each unit; where the device failed, the error `interrupted`, which another replica may not meet.
        failure: why this replica should be replaced, or None.
        any_good: whether the device gave values for any of them.
    """

    values: list[Values]
    failure: str | None = None
    any_good: bool = True


def interrupted(failure: str) -> ItemError:
    """The error of an item that a replica could not compute, through no fault that is known of the item."""
    return ItemError.of(INTERRUPTED, f"the replica failed while it was computed ({failure}); it is replaced")


def compute(model: UnitModel, units: Sequence[Unit]) -> Computed:
    """The values of all units in one forward; where that raises, of each in a forward of its own, once.

    A model answers for what its units do; what it raises for a single one is the device's: broken, or out of memory.
    """
    try:
        return Computed(model.forward(units))
    # Broad on purpose: the units are those of different callers.
    except Exception as exc:
        failure = type(exc).__name__
        logger.exception("%d units failed together%s", len(units), "; each is repeated alone" if len(units) > 1 else "")
    # Outside the handler: the exception holds the tensors of the failed forward.
    if len(units) == 1:
        return Computed([interrupted(failure)], failure, any_good=False)
    values: list[Values] = []
    lone_failure, any_good = None, False
    for unit in units:
        alone = compute(model, [unit])
        values += alone.values
        any_good |= alone.any_good
        lone_failure = lone_failure or alone.failure
    return Computed(values, lone_failure, any_good)


class Computing:
    """Takes the next forward from the backlog as soon as the last one has ended, and never waits for a reply.

    Args:
        model: used by the compute thread only; `finish` by the other one.
        changed: guards the backlog, `raw` and every Work; notified when one of them has more.
        deliver: takes results to their callers.
        encoded: takes what the compute thread has encoded itself.
        answer_all: answers everybody, when a thread ends that should not.
    """

    def __init__(
        self,
        model: UnitModel,
        config: ReplicaConfig,
        backlog: Backlog,
        changed: threading.Condition,
        counts: Counts,
        *,
        clock: Callable[[], float],
        deliver: Callable[[Sequence[tuple[Work, ItemResult]]], None],
        encoded: Callable[[Sequence[tuple[Job, EncodedItem]]], None],
        answer_all: Callable[[str], None],
    ) -> None:
        self._model, self._config, self._backlog, self._changed, self._counts = model, config, backlog, changed, counts
        self._clock, self._deliver, self._encoded, self._answer_all = clock, deliver, encoded, answer_all
        # Items that the compute thread encodes itself, because the model is needed for it.
        self.raw: FairQueue[Work] = FairQueue(lambda work: not work.gone)
        self.failure: str | None = None
        """Why the replica should be replaced."""
        self.is_dead = False
        """The device gives no values any more."""
        self.busy_since = math.inf
        """When the forward that runs began."""
        self._closed = False
        self._computed: SimpleQueue[tuple[list[Entry], Computed] | None] = SimpleQueue()
        runs = (("compute", self._compute_loop), ("finish", self._finish_loop))
        self._threads = [threading.Thread(target=self._guarded, args=(run,), name=f"rayward-{name}", daemon=True) for name, run in runs]

    def start(self) -> None:
        """Begin to compute."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Let the forward that runs end, with results, and no other one begin."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        computing, finishing = self._threads
        computing.join()
        self._computed.put(None)
        finishing.join()

    def drain(self) -> list[Work]:
        """All that waits for the compute thread; under the lock."""
        found: dict[Work, None] = {entry.owner[0]: None for entry in self._backlog.drain()}
        while (work := self.raw.pop()) is not None:
            found[work] = None
        return [work for work in found if not work.gone]

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        # Broad on purpose: whoever waits for this thread would wait for ever.
        except BaseException as exc:
            logger.exception("a thread of the replica ended")
            self.failure, self.is_dead = type(exc).__name__, True
            self._answer_all(self.failure)

    # In the compute thread.

    def _compute_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._backlog) or len(self.raw))
                if self._closed:
                    return
                raw = self._next_raw()
                taken = self._backlog.take(self._budget(), self._clock())
            if raw:
                self._encode(raw)
            if taken.expired:
                self._counts.add("dropped_units_total", len(taken.expired), reason="deadline")
                late = {entry.owner[0]: None for entry in taken.expired}
                self._deliver([(work, too_late()) for work in late])
            if taken.entries:
                self._forward(taken.entries, taken.num_tokens)

    def _budget(self) -> int:
        budget, speed = self._config.tokens_per_batch, self._backlog.speed.tokens_per_s
        return min(budget, max(round(speed * FORWARD_S), FEW_TOKENS) if speed else FIRST_TOKENS)

    def _next_raw(self) -> list[Work]:
        # About as many as one forward takes, because critiques of several items are written together.
        found: list[Work] = []
        while sum(work.held for work in found) < self._config.tokens_per_batch and (work := self.raw.pop()) is not None:
            found.append(work)
        return found

    def _encode(self, works: list[Work]) -> None:
        start = self.busy_since = self._clock()
        try:
            encoded = self._model.encode([work.item for work in works])
        # Broad on purpose: a model answers for what its items do; what it raises is the device's.
        except Exception as exc:
            logger.exception("%d items could not be encoded", len(works))
            self.failure = type(exc).__name__
            encoded = [EncodedItem(work.item, error=interrupted(self.failure)) for work in works]
        self.busy_since = math.inf
        self._counts.add("compute_seconds_total", self._clock() - start)
        jobs = [Job(work, work.item, work.pending.call.caller, count_chars(work.item)) for work in works]
        self._encoded(list(zip(jobs, encoded, strict=True)))

    def _forward(self, entries: list[Entry], num_tokens: int) -> None:
        start = self.busy_since = self._clock()
        computed = compute(self._model, [entry.unit for entry in entries])
        end = self._clock()
        self.busy_since = math.inf
        left: list[Work] = []
        with self._changed:
            for entry in entries:
                self._backlog.release(entry.num_tokens, charged=entry.charged)
                work: Work = entry.owner[0]
                work.started_at = start if math.isnan(work.started_at) else work.started_at
                work.ended_at = end
            if computed.failure is None:
                self._backlog.speed.add(num_tokens, end - start)
            else:
                self.failure = computed.failure
                if not computed.any_good:
                    self.is_dead = True
                    left = self.drain()
        self._computed.put((entries, computed))
        self._deliver([(work, ItemResult(error=interrupted(computed.failure or ""))) for work in left])
        self._counts.forward(num_units=len(entries), num_tokens=num_tokens, budget=self._config.tokens_per_batch, seconds=end - start)

    # In the finishing thread.

    def _finish_loop(self) -> None:
        while (batch := self._computed.get()) is not None:
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

    def _finish(self, work: Work) -> ItemResult:
        assert work.encoded is not None
        values = [value for value in work.values if value is not None]
        lost = next((value for value in values if isinstance(value, ItemError) and value.code == INTERRUPTED), None)
        if lost is not None:
            return ItemResult(error=lost)
        try:
            return self._model.finish(work.encoded, values)
        # Broad on purpose: the thread is for the items of everybody.
        except Exception as exc:
            logger.error("the result of an item could not be made: %s", type(exc).__name__)
            return ItemResult(error=ItemError.of("failed", f"{type(exc).__name__} while its result was made"))
