"""The scoring service: the application with the ingress and the manager, and how a command starts and ends it.

    front application    ingress (HTTP; reads the table of routes) and manager (makes the table true)
    one application      per version of a model: scorer replicas, started, verified and taken down by the manager

Nothing of the front holds a model, so publishing, promoting and rolling back change a table and restart nobody.
"""

# No `from __future__ import annotations`: Serve reads the type of the builder's argument, to validate the file's `args:` with it.
import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayward.cluster import connect, device_environment
from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError, RaywardError
from rayward.serving.applications import HEALTH, QUIET, ManagerDeployment, table_store
from rayward.serving.assembly import assemble
from rayward.serving.auth import KEYS_VARIABLE, Keys, check_exposure, without_secrets
from rayward.serving.autoscaling import REPORT_ENVIRONMENT
from rayward.serving.handles import handle_for_a_while
from rayward.serving.ingress import Ingress
from rayward.serving.manager import declared_models
from rayward.serving.preflight import check_listening, check_sources, free_port, startup_error
from rayward.serving.proxies import running_address
from rayward.serving.rollout import check_front
from rayward.serving.sources import settled_source
from rayward.storage import absolute

INGRESS_SLACK = 256
"""Requests that Serve lets an ingress hold beyond its own bound, so that refusals come from our code, with our error body."""

INGRESS_DRAIN_S = 60.0
KEEP_ALIVE_S = 90
"""Longer than clients keep an idle connection, so that it is the client who ends it and no request meets a closed one."""

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's variable: HAProxy instead of Serve's own proxies."""

POLL_S = 0.25
INGRESS_PATIENCE_S = 10.0
MANAGER_PATIENCE_S = 60.0
MANAGER = "manager"


def build(args: ScoringConfig) -> serve.Application:
    """The front application; `import_path: rayward.serving.app:build` in a Serve config file.

    Raises:
        ConfigError: the models that it names contradict each other.
    """
    config = settled(args)
    manager = (
        cast(serve.Deployment, ManagerDeployment)
        .options(
            # One, and the old one stops before the new one starts: the table has one writer.
            num_replicas=1,
            max_ongoing_requests=1024,
            max_queued_requests=-1,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": device_environment(0)}},
            graceful_shutdown_timeout_s=10.0,
            **HEALTH,
            **QUIET,
        )
        .bind(config)
    )
    ingress = (
        cast(serve.Deployment, Ingress)
        .options(
            num_replicas=config.ingress_replicas,
            max_ongoing_requests=config.max_requests + INGRESS_SLACK,
            max_queued_requests=config.max_requests,
            # New settings: the new ingress is there before the old one stops.
            max_surge_percent=100,
            graceful_shutdown_timeout_s=INGRESS_DRAIN_S,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ingress_environment()}},
            **HEALTH,
        )
        .bind(config, assemble, manager)
    )
    application: serve.Application = ingress
    return application


def ingress_environment() -> dict[str, str]:
    """Environment variables of an ingress's process: the keys of whoever starts it as digests, because Ray shows what stands there.

    Headers for a trace collector, which may be secrets too, are not among them: they belong into the environment of the machines.
    """
    keys = os.environ.get(KEYS_VARIABLE)
    traces = {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and not name.endswith("_HEADERS")}
    return {**REPORT_ENVIRONMENT, **device_environment(0), **traces, **({KEYS_VARIABLE: without_secrets(keys)} if keys else {})}


def settled(config: ScoringConfig) -> ScoringConfig:
    """The same settings for processes with another working directory; every model has its name.

    Raises:
        ConfigError: two models have one name, or the default one is none of them and no state is kept from before.
    """
    models = declared_models(config)
    if config.default_model is not None and config.default_model not in models and config.state is None:
        known = ", ".join(models) or "none"
        raise ConfigError(f"default_model is {config.default_model!r}; the models are: {known}", remedy="name one of these")
    placed = {name: settled_source(source) for name, source in models.items()}
    default = config.default_model or next(iter(models), None)
    places = {key: absolute(value) for key in ("state", "keys_file") if (value := getattr(config, key)) is not None}
    return config.model_copy(update={"model": None, "model_name": None, "models": placed, "default_model": default, **places})


def serve_model(
    config: ScoringConfig,
    *,
    host: str | None = None,
    port: int | None = None,
    blocking: bool = False,
    name: str = "rayward",
    route_prefix: str = "/",
    replace: bool = False,
    on_ready: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> str:
    """Deploy the application and wait until every model that the settings name scores.

    Args:
        config: what to serve and how.
        host, port: where the proxies listen, 127.0.0.1 and 8000 if not given; port 0 takes a free one. Where Serve runs already, its
            proxies are there already: what is given has to be theirs.
        blocking: stay until interrupted, then take down what this call started.
        name: of the application.
        route_prefix: path the application is mounted at.
        replace: give an application of this name that runs already these settings; its versions answer until the new ones are verified.
        on_ready: called with the base URL as soon as the application scores, before blocking.
        on_note: called with what the start waits for, where that takes long.

    Returns:
        The base URL.

    Raises:
        ContractMismatchError: an artifact is not the contract's; the message says which part.
        ContractError, ModelLoadError: a model cannot be loaded. Whatever was served before is served still.
        ConfigError: the port is taken, or not the one of the proxies that run; the name is taken.
        ServerError: the application did not start for another reason.
    """
    check_front(name)
    check_listening(host, port, config)
    config = settled(config)
    check_sources(config)
    connect()
    host, port, started_serve = _proxies(host, port, config)
    if started_serve and os.environ.get(HAPROXY) == "1":
        on_note(
            "note: HAProxy shows its statistics (port 8404) and its metrics (port 9101) on every address of this machine, to whoever asks; "
            "no texts and no rewards are among them"
        )
    running = serve.status().applications
    if name in running and not replace:
        raise ConfigError(
            f"an application named {name!r} runs on this cluster already",
            remedy="--replace gives it these settings, --name and --route-prefix put another one beside it, and `rayward models publish` "
            "adds a model or a version to it",
        )
    url = f"http://{_shown(host)}:{port}{route_prefix.rstrip('/')}"
    try:
        try:
            serve.run(build(config), name=name, route_prefix=route_prefix)
        except (RuntimeError, ValueError, RayServeException) as exc:
            raise startup_error(_failure_message(name) or str(exc)) from exc
        asyncio.run(_wait_for_models(config, name, on_note))
        _wait_for_ingress(url)
        if on_ready is not None:
            on_ready(url)
        if blocking:
            _wait_until_interrupted()
            take_down(config, name, started_serve=started_serve)
    except BaseException:
        # Also what interrupts the start: this call takes away what it started, and nothing else.
        if name not in running:
            take_down(config, name, started_serve=started_serve)
        raise
    return url


def take_down(config: ScoringConfig, name: str, *, started_serve: bool = False) -> None:
    """End an application, the applications of its versions, and with them its table where no `state` was named."""
    # First the front: its manager would start the versions again.
    serve.delete(name)
    versions = [each for each in serve.status().applications if each.startswith(f"{name}.")]
    for each in versions:
        serve.delete(each, _blocking=False)
    for each in versions:
        serve.delete(each)
    if config.state is None:
        shutil.rmtree(table_store(config, name).location, ignore_errors=True)
    if started_serve and not serve.status().applications:
        serve.shutdown()


def cluster_address() -> str:
    """Of the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _proxies(host: str | None, port: int | None, config: ScoringConfig) -> tuple[str, int, bool]:
    # Where the proxies listen, and whether they were started here.
    running = running_address()
    if running is None:
        host = "127.0.0.1" if host is None else host
        port = free_port(host, 8000 if port is None else port)
        options = {
            "host": host,
            "port": port,
            "keep_alive_timeout_s": KEEP_ALIVE_S,
            # The ingress answers by the deadline of the request itself; this ends what even so stays open.
            "request_timeout_s": config.max_deadline_s + 30.0,
        }
        serve.start(proxy_location="EveryNode", http_options=options)
        return host, port, True
    wrong = [
        f"{what} is {asked}"
        for what, asked, there in (("host", host, running[0]), ("port", port, running[1]))
        if asked not in (None, there)
    ]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)}, and Serve listens on {running[0]}:{running[1]} on this cluster already",
            remedy="leave --host and --port out to serve there (with a --name and a --route-prefix of its own), or add the model to what is"
            f" served: `rayward models publish --url http://{_shown(running[0])}:{running[1]}`; RAY_ADDRESS=local starts another cluster",
        )
    check_exposure(running[0], config, Keys.of(config))
    return *running, False


async def _wait_for_models(config: ScoringConfig, name: str, on_note: Callable[[str], None]) -> None:
    noted = ""
    heard = time.monotonic()
    async with handle_for_a_while(name, MANAGER) as handle:
        while True:
            try:
                async with asyncio.timeout(MANAGER_PATIENCE_S):
                    listing = await handle.administer.remote("list", b"")
                heard = time.monotonic()
            except (RayError, RayServeException, TimeoutError) as exc:
                # One that is replaced meanwhile goes on where the table says.
                if time.monotonic() - heard > MANAGER_PATIENCE_S:
                    raise startup_error(_failure_message(name) or str(exc)) from exc
                await asyncio.sleep(POLL_S)
                continue
            waits = [_waits_for(listing, model, source) for model, source in config.models.items()]
            note = "\n".join(each for each in waits if each)
            if note and note != noted:
                on_note(note)
            noted = note
            if all(each is None for each in waits):
                return
            await asyncio.sleep(POLL_S)


def _wait_for_ingress(url: str) -> None:
    # It reads the table every second. A model of an earlier `state` may still be loading: that is no reason to say nothing.
    end = time.monotonic() + INGRESS_PATIENCE_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/readyz", timeout=POLL_S * 4).status_code == HTTPStatus.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)


def _waits_for(listing: dict[str, Any], model: str, source: str) -> str | None:
    """What a model still waits for, in words, perhaps none; None: it scores.

    Raises:
        RaywardError: it will not.
    """
    if model in listing["unreadable"]:
        raise _error_of(listing["unreadable"][model])
    routes = listing["models"].get(model)
    if routes is None or listing["declared"].get(model) != source:
        return ""
    own = [version for version in routes["versions"] if version["source"] == source]
    if own and all(version["state"] == "failed" for version in own):
        raise _error_of(own[-1]["error"])
    waiting = [version for version in own if version["state"] == "loading"]
    waiting += [version for version in routes["versions"] if version["version"] == routes["current"] and version["serve"] != "running"]
    broken = next((version["error"] for version in waiting if version["error"]), None)
    if broken is not None:
        raise _error_of(broken)
    if waiting or routes["current"] is None:
        return "\n".join(version["message"] for version in waiting if version["message"])
    return None


def _error_of(told: dict[str, str]) -> RaywardError:
    fields = {"problem": told["message"], "remedy": told["remedy"]}
    return RaywardError.from_json(json.dumps({"types": [told["type"]], "fields": fields}))


def _shown(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _failure_message(name: str) -> str:
    # The application's own message names the deployment only; the traceback of the constructor is in the deployment's.
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application is not None else ()
    return "\n".join(deployment.message for deployment in deployments if deployment.message)


def _wait_until_interrupted() -> None:
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        return
