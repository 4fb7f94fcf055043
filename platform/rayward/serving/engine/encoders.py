"""Processes that render and tokenize beside the compute thread, so that neither Python's lock nor a template that loops can hold it up.

One thread here holds each process. A process works on one item at a time; the one it does not finish in time dies with it and fails alone,
and the few behind it go to another process. While an item is slow, a process more is started, so that one slow text holds up nobody.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rayward.errors import RaywardError, ServerError
from rayward.scoring.units import EncodedItem, EncoderSpec
from rayward.serving.engine.encoder_handle import GONE, EncoderHandle
from rayward.serving.engine.encoder_process import STAND_IN
from rayward.serving.engine.fair import FairQueue
from rayward.serving.engine.work import Job
from rayward.wire.items import ItemError

logger = logging.getLogger("ray.serve")

SLOW_S = 0.5
"""An item that takes longer is slow: the items behind it go elsewhere."""

NUM_SPARE = 2
"""Processes beyond those configured that slow items may cause to be started."""

SPARE_S = 60.0

SLOW_PER_CALLER = 2
"""Slow items of one caller at a time; its others wait, and those of other callers go first."""

AHEAD = 16
"""Items that a process is given beforehand."""

AHEAD_CHARS = 32_000
"""Characters of these; below what a socket holds, so that neither side ever waits for the other to read."""

START_S = 180.0
"""A process whose tokenizer is not loaded by then has failed to start."""

START_TRIES = 3
"""Starts in a row that may fail."""

MEMORY_BYTES = 4 * 2**30


@dataclass(eq=False, slots=True)
class _Slot:
    # One process and what it was given; `moved` were given to another one since.
    process: EncoderHandle
    given: deque[tuple[int, Job]] = field(default_factory=deque)
    moved: set[int] = field(default_factory=set)
    slow: str | None = None
    retired: bool = False
    answers: list[tuple[Job, EncodedItem]] = field(default_factory=list)


class Encoders:
    """The processes and the queue before them.

    Args:
        spec: makes the encoder in a process.
        num_processes: that work when no item is slow.
        timeout_s: longest time of one item.
        done: told of encoded items, in a thread of this pool.
        restarted: told why a process is replaced: `timeout`, `died`.
        memory_bytes: what a process may take beyond what its tokenizer needs; an item that takes more fails by itself.
        spare_s: how long a process that is one too many stays, idle, for the next slow item.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        num_processes: int,
        timeout_s: float,
        done: Callable[[Sequence[tuple[Job, EncodedItem]]], None],
        restarted: Callable[[str], None] = lambda reason: None,
        memory_bytes: int = MEMORY_BYTES,
        spare_s: float = SPARE_S,
    ) -> None:
        self._spec = pickle.dumps(spec)
        self._memory_bytes = memory_bytes
        self._spare_s = spare_s
        self._num_processes = num_processes
        self._timeout_s = timeout_s
        self._done = done
        self._changed = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue(_waits)
        self._uncharged: FairQueue[Job] = FairQueue(_waits)
        # Items whose process died; the next one has nothing else meanwhile.
        self._again: deque[Job] = deque()
        self._slow: dict[str, int] = {}
        self._threads: set[threading.Thread] = set()
        self._num_started = 0
        self._pids: set[int] = set()
        self._num_ready = 0
        self._closed = False
        self._failure: str | None = None
        self._start_error: RaywardError | None = None
        self._restarted = restarted
        with self._changed:
            for _ in range(num_processes):
                self._start_thread()

    def wait_ready(self) -> None:
        """Until every process has loaded its tokenizer.

        Raises:
            RaywardError: one of them cannot, and why.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_ready >= self._num_processes or self._failure is not None)
            if self._failure is not None:
                raise self._start_error or ServerError(self._failure, remedy="look into the log of the replica")

    @property
    def failure(self) -> str | None:
        """Why no process can be started any more, or None."""
        return self._failure

    @property
    def num_alive(self) -> int:
        """Processes that have loaded their tokenizer."""
        return self._num_ready

    @property
    def pids(self) -> set[int]:
        """Of the processes."""
        with self._changed:
            return set(self._pids)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Items at the end of their caller's."""
        with self._changed:
            if self._failure is None and not self._closed:
                for job in jobs:
                    (self._queue if job.charged else self._uncharged).push(job.caller, job, job.cost)
                self._changed.notify(len(jobs))
                return
        self._done([(job, _lost(job)) for job in jobs])

    def close(self) -> None:
        """Ends the processes; what waits is told that they are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in list(self._threads):
            thread.join()

    def _start_thread(self) -> None:
        self._num_started += 1
        thread = threading.Thread(target=self._run, name=f"encoder-{self._num_started}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _run(self) -> None:
        try:
            self._run_processes()
        # Broad on purpose: whoever waits for this thread would wait for ever.
        except BaseException as exc:
            logger.exception("a thread of the encoders ended")
            self._fail(type(exc).__name__)
        with self._changed:
            self._threads.discard(threading.current_thread())
        if self._closed or self._failure is not None:
            self._give_up()

    def _run_processes(self) -> None:
        failures, retired = 0, False
        while not (retired or self._closed or self._failure is not None):
            process = EncoderHandle(self._spec, self._memory_bytes)
            try:
                with self._changed:
                    self._pids.add(process.pid)
                error = process.start_error(START_S, lambda: self._closed)
                if error is None:
                    failures, retired = 0, self._work(process)
                    continue
            finally:
                with self._changed:
                    self._pids.discard(process.pid)
                process.end()
            failures += 1
            logger.error("an encoder process does not start: %s", error)
            if failures >= START_TRIES or isinstance(error, RaywardError):
                self._fail(error)

    def _work(self, process: EncoderHandle) -> bool:
        # Until it ends or is one too many, which is what is returned.
        slot = _Slot(process)
        with self._changed:
            self._num_ready += 1
            self._changed.notify_all()
        try:
            self._serve(slot)
        finally:
            self._put_back(slot)
            with self._changed:
                self._num_ready -= 1
        return slot.retired

    def _serve(self, slot: _Slot) -> None:
        ticket, since = 0, 0.0
        while (fresh := self._take(slot)) is not None:
            since = since if slot.given else time.monotonic()
            numbered = [(ticket + index, job) for index, job in enumerate(fresh)]
            ticket += len(fresh)
            slot.given.extend(numbered)
            try:
                if fresh:
                    slot.process.send([(number, job.item) for number, job in numbered])
                if not self._is_answered(slot, since):
                    return
                for number, encoded in slot.process.answers():
                    self._answered(slot, number, encoded)
            except GONE:
                self._tell(slot)
                self._died(slot)
                return
            since = time.monotonic()
            self._is_quick(slot)
            self._tell(slot)

    def _is_answered(self, slot: _Slot, since: float) -> bool:
        # False: closed, or the process was ended over the item that it has worked on since then.
        if slot.process.wait(min(SLOW_S, self._timeout_s), lambda: self._closed):
            return True
        if self._closed:
            return False
        self._is_slow(slot)
        _, job = slot.given[0]
        if slot.process.wait(since + self._timeout_s - time.monotonic(), lambda: self._closed or job.gone):
            return True
        if not self._closed:
            self._timed_out(slot)
        return False

    def _take(self, slot: _Slot) -> list[Job] | None:
        # None: there is nothing to serve any more. An empty list: the process has enough of what it was given beforehand.
        with self._changed:
            while True:
                if self._closed or self._failure is not None:
                    return None
                fresh: list[Job] = []
                num_chars = sum(job.num_chars for _, job in slot.given)
                while len(slot.given) + len(fresh) < AHEAD and (job := self._next(slot, fresh, num_chars)) is not None:
                    fresh.append(job)
                    num_chars += job.num_chars
                    if job.deaths:
                        break
                if fresh or slot.given:
                    return fresh
                if not self._changed.wait(self._spare_s) and len(self._threads) > self._num_processes:
                    # Out of the count at once, so that no second one goes for the same reason.
                    self._threads.discard(threading.current_thread())
                    slot.retired = True
                    return None

    def _next(self, slot: _Slot, fresh: list[Job], num_chars: int) -> Job | None:
        busy = bool(slot.given or fresh)
        if any(job.deaths for _, job in slot.given):
            return None
        while self._again:
            if busy:
                return None
            job = self._again.popleft()
            if not job.gone:
                return job
        for queue in (self._queue, self._uncharged):
            found = queue.pop(lambda caller: self._slow.get(caller, 0) < SLOW_PER_CALLER)
            if found is not None and busy and num_chars + found.num_chars > AHEAD_CHARS:
                queue.push(found.caller, found, found.cost, first=True)
                return None
            if found is not None:
                return found
        return None

    def _is_slow(self, slot: _Slot) -> None:
        with self._changed:
            slot.slow = slot.given[0][1].caller
            self._slow[slot.slow] = self._slow.get(slot.slow, 0) + 1
            behind = [(number, job) for number, job in list(slot.given)[1:] if number not in slot.moved]
            slot.moved.update(number for number, _ in behind)
            self._first([job for _, job in behind])
            num_slow = sum(self._slow.values())
            if len(self._threads) - num_slow < self._num_processes and len(self._threads) < self._num_processes + NUM_SPARE:
                self._start_thread()
            self._changed.notify_all()

    def _is_quick(self, slot: _Slot) -> None:
        if slot.slow is None:
            return
        with self._changed:
            self._slow[slot.slow] -= 1
            if not self._slow[slot.slow]:
                del self._slow[slot.slow]
            slot.slow = None
            self._changed.notify_all()

    def _answered(self, slot: _Slot, number: int, encoded: EncodedItem) -> None:
        expected, job = slot.given.popleft()
        assert expected == number
        if number in slot.moved:
            slot.moved.discard(number)
        else:
            slot.answers.append((job, replace(encoded, item=job.item) if encoded.item == STAND_IN else encoded))

    def _tell(self, slot: _Slot) -> None:
        answers, slot.answers = slot.answers, []
        if answers:
            self._done(answers)

    def _timed_out(self, slot: _Slot) -> None:
        # Or nobody waits for the item any more.
        self._restarted("timeout")
        slot.process.end()
        self._is_quick(slot)
        number, job = slot.given.popleft()
        moved = number in slot.moved
        self._put_back(slot)
        if moved or job.gone:
            return
        logger.warning("an item of %d characters was not encoded in %g s; its process is replaced", job.num_chars, self._timeout_s)
        message = f"rendering and tokenizing it did not end within {self._timeout_s:g} s"
        self._done([(job, EncodedItem(job.item, error=ItemError.of("encoding_timeout", message)))])

    def _died(self, slot: _Slot) -> None:
        self._restarted("died")
        self._is_quick(slot)
        status = slot.process.end()
        logger.error("an encoder process ended with %s", status)
        if not slot.given:
            return
        number, job = slot.given.popleft()
        if number in slot.moved:
            self._put_back(slot)
            return
        job.deaths += 1
        if job.deaths < 2:
            with self._changed:
                self._again.append(job)
        self._put_back(slot)
        if job.deaths >= 2:
            message = f"the process that made it into tokens ended with {status}, twice"
            self._done([(job, EncodedItem(job.item, error=ItemError.of("failed", message)))])

    def _put_back(self, slot: _Slot) -> None:
        with self._changed:
            self._first([job for number, job in slot.given if number not in slot.moved])
            slot.given.clear()
            slot.moved.clear()
            self._changed.notify_all()

    def _first(self, jobs: Sequence[Job]) -> None:
        for job in reversed(jobs):
            (self._queue if job.charged else self._uncharged).push(job.caller, job, job.cost, first=True)

    def _fail(self, error: object) -> None:
        with self._changed:
            self._failure = f"encoder processes do not start: {error}"
            self._start_error = error if isinstance(error, RaywardError) else None
            self._changed.notify_all()

    def _give_up(self) -> None:
        with self._changed:
            lost = [job for job in self._again if not job.gone]
            self._again.clear()
            for queue in (self._queue, self._uncharged):
                while (job := queue.pop()) is not None:
                    lost.append(job)
        if lost:
            self._done([(job, _lost(job)) for job in lost])


def _waits(job: Job) -> bool:
    return not job.gone


def _lost(job: Job) -> EncodedItem:
    return EncodedItem(job.item, error=ItemError.of("encoder_lost", "the processes that render and tokenize are gone"))
