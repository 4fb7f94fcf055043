"""Calls that replicas hold, so that some can be moved when replicas are added: what was sent before would wait where it is."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from rayward.serving.calls import ScoredCall

Key = tuple[str, str]
"""Model and version."""


@dataclass(eq=False, slots=True)
class _Flight:
    task: asyncio.Task[ScoredCall]
    moved: bool = False


class Flights:
    """The calls of one ingress under way, by model and version, in the order in which they were sent."""

    def __init__(self) -> None:
        self._flights: defaultdict[Key, dict[_Flight, None]] = defaultdict(dict)
        self._num_replicas: dict[Key, int] = {}

    def waiting(self) -> list[Key]:
        """Versions with calls under way."""
        return [key for key, flights in self._flights.items() if flights]

    async def follow(self, key: Key, call: Coroutine[Any, Any, ScoredCall]) -> ScoredCall | None:
        """What a call answers; None: it was taken back, to be sent again. Raises what it raises."""
        flight = _Flight(asyncio.get_running_loop().create_task(call))
        self._flights[key][flight] = None
        try:
            return await flight.task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            # Its caller may have gone in the same moment.
            if not flight.moved or (own is not None and own.cancelling()):
                flight.task.cancel()
                raise
            return None
        finally:
            self._flights[key].pop(flight, None)

    def seen(self, key: Key, num_replicas: int) -> int:
        """So many replicas run now: where they are more than before, take back the newest calls, in the share that is theirs.

        Returns:
            The number of calls taken back.
        """
        before = self._num_replicas.get(key, num_replicas)
        self._num_replicas[key] = num_replicas
        if not 0 < before < num_replicas:
            return 0
        flights = [flight for flight in self._flights[key] if not flight.moved]
        num = len(flights) * (num_replicas - before) // num_replicas
        # The newest are the last ones that would be computed, so that least is computed twice.
        for flight in flights[len(flights) - num :]:
            flight.moved = True
            flight.task.cancel()
        return num
