"""What people and machines look at, mounted beside the scores: `/metrics`, `GET /v1/status`, the page at `/`; and the reports behind them.

    seeing = Seeing(manager, dispatcher.stats, page=config.page)
    Front(backends, endpoints=seeing.endpoints(), background=[seeing.report], recorder=recorder, ...)

No Ray here: `manager` is anything with the three methods, by handle in the service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from rayward.errors import UnavailableError
from rayward.serving.calls import Stats
from rayward.serving.front import Endpoint, Incoming
from rayward.serving.metrics import CONTENT_TYPE, render
from rayward.serving.page import MEDIA_TYPE, document
from rayward.serving.reporting import report_forever
from rayward.serving.status import ServiceStatus
from rayward.wire.dialect import Body

logger = logging.getLogger("ray.serve")

MANAGER_TIMEOUT_S = 5.0


class Manager(Protocol):
    """Who keeps the board."""

    async def report(self, stats: Stats) -> None:
        """Take the counts of a process."""
        ...

    async def stats(self) -> Sequence[Stats]:
        """The newest of every process."""
        ...

    async def status(self) -> ServiceStatus:
        """The picture of now."""
        ...


class Seeing:
    """One ingress process's part of it.

    Args:
        take: gives the counts of this process.
        page: whether the page is served.
    """

    def __init__(self, manager: Manager, take: Callable[[], Stats], *, page: bool = True) -> None:
        self._manager = manager
        self._take = take
        self._page = page

    def endpoints(self) -> list[Endpoint]:
        """What is mounted."""
        return [
            Endpoint("GET", "/metrics", "Counts of all processes, for Prometheus", self._metrics, media_type="text/plain"),
            Endpoint(
                "GET",
                "/v1/status",
                "What is served and how it is going",
                self._status,
                reply=ServiceStatus.model_json_schema(mode="serialization"),
            ),
            *([page_endpoint()] if self._page else []),
        ]

    async def report(self) -> None:
        """Report this process's counts to the manager until cancelled; work for `Front.background`."""
        await report_forever(self._take, self._manager.report)

    async def _metrics(self, _incoming: Incoming) -> Body:
        own = self._take()
        try:
            async with asyncio.timeout(MANAGER_TIMEOUT_S):
                # The manager first learns what this process has counted: of two ingresses that are scraped in turn, none then shows less of
                # the other than that one has shown itself. A counter that falls is a restart to Prometheus.
                await self._manager.report(own)
                found, up = list(await self._manager.stats()), 1.0
        # Broad on purpose: whatever became of the manager, a scrape must say so rather than fail.
        except Exception as exc:
            logger.warning("the manager does not say what it counted (%s)", type(exc).__name__)
            found, up = [own], 0.0
        answered = Stats(own.source, own.role, own.taken_at, gauges={("manager_up", ()): up})
        return Body(render([*found, answered]).encode("utf-8"), media_type=CONTENT_TYPE)

    async def _status(self, _incoming: Incoming) -> Body:
        try:
            async with asyncio.timeout(MANAGER_TIMEOUT_S):
                status = await self._manager.status()
        # Broad on purpose: its errors are Ray's and ours, and mean the same to who looks.
        except Exception as exc:
            raise UnavailableError(
                f"the manager does not answer ({type(exc).__name__})", remedy="retry; scoring goes on without it"
            ) from exc
        return Body(status.model_dump_json().encode("utf-8"))


def page_endpoint() -> Endpoint:
    """The page: open to who reaches the server, because it holds nothing; what it asks for needs the key that is typed into it."""
    content, headers = document()
    body = Body(content, headers, media_type=MEDIA_TYPE)
    return Endpoint("GET", "/", "The page", lambda _: body, scope=None, media_type="text/html")
