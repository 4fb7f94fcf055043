"""The scoring server: a Ray Serve application of an HTTP ingress and a scorer.

    client -> ingress (limits, rules, error bodies) -> scorer (batches by tokens over requests, forward in a thread)

The scorer's constructor verifies the contract; while it fails, the application never becomes healthy, and the reason is
in the application's status. One request is scored by one replica, hence by one model version.
"""

# No `from __future__ import annotations`: Serve reads the type of the builder's argument, to validate the file's `args:` with it.
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ray import serve

from rayward.cluster import connect, device_environment
from rayward.config.scoring import ScoringConfig
from rayward.serving.ingress import Ingress, one_scorer
from rayward.serving.preflight import check_model, free_port, startup_error
from rayward.serving.proxies import running_address
from rayward.serving.replica import ScorerDeployment

GRACEFUL_SHUTDOWN_S = 60.0
HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 60.0
INGRESS_SLACK = 64
"""Requests that the ingress holds beyond what the scorers run and queue: those being read, checked or refused."""


def build(args: ScoringConfig) -> serve.Application:
    """The application; `import_path: rayward.serving.app:build` in a Serve config file."""
    model_name = args.model_name or Path(args.model or "").resolve().name
    scaling: dict[str, Any] = (
        {"num_replicas": args.min_replicas}
        if args.min_replicas == args.max_replicas
        else {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": 32,
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
            max_queued_requests=2048,
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
    capacity = args.max_ongoing_requests * args.max_replicas + 2048 + INGRESS_SLACK
    ingress = (
        cast(serve.Deployment, Ingress)
        .options(
            num_replicas=1,
            max_ongoing_requests=capacity,
            max_queued_requests=capacity,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": device_environment(0)}},
            **common,
        )
        .bind(args, one_scorer, scorer)
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
    check_model(Path(config.model or ""), verify=config.verify_golden)
    # Replicas have another working directory than the driver.
    config = config.model_copy(update={"model": str(Path(config.model or "").resolve())})
    connect()
    running = running_address()
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


def _wait_until_interrupted(name: str) -> None:
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        serve.delete(name)
