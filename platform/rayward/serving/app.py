"""The scoring server: a Ray Serve application of an HTTP ingress and a scorer. The only module that imports ray.serve.

    client -> ingress (limits, rules, error bodies) -> scorer (batches by tokens over requests, forward in a thread)

The scorer's constructor verifies the contract; while it fails, the application never becomes healthy, and the reason is
in the application's status. One request is scored by one replica, hence by one model version.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rayward.cluster import connect, device_environment
from rayward.config.scoring import ScoringConfig
from rayward.errors import OverloadedError, RaywardError, RequestError, RuleError, ServerError, marking
from rayward.serving.preflight import check_model, free_port, startup_error
from rayward.wire.items import ItemResult, ScoreItem
from rayward.wire.native import ErrorReply, Health, ModelInfo, ModelList, ScoreReply, ScoreRequest, WireNormaliser, build_reply, error_reply
from rayward.wire.rules import Limits, body_too_large, parse_request

logger = logging.getLogger("ray.serve")
RETRY_AFTER_S = 1
CHARS_PER_TOKEN = 4
"""Guess used for grouping requests only; the scorer counts real tokens."""

OVERHEAD_TOKENS = 8
GRACEFUL_SHUTDOWN_S = 60.0
HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 60.0
INGRESS_SLACK = 64
"""Requests that the ingress holds beyond what the scorers run and queue: those being read, checked or refused."""


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """Results of one request and the version that computed them."""

    version: str
    results: list[ItemResult]


@dataclass(frozen=True, slots=True)
class _Call:
    # One request in the batch queue; `share` is its part of a full batch in units of 1 / max_ongoing_requests.
    items: Sequence[ScoreItem]
    share: int


def _sum_shares(calls: list[_Call]) -> int:
    return sum(call.share for call in calls)


@serve.deployment(name="scorer")
class ScorerDeployment:
    """Holds one `Scorer`; merges the requests that wait into one call of it."""

    # Of a constructor that fails, Serve keeps the text of the traceback only.
    @marking
    def __init__(self, config: ScoringConfig, model_name: str) -> None:
        import torch

        from rayward.scoring.load import load_scored_model

        torch.set_num_threads(config.threads_per_replica)
        self._config = config
        self._scorer = load_scored_model(config.model, config.placement)
        facts = self._scorer.facts
        self._info = ModelInfo(
            id=model_name,
            version=self._scorer.version,
            max_tokens=facts.max_tokens,
            outputs=list(facts.outputs),
            weight_sets=list(facts.weight_sets),
            normaliser=None if facts.normaliser is None else WireNormaliser(**facts.normaliser.model_dump()),
            writes_critiques=facts.writes_critiques,
        )
        # The forward blocks; in the event loop it would starve health checks and the queue.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: str | None = None
        # Units of 1 / max_ongoing_requests of the token budget: Serve warns when a batch can hold more than a replica may run.
        self._score_batch.set_max_batch_size(config.max_ongoing_requests)
        self._score_batch.set_batch_wait_timeout_s(config.batch_wait_s)

    def info(self) -> ModelInfo:
        """What is served."""
        return self._info

    def check_health(self) -> None:
        """Called by Serve; a replica whose forward failed is replaced.

        Raises:
            ServerError: the last forward failed.
        """
        if self._failure is not None:
            raise ServerError(f"the last forward failed: {self._failure}", remedy="none; Serve replaces the replica")

    async def score(self, items: Sequence[ScoreItem]) -> ScoredRequest:
        """Rewards or errors of one request's items, in order."""
        # Serve closes a batch after its wait even while another one runs; held back here, batches grow under load instead.
        await self._idle.wait()
        results: list[ItemResult] = await self._score_batch(_Call(items, self._share(items)))
        return ScoredRequest(self._info.version, results)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0, max_concurrent_batches=1, batch_size_fn=_sum_shares)  # type: ignore[untyped-decorator]
    async def _score_batch(self, calls: list[_Call]) -> list[list[ItemResult]]:
        merged = [item for call in calls for item in call.items]
        self._idle.clear()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._scorer.score, merged)
        except RuntimeError as exc:
            # Everything about the input is checked before the forward: out of memory, or a broken device.
            self._failure = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            self._idle.set()
        replies: list[list[ItemResult]] = []
        start = 0
        for call in calls:
            replies.append(results[start : start + len(call.items)])
            start += len(call.items)
        return replies

    def _share(self, items: Sequence[ScoreItem]) -> int:
        num_chars = sum(len(turn["content"]) for item in items for turn in item.prompt)
        num_chars += sum(len(text) for item in items for text in item.completions)
        num_texts = sum(len(item.completions) for item in items)
        tokens = num_chars / CHARS_PER_TOKEN + num_texts * OVERHEAD_TOKENS
        units = self._config.max_ongoing_requests
        # A request over the budget is a batch of its own; Serve refuses sizes above the maximum.
        return max(1, min(units, math.ceil(tokens * units / self._config.tokens_per_batch)))


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


def build(args: ScoringConfig) -> serve.Application:
    """The application; `import_path: rayward.serving.app:build` in a Serve config file."""
    model_name = args.model_name or Path(args.model).resolve().name
    scaling: dict[str, Any] = (
        {"num_replicas": args.min_replicas}
        if args.min_replicas == args.max_replicas
        else {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
            }
        }
    )
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        # A constructor that refuses its model refuses it every time.
        "max_constructor_retry_count": 1,
    }
    scorer = (
        cast(serve.Deployment, ScorerDeployment)
        .options(
            max_ongoing_requests=args.max_ongoing_requests,
            max_queued_requests=args.max_queued_requests,
            ray_actor_options={
                "num_cpus": args.cpus_per_replica,
                "num_gpus": args.gpus_per_replica,
                "runtime_env": {
                    "env_vars": {
                        "OMP_NUM_THREADS": str(args.threads_per_replica),
                        "TOKENIZERS_PARALLELISM": "false",
                        **device_environment(args.gpus_per_replica),
                    }
                },
            },
            **scaling,
            **common,
        )
        .bind(args, model_name)
    )
    # Room for all that the scorers run and queue, so that refusals come from our code, with our error body.
    capacity = args.max_ongoing_requests * args.max_replicas + args.max_queued_requests + INGRESS_SLACK
    ingress = (
        cast(serve.Deployment, Ingress)
        .options(
            num_replicas=1,
            max_ongoing_requests=capacity,
            max_queued_requests=capacity,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": device_environment(0)}},
            **common,
        )
        .bind(scorer, args, model_name)
    )
    application: serve.Application = ingress
    return application


def serve_model(
    config: ScoringConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    blocking: bool = False,
    name: str = "rayward",
    route_prefix: str = "/",
    on_ready: Callable[[str], None] | None = None,
) -> str:
    """Deploy the application and wait until it scores.

    Args:
        config: what to serve and how.
        host, port: where the proxies listen; port 0 takes a free one. A cluster on which Serve runs already keeps its own.
        blocking: stay until interrupted, then take the application down.
        name: application name; deploying under the same name again replaces the model.
        route_prefix: path the application is mounted at.
        on_ready: called with the base URL as soon as the application scores, before blocking.

    Returns:
        The base URL.

    Raises:
        ContractMismatchError: an artifact is not the contract's; the message says which part.
        ContractError, ModelLoadError: the model cannot be loaded.
        ConfigError: the port is taken.
        ServerError: the application did not start for another reason.
    """
    check_model(Path(config.model))
    # Replicas have another working directory than the driver.
    config = config.model_copy(update={"model": str(Path(config.model).resolve())})
    connect()
    running = _running_address()
    if running is None:
        port = free_port(host, port)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    else:
        host, port = running
    try:
        serve.run(build(config), name=name, route_prefix=route_prefix)
    except RuntimeError as exc:
        reason = _failure_message(name) or str(exc)
        serve.delete(name)
        raise startup_error(reason) from exc
    url = f"http://{host}:{port}{route_prefix.rstrip('/')}"
    if on_ready is not None:
        on_ready(url)
    if blocking:
        _wait_until_interrupted(name)
    return url


def _failure_message(name: str) -> str:
    # The application's own message names the deployment only; the traceback of the constructor is in the deployment's.
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application is not None else ()
    return "\n".join(deployment.message for deployment in deployments if deployment.message)


def _running_address() -> tuple[str, int] | None:
    # Host and port of the proxies if Serve runs on this cluster; Serve has no public way to ask.
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def _wait_until_interrupted(name: str) -> None:
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        serve.delete(name)
