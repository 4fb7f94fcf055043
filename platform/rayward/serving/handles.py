"""Scorers by Serve's handles, and the one place where Serve's and Ray's errors of a call become ours."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    RpcError,
    TaskCancelledError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from rayward.errors import OverloadedError, RaywardError, ServerError, UnavailableError, carried_by
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.dispatch import ReplicaDiedError
from rayward.serving.routes import application_of
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

SCORER = "scorer"
"""Name of the deployment of a version's application."""

BY_ORDER = ("node has died", "ray.kill")
"""In Ray's account of the death of an actor: it did not end of what it computed."""

# What is given back when the process, the node, or a large reply on it is gone; and what is not the replica's own word.
DIED = (ActorDiedError, OutOfMemoryError, NodeDiedError)
UNAVAILABLE = (
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    TaskCancelledError,
    RayActorError,
    ObjectLostError,
    OwnerDiedError,
    RpcError,
    GetTimeoutError,
)


def our_error(exc: BaseException) -> RaywardError:
    """The error of our tree for what a call by handle raised."""
    carried = carried_by(exc)
    if carried is not None:
        return carried
    if isinstance(exc, BackPressureError):
        return OverloadedError(
            f"too many requests wait for a replica ({exc.message})",
            remedy="retry after the given delay",
            retry_after_s=exc.retry_after_s or 1.0,
        )
    # A task error has the type of its cause too; raised inside of the replica, that says nothing about the replica.
    if not isinstance(exc, RayTaskError):
        if isinstance(exc, DIED):
            account = str(exc)
            preempted = isinstance(exc, RayActorError) and exc.preempted
            by_order = preempted or isinstance(exc, NodeDiedError) or any(words in account for words in BY_ORDER)
            logger.error("a scorer replica died under a call: %s", account)
            return ReplicaDiedError("a replica died under the call", by_order=by_order)
        if isinstance(exc, UNAVAILABLE):
            logger.warning("no scorer replica took a call: %s: %s", type(exc).__name__, exc)
            return UnavailableError("no replica could take the call", remedy="retry; a replica is being started")
    # Its text may quote the request: the replica has logged it, as far as it may.
    cause = exc.cause if isinstance(exc, RayTaskError) and exc.cause is not None else exc
    logger.error("a scorer failed: %s", type(cause).__name__)
    return ServerError(f"the scorer failed ({type(cause).__name__})", remedy="retry; look into the server's log")


def new_handle(application: str, deployment: str, *, check_exists: bool = True) -> DeploymentHandle[Any]:
    """A handle for the running event loop alone.

    With RAY_SERVE_THROUGHPUT_OPTIMIZED the router of a handle lives in the loop that calls first, and Serve gives a process the same handle
    again and again, also when that loop has ended. A copy has a router of its own.
    """
    return by_reference(copy.copy(serve.get_deployment_handle(deployment, app_name=application, _check_exists=check_exists)))


def by_reference(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """The handle, calling as Ray does: the gRPC of Serve's optimised paths refuses 4 MiB, and says of no call that its replica died."""
    return handle.options(_by_reference=True)


@asynccontextmanager
async def handle_for_a_while(application: str, deployment: str) -> AsyncIterator[Any]:
    """A handle until the end of the block; `asyncio.run` of it is how a thread without an event loop asks."""
    handle = new_handle(application, deployment)
    try:
        yield handle
    finally:
        await handle.shutdown_async()


STATUS_TIMEOUT_S = 1.0


def _num_running(application: str) -> int | None:
    try:
        found = serve.status().applications.get(application)
    except (RayError, RayServeException) as exc:
        logger.info("nobody says how many replicas of %s run (%s)", application, type(exc).__name__)
        return None
    scorer = found.deployments.get(SCORER) if found is not None else None
    return None if scorer is None else int(scorer.replica_states.get("RUNNING", 0))


class ServeHandle:
    """One version's replicas."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._question: asyncio.Future[int | None] | None = None

    async def score(self, call: ScoreCall) -> ScoredCall:
        """One request; see `ScorerHandle`."""
        scored: ScoredCall = await self._answer(self._handle.score.remote(call))
        return scored

    async def info(self) -> ModelInfo:
        """What is served."""
        info: ModelInfo = await self._answer(self._handle.info.remote())
        return info

    async def num_replicas(self) -> int | None:
        """Replicas that run, by the controller's word; None while it is away."""
        # One question at a time: while the controller is away it takes a thread for as long.
        if self._question is None or self._question.done():
            self._question = asyncio.get_running_loop().run_in_executor(None, _num_running, self._handle.app_name)
        done, _ = await asyncio.wait([self._question], timeout=STATUS_TIMEOUT_S)
        return self._question.result() if done else None

    async def _answer(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            # The caller is gone or out of time: the replica must not go on for nobody.
            response.cancel()
            raise
        except (RayError, RayServeException) as exc:
            raise our_error(exc) from exc

    async def close(self) -> None:
        """Let go, and wait until its router has ended."""
        await self._handle.shutdown_async()


class ServeHandles:
    """The scorers of one application's versions.

    Args:
        front: name of the ingress's application.
        application: of a model and version, where it is not the one that they are named by.
    """

    def __init__(self, front: str, application: Callable[[str, str], str] | None = None) -> None:
        self._application = application or partial(application_of, front)
        self._handles: dict[tuple[str, str], ServeHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def of(self, model: str, version: str) -> ServeHandle:
        """The handle of one version; it waits for an application that is not there yet."""
        handle = self._handles.get((model, version))
        if handle is None:
            application = self._application(model, version)
            # Unchecked: the question whether it exists would stop the event loop for as long as the controller is away.
            handle = self._handles[model, version] = ServeHandle(new_handle(application, SCORER, check_exists=False))
        return handle

    def keep(self, versions: set[tuple[str, str]]) -> None:
        """Let go of the handles of all other versions."""
        for key in set(self._handles) - versions:
            task = asyncio.get_running_loop().create_task(self._handles.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
