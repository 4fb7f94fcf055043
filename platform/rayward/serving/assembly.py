"""What one ingress is made of: the dispatcher over the table of routes, all dialects, and the manager's answers beside them."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

from ray import serve

from rayward.config.scoring import ScoringConfig
from rayward.errors import RaywardError, UnavailableError
from rayward.serving import administration
from rayward.serving.applications import table_store
from rayward.serving.auth import Keys, check_exposure
from rayward.serving.calls import Stats
from rayward.serving.dispatch import Dispatcher
from rayward.serving.front import Endpoint, Front, Incoming, no_span
from rayward.serving.handles import ServeHandles, by_reference, our_error
from rayward.serving.metrics import Recorder
from rayward.serving.mounts import all_routes
from rayward.serving.poison import Convictions
from rayward.serving.proxies import running_address
from rayward.serving.routes import RouteTable
from rayward.serving.seeing import Seeing
from rayward.serving.status import ServiceStatus
from rayward.serving.tracing import tracing_of
from rayward.storage import join
from rayward.wire.dialect import JSON

logger = logging.getLogger("ray.serve")

MANAGER_TIMEOUT_S = 10.0
"""For what the manager has in memory; publishing may take as long as copying the model does."""

PUBLISH_TIMEOUT_S = 3600.0


def assemble(config: ScoringConfig, manager: Any) -> Front:
    """The ingress of one process.

    Args:
        manager: handle of `ManagerDeployment`.

    Raises:
        ConfigError: the proxies listen to other machines and nobody has to show a key; or no storage is shared; or traces are asked for and
            no collector is named.
    """
    address = running_address()
    if address is not None:
        # Here too, where a configuration file said where to listen and no command of ours was asked.
        check_exposure(address[0], config, Keys.of(config))
    front = serve.get_replica_context().app_name
    handles = ServeHandles(front, lambda model, version: (dispatcher.table or RouteTable()).application(front, model, version))
    source = f"ingress-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    store = table_store(config, front)
    convictions = Convictions(join(store.location, "poisoned")) if config.ingress_replicas > 1 else None
    recorder = Recorder(source, "ingress")
    dispatcher = Dispatcher(store.read, handles, recorder=recorder, convictions=convictions)

    async def read_table() -> None:
        try:
            await dispatcher.run()
        finally:
            await dispatcher.close()

    tracing = tracing_of(config)
    manager = by_reference(manager)
    seeing = Seeing(_RemoteManager(manager), dispatcher.stats, page=config.page)
    return Front(
        dispatcher,
        routes=all_routes(),
        endpoints=(*admin_endpoints(manager), *seeing.endpoints()),
        background=(read_table, seeing.report),
        recorder=recorder,
        span=no_span if tracing is None else tracing.span,
    )


def admin_endpoints(manager: Any) -> list[Endpoint]:
    """`/admin/models…`, for keys of scope admin."""
    found = [_admin_endpoint(manager, "GET", "/admin/models", "list", "Models, versions and what each does")]
    for verb, schema in administration.VERBS.items():
        found.append(_admin_endpoint(manager, "POST", f"/admin/models/{verb}", verb, (schema.__doc__ or "").strip()))
    return found


def _admin_endpoint(manager: Any, method: str, path: str, verb: str, summary: str) -> Endpoint:
    async def answer(incoming: Incoming) -> JSON:
        timeout_s = PUBLISH_TIMEOUT_S if verb == "publish" else MANAGER_TIMEOUT_S
        logger.info("%s asks to %s", incoming.caller, verb)
        return await ask_manager(manager.administer, verb, incoming.body, timeout_s=timeout_s)

    request = administration.VERBS[verb].model_json_schema() if method == "POST" else None
    reply = {"type": "object", "description": "the models as they stand then"}
    return Endpoint(method, path, summary, answer, scope="admin", request=request, reply=reply)


class _RemoteManager:
    """`seeing.Manager` by handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def report(self, stats: Stats) -> None:
        await self._handle.report.remote(stats)

    async def stats(self) -> Sequence[Stats]:
        found: Sequence[Stats] = await ask_manager(self._handle.stats)
        return found

    async def status(self) -> ServiceStatus:
        found: ServiceStatus = await ask_manager(self._handle.status)
        return found


async def ask_manager(method: Any, *arguments: Any, timeout_s: float = MANAGER_TIMEOUT_S) -> Any:
    """Call the manager.

    Raises:
        RaywardError: what it raises; UnavailableError while it is away.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await method.remote(*arguments)
    except RaywardError:
        raise
    except TimeoutError as exc:
        raise UnavailableError(f"the manager did not answer within {timeout_s:g} s", remedy="retry; scoring goes on meanwhile") from exc
    # Broad on purpose: Ray raises errors of many families for a process that is away.
    except Exception as exc:
        raise our_error(exc) from exc
