"""Everything that the service mounts beside the native schema: dialects, the page, metrics, status, what administrators do. No Ray.

Front(backends, routes=all_routes(), endpoints=[page(), *manager_endpoints(manager)])
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from rayward.errors import UnavailableError
from rayward.serving.administration import VERBS
from rayward.serving.front import Endpoint, Incoming
from rayward.serving.metrics import CONTENT_TYPE
from rayward.serving.page import MEDIA_TYPE
from rayward.serving.page import document as page_document
from rayward.serving.status import ServiceStatus
from rayward.wire.dialect import JSON, Body, Route
from rayward.wire.dialects.table import ROUTES, with_pairs
from rayward.wire.endpoints import BEST_OF_N, SCORE

MANAGER_TIMEOUT_S = 10.0
T = TypeVar("T")


class ManagerCalls(Protocol):
    """What the manager is asked by handle."""

    async def administer(self, verb: str, body: bytes) -> JSON:
        """Do what an administrator asks; raises of our tree."""
        ...

    async def status(self) -> JSON:
        """`ServiceStatus` as JSON."""
        ...

    async def metrics(self) -> str:
        """The text of /metrics."""
        ...


def all_routes() -> tuple[Route, ...]:
    """Every path that scores."""
    return (with_pairs(SCORE), BEST_OF_N, *ROUTES)


def page() -> Endpoint:
    """The page at `/`: open to who reaches the server, because it holds nothing; what it asks for needs the key that is typed into it."""
    content, headers = page_document()
    body = Body(content, headers, MEDIA_TYPE)
    return Endpoint("GET", "/", "A page to try the models on", lambda _: body, scope=None, media_type="text/html")


def manager_endpoints(manager: ManagerCalls) -> list[Endpoint]:
    """What the manager answers: /metrics, /v1/status and /admin/models/<verb>."""

    async def metrics(_: Incoming) -> Body:
        return Body((await _soon(manager.metrics())).encode(), media_type=CONTENT_TYPE)

    async def status(_: Incoming) -> JSON:
        return await _soon(manager.status())

    schema = ServiceStatus.model_json_schema(mode="serialization")
    return [
        Endpoint("GET", "/metrics", "Counts in Prometheus' form", metrics, media_type="text/plain"),
        Endpoint("GET", "/v1/status", "What is served and how it is going", status, reply=schema),
        *(_administration(manager, verb) for verb in VERBS),
    ]


def _administration(manager: ManagerCalls, verb: str) -> Endpoint:
    async def administer(incoming: Incoming) -> JSON:
        return await _soon(manager.administer(verb, incoming.body))

    summary = (VERBS[verb].__doc__ or verb).splitlines()[0]
    schema = VERBS[verb].model_json_schema()
    return Endpoint("POST", f"/admin/models/{verb}", summary, administer, scope="admin", request=schema, reply={"type": "object"})


async def _soon(answer: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(MANAGER_TIMEOUT_S) as timer:
            return await answer
    except TimeoutError as exc:
        if not timer.expired():
            raise
        raise UnavailableError("the manager does not answer; scoring goes on without it", remedy="retry in some seconds") from exc
