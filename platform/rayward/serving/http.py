"""The scoring service over HTTP: one ASGI application over `Backends`, without Ray.

    app = build_http(Front(backends, routes=..., endpoints=[...]), config, Keys.of(config))

What is mounted comes in through `Front` (`serving.front`). One request: who asks (`auth`), is there room (`limits`), its body (`body`),
its rules (`Route.parse`), the scores, its form (`Call.render`). Whatever goes wrong ends in one error body in the dialect's shape
(`replies`); no text that a user sent stands in it or in the log. Health, readiness and the list of models never wait for a replica.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as Path

from rayward.config.scoring import ScoringConfig
from rayward.errors import RaywardError, RequestError, ServerError, UnavailableError
from rayward.serving.auth import Caller, KeyLimits, Keys
from rayward.serving.body import Bodies
from rayward.serving.front import Answer, Endpoint, Front, Incoming
from rayward.serving.limits import Gate
from rayward.serving.openapi import document
from rayward.serving.replies import describe, json_response, native_refusal, refusal, response_of
from rayward.serving.scored_requests import Exchange, ScoredRequests
from rayward.wire.dialect import JSON, Body, Route
from rayward.wire.endpoints import native_error
from rayward.wire.native import Health, ModelList, code_of, status_of

logger = logging.getLogger("ray.serve")

CLIENT_GONE = 499
NO_DIALECT = "none"
"""Of requests that ask for no scores, in metrics."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")

Work: TypeAlias = Callable[[Exchange], Awaitable[Response]]


def build_http(
    front: Front, config: ScoringConfig, keys: Keys, *, echo_request_id: bool = True, clock: Callable[[], float] = time.monotonic
) -> Starlette:
    """The application.

    Args:
        echo_request_id: put x-request-id into replies; Serve's proxy does it by itself.
        clock: monotonic seconds.

    Raises:
        ValueError: two things are mounted at one path.
    """
    return _Http(front, config, keys, echo_request_id=echo_request_id, clock=clock).application()


class _Http:
    # The handlers of one process and what they share.

    def __init__(self, front: Front, config: ScoringConfig, keys: Keys, *, echo_request_id: bool, clock: Callable[[], float]) -> None:
        self._front = front
        self._recorder = front.recorder
        self._config = config
        self._keys = keys
        self._echo_request_id = echo_request_id
        self._clock = clock
        self._bodies = Bodies(config.limits, config.body_timeout_s)
        defaults = KeyLimits(requests_per_s=config.requests_per_s, tokens_per_s=config.tokens_per_s, max_concurrent=config.max_concurrent)
        self._gate = Gate(config.max_requests, clock, defaults, share=1.0 / config.ingress_replicas)
        self._scored = ScoredRequests(front, config, self._gate, self._bodies, clock)

    def application(self) -> Starlette:
        """Paths, error bodies, background work."""
        endpoints = [*self._own_endpoints(), *self._front.endpoints]
        text = json.dumps(document(self._front.routes, endpoints, keys_required=self._keys.score_needs_key), separators=(",", ":")).encode()
        endpoints.append(Endpoint("GET", "/openapi.json", "This document", lambda _: Body(text), scope=None))
        paths: list[Path] = []
        taken: set[tuple[str, str]] = set()
        for route in self._front.routes:
            _claim(taken, route.methods, route.path)
            paths.append(Path(route.path, self._scoring(route), methods=list(route.methods)))
        by_path: dict[str, dict[str, Endpoint]] = {}
        for endpoint in endpoints:
            _claim(taken, (endpoint.method,), endpoint.path)
            by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        paths += [Path(path, self._answering(methods), methods=list(methods)) for path, methods in by_path.items()]
        app = Starlette(routes=paths, exception_handlers={HTTPException: self._no_such_path}, lifespan=self._lifespan)
        # A path with a slash at its end is another path, not a redirect that loses the body of a POST.
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(work()) for work in self._front.background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _scoring(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def work(exchange: Exchange) -> Response:
            if route.asks != "scores":
                return await self._scored.answer_probe(exchange, route)
            return await self._scored.answer(exchange, route, self._caller_of(exchange.request))

        async def handle(request: Request) -> Response:
            return await self._guarded(request, route, work)

        return handle

    def _answering(self, methods: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            # HEAD is answered as GET, and the server leaves the body out.
            endpoint = methods.get(request.method) or methods["GET"]
            return await self._guarded(request, None, lambda exchange: self._answer(endpoint, exchange))

        return handle

    async def _answer(self, endpoint: Endpoint, exchange: Exchange) -> Response:
        request = exchange.request
        caller = ""
        if endpoint.scope is not None:
            asking = self._caller_of(request)
            caller = asking.name
            if endpoint.scope != "any":
                asking.require(endpoint.scope)
        body = b""
        if endpoint.method not in ("GET", "DELETE"):
            body = await self._bodies.read(request.headers, request.stream())
        try:
            incoming = Incoming(request.path_params, dict(request.query_params), request.headers, body, caller, exchange.request_id)
            return response_of(await _called(endpoint.answer, incoming))
        finally:
            self._bodies.release(len(body))

    def _own_endpoints(self) -> list[Endpoint]:
        status = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
        health, models = (schema.model_json_schema(mode="serialization") for schema in (Health, ModelList))
        return [
            Endpoint("GET", "/livez", "The process lives", lambda _: {"status": "ok"}, scope=None, reply=status),
            Endpoint("GET", "/readyz", "Every model can score", lambda _: self._ready(), scope=None, reply=status),
            Endpoint("GET", "/health", "The default model can score", lambda _: self._health(), scope=None, reply=health),
            Endpoint("GET", "/v1/models", "The models that are served", lambda _: self._models(), reply=models),
        ]

    def _ready(self) -> JSON:
        if not self._front.backends.ready():
            raise UnavailableError("not every model has a version that can score", remedy="retry; GET /v1/models says what they are doing")
        return {"status": "ok"}

    def _health(self) -> JSON:
        self._ready()
        models = self._front.backends.models()
        info = next((info for info in models if self._config.default_model in (None, info.id)), None)
        if info is None:
            raise UnavailableError("no model is served yet", remedy="retry")
        return Health(model=info.id, version=info.version).model_dump(mode="json")

    def _models(self) -> Body:
        return Body(ModelList(data=self._front.backends.models()).model_dump_json().encode())

    def _caller_of(self, request: Request) -> Caller:
        address = request.client.host if request.client else None
        return self._keys.caller_of(request.headers.get("authorization"), address, request.headers.get("host"))

    async def _guarded(self, request: Request, route: Route | None, work: Work) -> Response:
        # Every request ends here, whatever happens to it.
        exchange = Exchange(request, route, _request_id_of(request.headers), self._clock())
        with self._front.span(request.url.path, request.headers) as exchange.span:
            try:
                response = await work(exchange)
            except RaywardError as exc:
                response = self._refused(exchange, exc, code_of(exc))
            except ClientDisconnect:
                self._recorder.add("refusals_total", reason="client_gone")
                response = Response(status_code=CLIENT_GONE)
            except asyncio.CancelledError:
                # Serve's proxy ends the task of a request whose client has gone.
                self._recorder.add("refusals_total", reason="client_gone")
                self._note(exchange, CLIENT_GONE)
                raise
            # Broad on purpose: whatever fails here is one request's, and its text must not reach the reply or the log.
            except Exception as exc:
                logger.error("request %s failed: %s", exchange.request_id, describe(exc, texts=self._config.log_texts))
                error = ServerError(
                    f"the server failed ({type(exc).__name__})", remedy=f"retry; the server's log has {exchange.request_id}"
                )
                response = self._refused(exchange, error, "internal")
            self._note(exchange, response.status_code)
        if self._echo_request_id:
            response.headers["x-request-id"] = exchange.request_id
        return response

    def _refused(self, exchange: Exchange, error: RaywardError, code: str) -> Response:
        self._recorder.add("refusals_total", reason=code)
        status = status_of(error)
        if status >= 500:
            logger.warning("request %s was not answered: %s", exchange.request_id, code)
        route = exchange.route
        if route is None:
            return native_refusal(error, code)
        return refusal(route.error(status, error, code), route.statuses.get(status, status), error)

    def _note(self, exchange: Exchange, status: int) -> None:
        dialect = NO_DIALECT if exchange.route is None or exchange.route.asks != "scores" else exchange.route.dialect
        self._recorder.add("requests_total", dialect=dialect, status=str(status))
        self._recorder.observe("request_seconds", self._clock() - exchange.started_s, dialect=dialect)
        self._recorder.set("requests_in_flight", self._gate.num_in_flight)
        self._recorder.set("body_bytes_held", self._bodies.num_held_bytes)
        if exchange.span is not None:
            exchange.span.ended(status, request_id=exchange.request_id, dialect=dialect)

    async def _no_such_path(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        exchange = Exchange(request, None, _request_id_of(request.headers), self._clock())
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
        self._recorder.add("refusals_total", reason=code)
        self._note(exchange, exc.status_code)
        problem = RequestError(f"{request.method[:16]} of this path: {exc.detail}", remedy="GET /openapi.json has all paths")
        response = json_response(native_error(exc.status_code, problem, code), exc.status_code, dict(exc.headers or {}))
        if self._echo_request_id:
            response.headers["x-request-id"] = exchange.request_id
        return response


def _claim(taken: set[tuple[str, str]], methods: Sequence[str], path: str) -> None:
    for method in methods:
        if (method, path) in taken:
            raise ValueError(f"two things are mounted at {method} {path}")
        taken.add((method, path))


def _request_id_of(headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id", "")
    # It goes into logs and replies: no line breaks, no texts.
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _called(answer: Answer, incoming: Incoming) -> Body:
    found: Any = answer(incoming)
    if inspect.isawaitable(found):
        found = await found
    return found if isinstance(found, Body) else Body(found)
