"""The ingress's deployment: HTTP in front of the scorer."""

# No `from __future__ import annotations`: FastAPI reads the types of handlers in Serve's copy of them.
import asyncio
import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rayward.config.scoring import ScoringConfig
from rayward.errors import OverloadedError, RaywardError, RequestError, RuleError, ServerError
from rayward.serving.replica import ScoredRequest
from rayward.wire.native import ErrorReply, Health, ModelInfo, ModelList, ScoreReply, ScoreRequest, build_reply, error_reply
from rayward.wire.rules import Limits, body_too_large, parse_request

logger = logging.getLogger("ray.serve")
RETRY_AFTER_S = 1

# Serve copies the FastAPI application where `Ingress` is decorated: what its handlers use must be defined above it.
http = FastAPI(title="Rayward scoring", docs_url="/docs", redoc_url=None)


@http.exception_handler(HTTPException)
async def _unknown_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    problem = RequestError(f"{request.method} {request.url.path}: {exc.detail}", remedy="POST /v1/score, GET /v1/models or GET /health")
    _, body = error_reply(problem, code)
    return _json_response(body, status=exc.status_code, headers=dict(exc.headers or {}))


async def _read_body(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        body_too_large(int(declared), limits)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.max_body_bytes:
            body_too_large(len(body), limits)
    return bytes(body)


async def _call(response: Any) -> Any:
    # Serve's and Ray's errors become ours in this one place.
    try:
        return await response
    except BackPressureError as exc:
        raise OverloadedError(f"the queue is full ({exc.message})", remedy="send less at once and retry after the given delay") from exc
    except (DeploymentUnavailableError, RayActorError) as exc:
        logger.error("no scorer replica answered: %s", exc)
        raise OverloadedError("no scorer replica answered", remedy="retry; a replica is being started") from exc
    except RayTaskError as exc:
        # The text may quote the request; it belongs into the server's log, not into the reply.
        logger.error("the scorer failed: %s", exc)
        raise ServerError(f"the scorer failed ({type(exc.cause).__name__})", remedy="retry; look into the server's log") from exc


def _error_response(exc: RaywardError) -> Response:
    code = "overloaded" if isinstance(exc, OverloadedError) else "scorer_failed"
    status, body = error_reply(exc, code)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return _json_response(body, status=status, headers=headers)


def _json_response(body: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None, exclude_none: bool = False) -> Response:
    content = body.model_dump_json(exclude_none=exclude_none)
    return Response(content, status_code=status, headers=headers, media_type="application/json")


@serve.deployment(name="ingress")
@serve.ingress(http)
class Ingress:
    """HTTP in front of the scorer: limits, rules, error bodies. Never holds a model, never invents a reward."""

    def __init__(self, scorer: DeploymentHandle[Any], config: ScoringConfig, model_name: str) -> None:
        self._scorer = scorer
        self._model_name = model_name
        self._limits = config.limits

    @http.post(
        "/v1/score",
        response_model=ScoreReply,
        responses={status: {"model": ErrorReply} for status in (400, 404, 413, 422, 500, 502, 503)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}},
    )
    async def score(self, request: Request) -> Response:
        """Rewards for each item's completions, in the shape and order of the request."""
        try:
            body = await _read_body(request, self._limits)
            # In a thread: megabytes of JSON would hold up every other request of this event loop.
            items, model = await asyncio.to_thread(parse_request, body, self._limits)
            if model is not None and model != self._model_name:
                raise RuleError(
                    "unknown_model", f"model {model[:200]!r} is not served here", remedy=f"ask for {self._model_name!r}, or leave model out"
                )
            scored: ScoredRequest = await _call(self._scorer.score.remote(items))
            reply = build_reply(f"score-{uuid.uuid4().hex}", self._model_name, scored.version, scored.results)
        except RaywardError as exc:
            return _error_response(exc)
        return _json_response(reply, exclude_none=True)

    @http.get("/health", response_model=Health, responses={503: {"model": ErrorReply}})
    async def health(self) -> Response:
        """200 while a scorer replica answers."""
        try:
            info: ModelInfo = await _call(self._scorer.info.remote())
        except RaywardError as exc:
            return _error_response(exc)
        return _json_response(Health(model=info.id, version=info.version))

    @http.get("/v1/models", response_model=ModelList, responses={503: {"model": ErrorReply}})
    async def models(self) -> Response:
        """The served model, its version and its token limit."""
        try:
            info: ModelInfo = await _call(self._scorer.info.remote())
        except RaywardError as exc:
            return _error_response(exc)
        return _json_response(ModelList(data=[info]))
