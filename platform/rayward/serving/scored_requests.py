"""One HTTP request that asks for scores, in any dialect: from its body to the body of its reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rayward.config.scoring import ScoringConfig
from rayward.errors import DeadlineError, RuleError, ServerError, UnavailableError
from rayward.serving.auth import Caller
from rayward.serving.body import Bodies
from rayward.serving.calls import ScoredCall
from rayward.serving.front import Front, RequestSpan
from rayward.serving.limits import Gate
from rayward.serving.replies import VERSION_HEADER, response_of, scored_headers
from rayward.wire.dialect import Answered, Call, Route, refuse_plain_texts

DEADLINE_HEADER = "x-rayward-deadline-ms"
"""Of a request in a dialect whose schema has no room for a deadline; the body goes before it."""

INLINE_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread."""

GRACE_S = 0.25
"""A replica that keeps the deadline itself may tell so."""


@dataclass(slots=True)
class Exchange:
    """One request and what becomes of it.

    Attributes:
        route: whose errors its client reads; where dialects share a path, the body decides. None: the native one's.
        request_id: the caller's, or ours.
        started_s: of the service's clock, when the head was there.
    """

    request: Request
    route: Route | None
    request_id: str
    started_s: float
    span: RequestSpan | None = None


class ScoredRequests:
    """What one process needs to answer them."""

    def __init__(self, front: Front, config: ScoringConfig, gate: Gate, bodies: Bodies, clock: Callable[[], float]) -> None:
        self._backends = front.backends
        self._recorder = front.recorder
        self._config = config
        self._gate = gate
        self._bodies = bodies
        self._clock = clock

    async def answer(self, exchange: Exchange, route: Route, caller: Caller) -> Response:
        """The reply with rewards.

        Raises:
            RaywardError: there is none.
            ClientDisconnect: nobody is there to read it.
        """
        caller.require("score")
        headers = exchange.request.headers
        with self._gate.admit(caller) as admission:
            stream, own_bytes = exchange.request.stream(), caller.limits.max_body_bytes
            body = await self._bodies.read(headers, stream, max_bytes=own_bytes, media_types=route.media_types)
            num_bytes = len(body)
            try:
                admission.expect(num_bytes)
                arrived_s = self._clock()
                if num_bytes > INLINE_BYTES:
                    call = await asyncio.to_thread(self._parse, exchange, route, body)
                else:
                    call = self._parse(exchange, route, body)
                del body
                model, scored = await _unless_gone(exchange.request, self._score(exchange, call, caller.name))
            finally:
                # The items hold as much as the body did, until they are scored.
                self._bodies.release(num_bytes)
            admission.settle(sum(result.tokens for result in scored.results))
        self._note(model, scored)
        timings = replace(scored.timings, total_s=self._clock() - arrived_s)
        outputs = self._outputs_of(model, scored.version)
        answered = Answered(exchange.request_id, model, scored.version, scored.results, int(time.time()), timings, outputs)
        if exchange.span is not None:
            exchange.span.scored(answered)
        return response_of(call.render(answered), scored_headers(answered))

    async def answer_probe(self, exchange: Exchange, route: Route) -> Response:
        """What another system's clients ask before they score; open to everybody, as /livez and /readyz are.

        Raises:
            RaywardError: nothing can score now, or the body breaks a rule.
        """
        if route.asks == "ready" and not self._backends.ready():
            raise UnavailableError("not every model has a version that can score", remedy="retry")
        body = b""
        if exchange.request.method not in ("GET", "HEAD"):
            body = await self._bodies.read(exchange.request.headers, exchange.request.stream(), media_types=route.media_types)
        try:
            call = self._parse(exchange, route, body)
        finally:
            self._bodies.release(len(body))
        info = next(iter(self._backends.models()), None)
        model, version, outputs = ("", "", ()) if info is None else (info.id, info.version, tuple(info.outputs))
        return response_of(call.render(Answered(exchange.request_id, model, version, (), int(time.time()), outputs=outputs)))

    def _parse(self, exchange: Exchange, route: Route, body: bytes) -> Call:
        picked = route if route.pick is None else route.pick(body)
        exchange.route = picked
        call = picked.parse(body, self._config.limits)
        exchange.request_id = call.request_id or exchange.request_id
        return call

    async def _score(self, exchange: Exchange, call: Call, caller: str) -> tuple[str, ScoredCall]:
        budget_s = self._budget_of(exchange, call) - (self._clock() - exchange.started_s)
        if budget_s <= 0.0:
            raise _too_late()
        version = call.version or exchange.request.headers.get(VERSION_HEADER)
        try:
            async with asyncio.timeout(budget_s + GRACE_S) as timer:
                name, scored = await self._backends.score(
                    call.items, request_id=exchange.request_id, caller=caller, budget_s=budget_s, model=call.model, version=version
                )
        except TimeoutError as exc:
            if not timer.expired():
                raise
            raise _too_late() from exc
        _check(call, scored)
        if self._config.flat_text == "refuse":
            refuse_plain_texts(call.items, scored.results)
        return name, scored

    def _budget_of(self, exchange: Exchange, call: Call) -> float:
        deadline_ms, limit_ms = call.deadline_ms, self._config.max_deadline_s * 1e3
        given = exchange.request.headers.get(DEADLINE_HEADER)
        if deadline_ms is None and given is not None:
            # Twelve digits are thirty years.
            deadline_ms = int(given[:12]) if given.isascii() and given.isdecimal() else 0
            if deadline_ms < 1:
                raise RuleError("wrong_type", f"{DEADLINE_HEADER} is no number of milliseconds above 0", remedy="send for example 60000")
        if deadline_ms is None:
            return self._config.default_deadline_s
        if deadline_ms > limit_ms:
            raise RuleError("deadline_too_long", f"the deadline is {deadline_ms} ms; the limit is {limit_ms:.0f}", remedy="ask for less")
        return deadline_ms / 1e3

    def _outputs_of(self, model: str, version: str) -> tuple[str, ...]:
        found = (info.outputs for info in self._backends.models() if (info.id, info.version) == (model, version))
        return tuple(next(found, ()))

    def _note(self, model: str, scored: ScoredCall) -> None:
        self._recorder.add("replies_total", model=model, version=scored.version)
        for result in scored.results:
            outcome = "scored" if result.error is None else result.error.code
            self._recorder.add("answered_items_total", model=model, version=scored.version, outcome=outcome)


async def _unless_gone(request: Request, work: Any) -> Any:
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


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(call: Call, scored: ScoredCall) -> None:
    # The last border before a client: no reply holds fewer rewards than were asked for, or one that is no number.
    whole = len(scored.results) == len(call.items)
    if not whole or any(
        result.rewards is not None and (len(result.rewards) != len(item.completions) or not result.is_finite())
        for item, result in zip(call.items, scored.results, strict=True)
    ):
        raise ServerError("a replica's answer does not hold one finite reward per completion", remedy="report this")


def _too_late() -> DeadlineError:
    return DeadlineError("the deadline passed before the request was scored", remedy="retry with a longer deadline, or send less at once")
