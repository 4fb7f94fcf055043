"""A queue that is fair between callers by cost, and first come, first served within one."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")
REMEMBERED_CALLERS = 10_000
"""Callers that wait for nothing and whose account is kept; it is forgotten earlier where the others have caught up."""


@dataclass(eq=False, slots=True)
class _Lane(Generic[T]):
    caller: str
    used: float
    entries: deque[tuple[T, float]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Whose turn it is: of the callers that wait, the one that has been given least so far (start-time fair queueing).

    Who begins to wait, or waits again, starts level with whoever has least: nobody saves up turns, and nobody is made to wait by the
    thousands that another has queued. Costs are of any one unit.

    Args:
        wanted: of an entry that waits; where nobody wants it any more, it is let go of when its turn comes, and costs nothing.
    """

    def __init__(self, wanted: Callable[[T], bool] = lambda entry: True) -> None:
        self._wanted = wanted
        self._lanes: dict[str, _Lane[T]] = {}
        self._turns: list[tuple[float, int, _Lane[T]]] = []
        self._order = count()
        self._level = 0.0
        # What callers had used when they last waited, for as long as that is more than the others have.
        self._used: dict[str, float] = {}
        self._size = 0

    def __len__(self) -> int:
        """Entries, with those that nobody wants any more and whose turn has not come."""
        return self._size

    @property
    def num_callers(self) -> int:
        """Callers that wait."""
        return len(self._lanes)

    def push(self, caller: str, entry: T, cost: float, *, first: bool = False) -> None:
        """An entry at the end of its caller's, or before them: what was popped for nothing, whose cost is given back."""
        lane = self._lanes.get(caller)
        if lane is None:
            lane = self._lanes[caller] = _Lane(caller, max(self._level, self._used.pop(caller, 0.0)))
        if first:
            lane.entries.appendleft((entry, cost))
            lane.used -= cost
        else:
            lane.entries.append((entry, cost))
        self._size += 1
        if first or len(lane.entries) == 1:
            self._wait(lane, first=first)

    def pop(self, may: Callable[[str], bool] = lambda caller: True) -> T | None:
        """The next entry of the callers that may have one."""
        passed_over: list[_Lane[T]] = []
        found: T | None = None
        while self._turns:
            used, _, lane = heapq.heappop(self._turns)
            if lane.used != used or self._lanes.get(lane.caller) is not lane:
                # An older place in the order.
                continue
            if not may(lane.caller):
                passed_over.append(lane)
                continue
            while lane.entries and not self._wanted(lane.entries[0][0]):
                lane.entries.popleft()
                self._size -= 1
            if not lane.entries:
                self._leave(lane)
                continue
            found, cost = lane.entries.popleft()
            self._size -= 1
            self._level = max(self._level, used)
            lane.used = used + cost
            if lane.entries:
                self._wait(lane)
            else:
                self._leave(lane)
            break
        for lane in passed_over:
            self._wait(lane)
        return found

    def charge(self, caller: str, cost: float) -> None:
        """A caller was given more, or less, than what its entries cost."""
        lane = self._lanes.get(caller)
        if lane is None:
            self._used[caller] = max(self._level, self._used.get(caller, 0.0)) + cost
            return
        lane.used += cost
        self._wait(lane)

    def tidy(self) -> None:
        """Lets go of all entries that nobody wants any more."""
        for lane in list(self._lanes.values()):
            lane.entries = deque(pair for pair in lane.entries if self._wanted(pair[0]))
            if not lane.entries:
                self._leave(lane)
        self._size = sum(len(lane.entries) for lane in self._lanes.values())

    def _wait(self, lane: _Lane[T], *, first: bool = False) -> None:
        order = next(self._order)
        heapq.heappush(self._turns, (lane.used, -order if first else order, lane))

    def _leave(self, lane: _Lane[T]) -> None:
        del self._lanes[lane.caller]
        self._used[lane.caller] = lane.used
        if len(self._used) > REMEMBERED_CALLERS:
            self._used = {caller: used for caller, used in self._used.items() if used > self._level}
            while len(self._used) > REMEMBERED_CALLERS:
                self._used.pop(next(iter(self._used)))
