"""Rayward's own paths that score, in the form of a dialect: `POST /v1/score` and `POST /v1/best_of_n`.

    best_of_n   {"prompt": str | messages, "completions": [str | messages, ...], "top_n"?: int, and what /v1/score has besides items}
    reply       {"id", "model", "version", "best": int, "ranking": [{"index": int, "reward": float}, ...],
                 "failed": [{"index": int, "error": {...}}, ...], "usage", "timings"}

`ranking` goes from the highest reward down, equal ones in the order of the request, and `best` is the first of it. Every completion is
scored for itself, so that one which cannot be scored stands in `failed` and leaves the others their rewards.

Pydantic and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationError

from rayward.errors import RaywardError, RuleError
from rayward.wire.dialect import JSON, Answered, Body, Call, ItemFailedError, Route
from rayward.wire.items import ItemError, ScoreItem
from rayward.wire.native import (
    Options,
    ScoreReply,
    ScoreRequest,
    TextOrMessages,
    Usage,
    Wire,
    WireTimings,
    build_reply,
    error_reply,
    usage_of,
)
from rayward.wire.rules import Limits, body_too_large, checked, decode, has_escapes

NATIVE = "rayward"
"""Name of the native schema among the dialects."""


class BestOfNRequest(Options):
    """Body of `POST /v1/best_of_n`: one item, and what is asked of it."""

    prompt: TextOrMessages
    completions: list[TextOrMessages]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    """How many of the ranking come back; null: all."""


class Ranked(Wire):
    """One completion by its index in the request."""

    index: int
    reward: float


class Failed(Wire):
    """A completion that has no reward, by its index in the request."""

    index: int
    error: ItemError


class BestOfNReply(Wire):
    """Body of a 200 reply."""

    id: str
    model: str
    version: str
    best: int
    ranking: list[Ranked]
    failed: tuple[Failed, ...] = ()
    usage: Usage
    timings: WireTimings | None = None


def parse_score(body: bytes, limits: Limits) -> Call:
    """`POST /v1/score`.

    Raises:
        RuleError: the first rule that is broken, and the item.
    """
    raw = _json_of(body, limits)
    items, request = checked(raw, limits, escapes=has_escapes(body))
    return _call(items, request, _render_score)


def parse_best_of_n(body: bytes, limits: Limits) -> Call:
    """`POST /v1/best_of_n`.

    Raises:
        RuleError: the first rule that is broken.
    """
    raw = _json_of(body, limits)
    if not isinstance(raw, dict):
        raise RuleError("wrong_type", "the body: Input should be an object", remedy=_FORM)
    unknown = sorted(set(raw) - set(BestOfNRequest.model_fields))
    if unknown:
        raise RuleError("unknown_field", f"{unknown[0][:200]}: Extra inputs are not permitted", remedy=_FORM)
    top_n = _top_n(raw)
    item = {name: raw[name] for name in _OF_ITEM if name in raw}
    options = {name: value for name, value in raw.items() if name not in _OF_ITEM and name != "top_n"}
    (whole,), request = checked({**options, "items": [item]}, limits, escapes=has_escapes(body))
    items = [replace(whole, completions=(completion,)) for completion in whole.completions]
    return _call(items, request, lambda answered: _render_best(answered, top_n))


_OF_ITEM = ("prompt", "completions", "tools", "chat_template_kwargs")
_FORM = (
    'the form is {"prompt": str | messages, "completions": [str | messages, ...], "top_n"?: int >= 1}, with tools, chat_template_kwargs, '
    "model, version, weights, normalise, n_critiques, temperature and deadline_ms as in POST /v1/score"
)


def _json_of(body: bytes, limits: Limits) -> Any:
    if len(body) > limits.max_body_bytes:
        body_too_large(len(body), limits)
    return decode(body)


def _top_n(raw: dict[str, Any]) -> int | None:
    top_n = raw.get("top_n")
    if top_n is None:
        return None
    if type(top_n) is not int or top_n < 1:
        raise RuleError("wrong_type", "top_n: Input should be an integer of at least 1", remedy=_FORM)
    return top_n


def _call(items: Sequence[ScoreItem], request: Options, render: Callable[[Answered], Body]) -> Call:
    return Call(tuple(items), render, model=request.model, version=request.version, deadline_ms=request.deadline_ms)


def _render_score(answered: Answered) -> Body:
    reply = build_reply(answered.request_id, answered.model, answered.version, answered.results, _timings(answered))
    try:
        return Body(reply.model_dump_json(exclude_none=True).encode())
    except ValidationError as exc:  # a result that holds a number which is not finite
        raise ValueError("a result breaks the schema of replies") from exc


def _render_best(answered: Answered, top_n: int | None) -> Body:
    ranking = [Ranked(index=index, reward=r.rewards[0]) for index, r in enumerate(answered.results) if r.rewards is not None]
    failed = [Failed(index=index, error=r.error) for index, r in enumerate(answered.results) if r.error is not None]
    if not ranking:
        raise ItemFailedError(failed[0].error, item=0)
    ranking.sort(key=lambda ranked: -ranked.reward)
    reply = BestOfNReply(
        id=answered.request_id,
        model=answered.model,
        version=answered.version,
        best=ranking[0].index,
        ranking=ranking[:top_n],
        failed=tuple(failed),
        usage=usage_of(answered.results),
        timings=_timings(answered),
    )
    return Body(reply.model_dump_json(exclude_none=True).encode())


def _timings(answered: Answered) -> WireTimings:
    times = answered.timings
    return WireTimings(queue_s=times.queue_s, encode_s=times.encode_s, compute_s=times.compute_s, total_s=times.total_s)


def native_error(status: int, error: RaywardError, code: str) -> JSON:
    """The native error body."""
    return error_reply(error, code)[1].model_dump(mode="json", exclude_none=True)


SCORE = Route(
    path="/v1/score",
    dialect=NATIVE,
    summary="Rewards for each item's completions, in the shape and order of the request",
    parse=parse_score,
    error=native_error,
    request=ScoreRequest.model_json_schema(),
    reply=ScoreReply.model_json_schema(mode="serialization"),
)
BEST_OF_N = Route(
    path="/v1/best_of_n",
    dialect=NATIVE,
    summary="The completions of one prompt from the best down",
    parse=parse_best_of_n,
    error=native_error,
    request=BestOfNRequest.model_json_schema(),
    reply=BestOfNReply.model_json_schema(mode="serialization"),
)
