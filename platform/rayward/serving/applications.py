"""Serve as the manager sees it: one application per version of a model, and the deployment in which the manager itself lives."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any, cast

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from rayward.cluster import device_environment
from rayward.config.scoring import ReplicaConfig, ScoringConfig
from rayward.errors import ConfigError, ServerError, marking
from rayward.serving.autoscaling import REPORT_ENVIRONMENT, scaling_options
from rayward.serving.calls import Stats
from rayward.serving.drift import Drift, drift_of
from rayward.serving.handles import SCORER, handle_for_a_while
from rayward.serving.loopback import stay_on_loopback
from rayward.serving.manager import AppState, Manager, Standing
from rayward.serving.replica import ScorerDeployment
from rayward.serving.reporting import Board
from rayward.serving.routes import Release
from rayward.serving.status import ServiceStatus, build_status
from rayward.serving.table_store import TableStore, table_location
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

HEALTH: dict[str, Any] = {
    "health_check_period_s": 5.0,
    # A replica answers beside its work; one that says nothing for so long hangs or is stopped.
    "health_check_timeout_s": 30.0,
    # A constructor that refuses its model refuses it every time; what is wanted all the same, the manager starts again.
    "max_constructor_retry_count": 1,
}

QUIET: dict[str, Any] = {"logging_config": LoggingConfig(enable_access_log=False)}
"""For who is called by handle: a line of log for each call, of which there are thousands, says nothing that the counts do not."""

MAX_WAITING_PER_CALLER = 4096
"""Requests that wait in one ingress for a replica that comes from zero, or has its hands full; the ingress's own bound is below it."""

INFO_TIMEOUT_S = 60.0
QUIET_TICK_S = 5.0
BUSY_TICK_S = 1.0

STATES: dict[ApplicationStatus, AppState] = {
    ApplicationStatus.NOT_STARTED: "starting",
    ApplicationStatus.DEPLOYING: "starting",
    ApplicationStatus.RUNNING: "running",
    # Serve replaces the replicas by itself.
    ApplicationStatus.UNHEALTHY: "starting",
    ApplicationStatus.DEPLOY_FAILED: "failed",
    ApplicationStatus.DELETING: "stopping",
}


def scorer_application(front: str, model: str, release: Release) -> serve.Application:
    """The application of one version: replicas that load it, verify it, and score."""
    config = release.config
    return cast(
        serve.Application,
        cast(serve.Deployment, ScorerDeployment)
        .options(
            name=SCORER,
            # The bound that is meant to hold is the replica's own, in tokens; this one only has to be above it.
            max_ongoing_requests=config.max_ongoing_requests,
            max_queued_requests=MAX_WAITING_PER_CALLER,
            # New settings: a replica more is started before one is stopped, so that nothing is refused meanwhile.
            max_surge_percent=100,
            # What a replica holds when it is stopped, it finishes.
            graceful_shutdown_timeout_s=config.drain_s,
            ray_actor_options={
                "num_cpus": config.cpus_per_replica,
                "num_gpus": config.gpus_per_replica,
                "runtime_env": {"env_vars": scorer_environment(config)},
            },
            **scaling_options(config),
            **HEALTH,
            **QUIET,
        )
        .bind(release.source, config, model, front, release.content),
    )


def scorer_environment(config: ReplicaConfig) -> dict[str, str]:
    """Environment variables of a scorer's process."""
    # The manager starts the scorers, not the driver: what the driver found the package by has to be handed on.
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    return {
        **path,
        "OMP_NUM_THREADS": str(config.threads_per_replica),
        "TOKENIZERS_PARALLELISM": "false",
        **REPORT_ENVIRONMENT,
        **device_environment(config.gpus_per_replica),
    }


class ServeFleet:
    """The applications of one front on the Serve of this cluster.

    Args:
        front: name of the application with the ingress.
    """

    def __init__(self, front: str) -> None:
        self._front = front

    def standing(self) -> dict[str, Standing]:
        """Every application of the cluster by its name."""
        return {
            name: Standing(STATES[found.status], _message(found), _num_running(found))
            for name, found in serve.status().applications.items()
        }

    def start(self, application: str, model: str, release: Release) -> None:
        """Deploy it, or its new settings in place; returns before it runs."""
        target = serve.RunTarget(scorer_application(self._front, model, release), name=application, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def stop(self, application: str) -> None:
        """Let its replicas finish what they hold and take it down; returns before it is gone."""
        serve.delete(application, _blocking=False)

    def info(self, application: str) -> ModelInfo:
        """What its replicas say that they serve."""
        return asyncio.run(_info(application))


async def _info(application: str) -> ModelInfo:
    async with handle_for_a_while(application, SCORER) as handle, asyncio.timeout(INFO_TIMEOUT_S):
        info: ModelInfo = await handle.info.remote()
        return info


def _message(found: Any) -> str:
    # The application's own message names the deployment only; the traceback of the constructor is in the deployment's.
    messages = [deployment.message for deployment in found.deployments.values() if deployment.message]
    return "\n".join(messages) or str(found.message)


def _num_running(found: Any) -> int:
    return sum(int(deployment.replica_states.get("RUNNING", 0)) for deployment in found.deployments.values())


def table_store(config: ScoringConfig, front: str) -> TableStore:
    """The table of an application, for a process of it.

    Raises:
        ConfigError: there is no `state`, and the processes of this cluster do not see one disk.
    """
    if config.state is None:
        addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(addresses) > 1:
            raise ConfigError(
                f"the cluster has {len(addresses)} machines and `state` is not set, so not all of them would see the table of routes",
                remedy="set state to a directory that all machines share, or to a URI such as s3://bucket/rayward",
            )
    session = ray.get_runtime_context().get_session_name()
    return TableStore(table_location(config.state, front=front, session=session))


@serve.deployment(name="manager")
class ManagerDeployment:
    """The manager's process: runs its rounds, answers administrators, keeps what the processes of the application have counted.

    Args:
        config: of the application.
    """

    @marking
    def __init__(self, config: ScoringConfig) -> None:
        stay_on_loopback()
        front = serve.get_replica_context().app_name
        self._store = table_store(config, front)
        self._manager = Manager(self._store, ServeFleet(front), config, front=front, drift=self._drift)
        self._asked = asyncio.Event()
        self._board = Board(time.monotonic)
        self._rounds = asyncio.get_running_loop().create_task(self._run())

    async def administer(self, verb: str, body: bytes) -> dict[str, Any]:
        """See `Manager.administer`."""
        done = await asyncio.to_thread(self._administer, verb, body)
        self._asked.set()
        return done

    @marking
    def _administer(self, verb: str, body: bytes) -> dict[str, Any]:
        return self._manager.administer(verb, body)

    async def report(self, stats: Stats) -> None:
        """Take the newest counts of a process."""
        self._board.report(stats)

    async def stats(self) -> list[Stats]:
        """The newest counts of every process, and what follows from them."""
        return self._board.stats(self._manager.table)

    async def status(self) -> ServiceStatus:
        """The picture of now."""
        return build_status(self._manager.table, self._board)

    def _drift(self, model: str, current: str, version: str) -> Drift | None:
        return drift_of((heard.stats for heard in self._board.heard()), model=model, current=current, version=version)

    def check_health(self) -> None:
        """Called by Serve.

        Raises:
            ServerError: the rounds have ended; Serve starts another manager.
        """
        if self._rounds.done():
            raise ServerError("the manager's rounds have ended", remedy="none; Serve starts another manager")

    def __del__(self) -> None:
        # Called by Serve when the replica is stopped; a constructor that failed has no manager. Once: Python calls it again.
        manager = self.__dict__.pop("_manager", None)
        if manager is not None:
            manager.end()

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._manager.tick)
            # Broad on purpose: storage, Serve's controller or the cluster's head may be away; what is wanted stays in the table.
            except Exception:
                logger.exception("a round of the manager failed; the next one goes on")
            pause_s = BUSY_TICK_S if self._manager.is_busy() else QUIET_TICK_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()
            except TimeoutError:
                continue
            self._asked.clear()
