"""Replies of the scoring service: 200 bodies, error bodies with the headers that go with them, and what the log is told."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping
from urllib.parse import quote

from starlette.responses import Response

from rayward.errors import OverloadedError, RaywardError
from rayward.wire.dialect import JSON, Answered, Body
from rayward.wire.endpoints import native_error
from rayward.wire.native import status_of

VERSION_HEADER = "x-rayward-version"
"""Of a request: the version that it pins, where the body pins none. Of a reply: the version that scored."""


def response_of(body: Body, headers: Mapping[str, str] | None = None) -> Response:
    """A 200 reply."""
    content = body.content if isinstance(body.content, bytes) else json.dumps(body.content, allow_nan=False, separators=(",", ":")).encode()
    return Response(content, headers={**(headers or {}), **body.headers}, media_type=body.media_type)


def scored_headers(answered: Answered) -> dict[str, str]:
    """Who scored and where the time went, for dialects whose schema has no room for it."""
    parts = (("queue", "queue_s"), ("encode", "encode_s"), ("compute", "compute_s"), ("total", "total_s"))
    return {
        "x-rayward-model": quote(answered.model, safe="/:@+ "),
        VERSION_HEADER: quote(answered.version),
        "server-timing": ", ".join(f"{name};dur={getattr(answered.timings, field) * 1e3:.1f}" for name, field in parts),
    }


def json_response(content: JSON, status: int, headers: Mapping[str, str]) -> Response:
    """A reply that is JSON."""
    return Response(json.dumps(content, separators=(",", ":")), status, dict(headers), media_type="application/json")


def refusal(content: JSON, status: int, error: RaywardError) -> Response:
    """An error body, with what its status asks for in headers."""
    headers = {}
    if status_of(error) == 401:
        headers["www-authenticate"] = "Bearer"
    if status_of(error) in (429, 503):
        retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1e3)))
    return json_response(content, status, headers)


def native_refusal(error: RaywardError, code: str) -> Response:
    """The native error body."""
    status = status_of(error)
    return refusal(native_error(status, error, code), status, error)


def describe(exc: BaseException, *, texts: bool) -> str:
    """An error for the log: its type and where it was raised; its message, which may quote what a user sent, only where that is allowed."""
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(traceback.extract_tb(exc.__traceback__)))
    return f"{type(exc).__name__}{': ' + str(exc) if texts else ''} at {where or 'no frame'}"
