"""The scoring service over HTTP: one ASGI application over `Backends`, without Ray.

    front = Front(backends, routes=ENDPOINTS + dialects, endpoints=[...])
    app = build_http(front, config, keys)

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
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as Path

from rayward.config.scoring import ScoringConfig
from rayward.errors import DeadlineError, RaywardError, RequestError, RuleError, ServerError, UnavailableError
from rayward.serving.auth import Caller, KeyLimits, Keys
from rayward.serving.body import Bodies
from rayward.serving.calls import ScoredCall, Stats
from rayward.serving.front import Answer, Endpoint, Front, Incoming
from rayward.serving.limits import Gate
from rayward.serving.openapi import document
from rayward.serving.replies import VERSION_HEADER, describe, json_response, native_refusal, refusal, response_of, scored_headers
from rayward.serving.traffic import Traffic
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.endpoints import native_error
from rayward.wire.native import Health, ModelList, code_of, status_of

logger = logging.getLogger("ray.serve")

DEADLINE_HEADER = "x-rayward-deadline-ms"
"""Of a request in a dialect whose schema has no room for a deadline; the body goes before it."""

INLINE_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread."""

GRACE_S = 0.25
"""A replica that keeps the deadline itself may tell so."""

CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def build_http(
    front: Front,
    config: ScoringConfig,
    keys: Keys,
    *,
    echo_request_id: bool = True,
    source: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The application.

    Args:
        echo_request_id: put x-request-id into replies; Serve's proxy does it by itself.
        source: unique name of this process, for `Http.stats`.

    Raises:
        ValueError: two things are mounted at one path.
    """
    http = Http(front, config, keys, echo_request_id=echo_request_id, source=source, clock=clock)
    return http.application()


class Http:
    """The handlers of one process and what they share."""

    def __init__(
        self, front: Front, config: ScoringConfig, keys: Keys, *, echo_request_id: bool, source: str, clock: Callable[[], float]
    ) -> None:
        self._front = front
        self._config = config
        self._keys = keys
        self._echo_request_id = echo_request_id
        self._source = source
        self._clock = clock
        self._bodies = Bodies(config.limits, config.body_timeout_s)
        defaults = KeyLimits(requests_per_s=config.requests_per_s, tokens_per_s=config.tokens_per_s, max_concurrent=config.max_concurrent)
        self._gate = Gate(config.max_requests, clock, defaults, share=1.0 / config.ingress_replicas)
        self.traffic = Traffic()

    def application(self) -> Starlette:
        """Paths, error bodies, background work."""
        endpoints = [*self._own_endpoints(), *self._front.endpoints]
        text = json.dumps(document(self._front.routes, endpoints), separators=(",", ":")).encode()
        schema = Endpoint("GET", "/openapi.json", "This document", lambda _: Body(text), scope=None)
        paths: list[Path] = []
        taken: set[tuple[str, str]] = set()
        for route in self._front.routes:
            _claim(taken, route.methods, route.path)
            paths.append(Path(route.path, self._scoring(route), methods=list(route.methods)))
        by_path: dict[str, dict[str, Endpoint]] = {}
        for endpoint in [*endpoints, schema]:
            _claim(taken, (endpoint.method,), endpoint.path)
            by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        paths += [Path(path, self._answering(methods), methods=list(methods)) for path, methods in by_path.items()]
        app = Starlette(routes=paths, exception_handlers={HTTPException: self._no_such_path}, lifespan=self._lifespan)
        # A path with a slash at its end is another path, not a redirect that loses the body of a POST.
        app.router.redirect_slashes = False
        app.state.http = self
        return app

    def stats(self, clock: Callable[[], float] = time.time) -> Stats:
        """What this process counted."""
        gauges = {"requests_in_flight": float(self._gate.num_in_flight), "body_bytes_held": float(self._bodies.num_held_bytes)}
        return self.traffic.stats(self._source, gauges, clock)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(work(self.stats)) for work in self._front.background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Scoring

    def _scoring(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await self._guarded(request, route.dialect, self._refusal_of(route), lambda i, s: self._score(route, request, i, s))

        return handle

    async def _score(self, route: Route, request: Request, request_id: str, started_s: float) -> Response:
        caller = self._caller_of(request)
        caller.require("score")
        with self._gate.admit(caller) as admission:
            types = route.media_types
            body = await self._bodies.read(request.headers, request.stream(), max_bytes=caller.limits.max_body_bytes, media_types=types)
            num_bytes = len(body)
            try:
                admission.expect(num_bytes)
                arrived_s = self._clock()
                parse = route.parse
                limits = self._config.limits
                call = await asyncio.to_thread(parse, body, limits) if num_bytes > INLINE_BYTES else parse(body, limits)
                del body
                budget_s = self._budget_of(call, request) - (self._clock() - started_s)
                request_id = call.request_id or request_id
                work = self._call_backends(route, call, request, request_id, caller.name, budget_s)
                model, scored = await self._unless_gone(request, work)
            finally:
                # The items hold as much as the body did, until they are scored.
                self._bodies.release(num_bytes)
            admission.settle(sum(result.tokens for result in scored.results))
        timings = replace(scored.timings, total_s=self._clock() - arrived_s)
        self.traffic.scored(model, scored.version, scored.results)
        answered = Answered(request_id, model, scored.version, scored.results, int(time.time()), timings)
        return response_of(call.render(answered), scored_headers(answered))

    async def _call_backends(
        self, route: Route, call: Call, request: Request, request_id: str, caller: str, budget_s: float
    ) -> tuple[str, ScoredCall]:
        if budget_s <= 0.0:
            raise _too_late()
        model = call.model
        if route.foreign_models and model is not None and model not in {info.id for info in self._front.backends.models()}:
            model = None
        version = call.version or request.headers.get(VERSION_HEADER)
        try:
            async with asyncio.timeout(budget_s + GRACE_S) as timer:
                name, scored = await self._front.backends.score(
                    call.items, request_id=request_id, caller=caller, budget_s=budget_s, model=model, version=version
                )
        except TimeoutError as exc:
            if not timer.expired():
                raise
            raise _too_late() from exc
        _check(call, scored)
        return name, scored

    def _budget_of(self, call: Call, request: Request) -> float:
        deadline_ms = call.deadline_ms
        if deadline_ms is None and (given := request.headers.get(DEADLINE_HEADER)) is not None:
            if not (given.isascii() and given.isdecimal() and int(given[:12]) > 0):
                raise RuleError("wrong_type", f"{DEADLINE_HEADER} is no number of milliseconds", remedy="send for example 60000")
            deadline_ms = int(given[:12])
        if deadline_ms is None:
            return self._config.default_deadline_s
        if deadline_ms > self._config.max_deadline_s * 1e3:
            raise RuleError(
                "deadline_too_long",
                f"the deadline is {deadline_ms} ms; the limit is {self._config.max_deadline_s * 1e3:.0f}",
                remedy="ask for less",
            )
        return deadline_ms / 1e3

    async def _unless_gone(self, request: Request, work: Any) -> Any:
        # The work ends when nobody is there any more to read its result.
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    # Everything else

    def _answering(self, methods: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            # HEAD is answered as GET, and the server leaves the body out.
            endpoint = methods.get(request.method) or methods["GET"]
            return await self._guarded(request, "none", native_refusal, lambda i, _: self._answer(endpoint, request, i))

        return handle

    async def _answer(self, endpoint: Endpoint, request: Request, request_id: str) -> Response:
        if endpoint.scope is None:
            return response_of(await _called(endpoint.answer, Incoming(request.path_params, {}, {}, b"", "", request_id)))
        caller = self._caller_of(request)
        if endpoint.scope != "any":
            caller.require(endpoint.scope)
        body = b""
        if endpoint.method not in ("GET", "DELETE"):
            body = await self._bodies.read(request.headers, request.stream())
        try:
            incoming = Incoming(request.path_params, dict(request.query_params), request.headers, body, caller.name, request_id)
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
        name = self._config.default_model
        models = self._front.backends.models()
        info = next((info for info in models if name in (None, info.id)), None)
        if info is None:
            raise UnavailableError("no model is served yet", remedy="retry")
        return Health(model=info.id, version=info.version).model_dump(mode="json")

    def _models(self) -> Body:
        return Body(ModelList(data=self._front.backends.models()).model_dump_json().encode())

    # Around all of it

    def _caller_of(self, request: Request) -> Caller:
        return self._keys.caller_of(request.headers.get("authorization"), request.client.host if request.client else None)

    async def _guarded(
        self,
        request: Request,
        dialect: str,
        refuse: Callable[[RaywardError], Response],
        work: Callable[[str, float], Awaitable[Response]],
    ) -> Response:
        started_s = self._clock()
        request_id = _request_id_of(request.headers)
        with self._front.span(request.url.path, request.headers):
            try:
                response = await work(request_id, started_s)
            except RaywardError as exc:
                self.traffic.refused(code_of(exc))
                response = refuse(exc)
                if status_of(exc) >= 500:
                    logger.warning("request %s was not answered: %s", request_id, code_of(exc))
            except ClientDisconnect:
                self.traffic.refused("client_gone")
                response = Response(status_code=CLIENT_GONE)
            except asyncio.CancelledError:
                # Serve's proxy ends the task of a request whose client has gone.
                self.traffic.refused("client_gone")
                self.traffic.answered(dialect, CLIENT_GONE, self._clock() - started_s)
                raise
            # Broad on purpose: whatever fails here is one request's, and its text must not reach the reply or the log.
            except Exception as exc:
                logger.error("request %s failed: %s", request_id, describe(exc, texts=self._config.log_texts))
                error = ServerError(f"the server failed ({type(exc).__name__})", remedy=f"retry; the server's log has {request_id}")
                self.traffic.refused("internal")
                response = refuse(error)
        self.traffic.answered(dialect, response.status_code, self._clock() - started_s)
        if self._echo_request_id:
            response.headers["x-request-id"] = request_id
        return response

    def _refusal_of(self, route: Route) -> Callable[[RaywardError], Response]:
        def refuse(error: RaywardError) -> Response:
            status = status_of(error)
            return refusal(route.error(status, error, code_of(error)), route.statuses.get(status, status), error)

        return refuse

    async def _no_such_path(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
        self.traffic.refused(code)
        problem = RequestError(f"{request.method[:16]} of this path: {exc.detail}", remedy="GET /openapi.json has all paths")
        response = json_response(native_error(exc.status_code, problem, code), exc.status_code, dict(exc.headers or {}))
        if self._echo_request_id:
            response.headers["x-request-id"] = _request_id_of(request.headers)
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


def _check(call: Call, scored: ScoredCall) -> None:
    # The last border before a client: no reply holds fewer rewards than were asked for, or one that is no number.
    whole = len(scored.results) == len(call.items)
    if not whole or any(
        result.rewards is not None and (len(result.rewards) != len(item.completions) or not result.is_finite())
        for item, result in zip(call.items, scored.results, strict=True)
    ):
        raise ServerError("a replica's answer does not hold one finite reward per completion", remedy="report this")


def _too_late() -> DeadlineError:
    return DeadlineError(
        "the deadline of the request passed before it was scored", remedy="retry with a longer deadline, or send less at once"
    )


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _called(answer: Answer, incoming: Incoming) -> Body:
    found = answer(incoming)
    if inspect.isawaitable(found):
        found = await found
    return found if isinstance(found, Body) else Body(found)
