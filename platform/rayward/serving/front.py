"""What is mounted on the scoring service: who scores, in which dialects, and everything beside.

    front = Front(backends, routes=(*ENDPOINTS, *ROUTES), endpoints=[...])

Nothing but `backends` has to exist:

    backends      who scores (`serving.calls.Backends`)
    routes        what is scored: the native schema and the dialects (`wire.dialect.Route`)
    endpoints     everything else: `Endpoint(method, path, summary, answer, scope)`, where `answer(Incoming) -> Body | JSON`, plain or
                  async; what it raises of our tree becomes the native error body. Here stand /admin/models… (scope `admin`),
                  /metrics and /v1/status (scope `any`), and the page (scope None: open to who reaches the server)
    background    coroutine functions that run as long as the application does: reading the table of routes, reporting
    recorder      counts what this process does; give the dispatcher the same one
    span          opens a trace span around one request: `span(path, headers) -> context manager of a RequestSpan`

The application itself answers /livez, /readyz, /health, /v1/models and /openapi.json. None of them waits for a replica.
`Http.stats()` has what the process counted; the `Http` of an application is `app.state.http`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from rayward.serving.auth import Scope
from rayward.serving.calls import Backends
from rayward.serving.metrics import Recorder
from rayward.wire.dialect import JSON, Answered, Route
from rayward.wire.rules import decode


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request to an `Endpoint`, past its guards.

    Attributes:
        path: the parameters of its path.
        caller: name of the key or an address.
    """

    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    caller: str
    request_id: str

    def json(self) -> JSON:
        """The body; an empty one is an empty object.

        Raises:
            RuleError: `invalid_json`.
        """
        return decode(self.body) if self.body else {}


Answer: TypeAlias = Callable[[Incoming], Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path that does not score.

    Attributes:
        path: with parameters in braces, `/admin/models/{name}/promote`.
        answer: `Body`, or a JSON value.
        scope: what a key needs; `any`: whoever may do anything; None: no key.
        request, reply: JSON schemas for the OpenAPI document; None: no body, or none that is JSON.
    """

    method: str
    path: str
    summary: str
    answer: Answer
    scope: Scope | Literal["any"] | None = "any"
    request: Mapping[str, JSON] | None = None
    reply: Mapping[str, JSON] | None = None
    media_type: str = "application/json"


class RequestSpan(Protocol):
    """The trace span of one request, while it is open."""

    def scored(self, answered: Answered) -> None:
        """Who answered, and where the time went."""
        ...

    def ended(self, status: int, *, request_id: str, dialect: str) -> None:
        """What the client gets."""
        ...


def no_span(_path: str, _headers: Mapping[str, str]) -> AbstractContextManager[RequestSpan | None]:
    """Nothing is traced."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Front:
    """What is mounted; see the module."""

    backends: Backends
    routes: Sequence[Route] = ()
    endpoints: Sequence[Endpoint] = ()
    background: Sequence[Callable[[], Awaitable[None]]] = ()
    recorder: Recorder = field(default_factory=lambda: Recorder(f"ingress-{uuid.uuid4().hex[:12]}", "ingress"))
    span: Callable[[str, Mapping[str, str]], AbstractContextManager[RequestSpan | None]] = no_span
