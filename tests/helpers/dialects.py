"""A client of a dialect without a server: a body goes through the table of routes, and given rewards come back in the dialect's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayward.contract.conversation import TakenAs
from rayward.errors import RaywardError, RuleError
from rayward.wire.dialect import Answered, Body, Call, ItemFailedError, Route, Timings
from rayward.wire.dialects.table import ROUTES
from rayward.wire.items import ItemError, ItemResult, ScoreItem, TokenTrace
from rayward.wire.rules import Limits

LIMITS = Limits(max_items=50, max_completions_per_item=4, max_chars_per_text=1000, max_body_bytes=100_000)


def route_of(path: str, body: bytes = b"{}", method: str = "POST") -> Route:
    """The route that the table has for a body at a path."""
    (found,) = (route for route in ROUTES if route.path == path and method in route.methods)
    return found.pick(body) if found.pick else found


def encoded(body: Any) -> bytes:
    """A body as clients send it."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def parsed(path: str, body: Any, limits: Limits = LIMITS) -> Call:
    """What a body asks for."""
    return route_of(path, encoded(body)).parse(encoded(body), limits)


@dataclass
class Scored:
    """How a call is answered: its rewards in order, an item's error in place of a whole item's, and what else results hold."""

    rewards: Sequence[float]
    taken_as: TakenAs = "rendered"
    errors: dict[int, ItemError] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("reward",)
    values: Sequence[Sequence[float]] = ()

    def of(self, call: Call) -> Answered:
        """The answer that an ingress hands to `render`."""
        values, rows = iter(self.rewards), iter(self.values)
        results = [self._result(index, item, values, rows) for index, item in enumerate(call.items)]
        assert next(values, None) is None, "more rewards than completions"
        return Answered(
            call.request_id or "r1", "our-model", "3f2a9c01b7de", tuple(results), 1_700_000_000, Timings(total_s=0.25), self.outputs
        )

    def _result(self, index: int, item: ScoreItem, values: Iterator[float], rows: Iterator[Sequence[float]]) -> ItemResult:
        if index in self.errors:
            return ItemResult(error=self.errors[index])
        rewards = tuple(next(values) for _ in item.completions)
        traces = tuple(TokenTrace(("a", "b"), (0.125, reward)) for reward in rewards) if item.trace else None
        outputs = tuple(tuple(next(rows)) for _ in rewards) if self.values else None
        sizes = tuple(10 + number for number in range(len(rewards)))
        return ItemResult(
            rewards,
            outputs=outputs,
            traces=traces,
            num_tokens=sizes,
            taken_as=self.taken_as,
            tokens=sum(sizes),
            tokens_computed=sum(sizes) - len(sizes) + 1,
        )


def answered(path: str, body: Any, scored: Scored) -> Body:
    """The reply of a scored call."""
    call = parsed(path, body)
    return call.render(scored.of(call))


def post(path: str, body: Any, *rewards: float, **scored: Any) -> Any:
    """The JSON that a client gets for these rewards."""
    reply = answered(path, body, Scored(rewards, **scored))
    assert not isinstance(reply.content, bytes)
    return json.loads(json.dumps(reply.content, allow_nan=False))


def refusal(path: str, body: Any, limits: Limits = LIMITS) -> tuple[int, Any]:
    """Status and body with which a request is refused before it is scored."""
    route = route_of(path, encoded(body))
    try:
        route.parse(encoded(body), limits)
    except RuleError as error:
        return as_reply(route, error, error.status, error.code)
    raise AssertionError("the request was not refused")


def failure(path: str, body: Any, scored: Scored) -> tuple[int, Any]:
    """Status and body where an item has no reward."""
    route = route_of(path, encoded(body))
    call = route.parse(encoded(body), LIMITS)
    try:
        call.render(scored.of(call))
    except ItemFailedError as error:
        return as_reply(route, error, error.status, error.code)
    raise AssertionError("the request was answered")


def as_reply(route: Route, error: RaywardError, status: int, code: str) -> tuple[int, Any]:
    """What an ingress makes of an error on a route."""
    status = route.statuses.get(status, status)
    return status, json.loads(json.dumps(route.error(status, error, code)))
