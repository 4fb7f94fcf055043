"""Connecting to Ray, and what every Ray process of ours needs in its environment.

A cluster that is started here is this machine's alone: its node has the loopback address, so that nothing of it listens on a network, and
who joins it needs Ray's token, which lies in the user's home directory. `RAY_AUTH_MODE=disabled` turns the token off.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from rayward.errors import ConfigError, carried_by, marking

T = TypeVar("T")

SHOW_WORKER_LOGS = "RAYWARD_WORKER_LOGS"
"""Environment variable: 1 shows the output of every Ray worker on the driver's terminal."""

SOURCE_ROOT = Path(__file__).resolve().parents[1]

WORKER_ENV = {
    # A long validation or checkpoint pauses the consumer; Ray Data would abort the run after 30 minutes.
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "-1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the entry point of a submitted job. Private, a test watches it: the public ways answer only after connecting."""

AUTH_MODE = "RAY_AUTH_MODE"
"""Ray's own variable: `token` or `disabled`; unset, a local start takes `token`."""

LOOPBACK = "127.0.0.1"

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0: a node that Ray starts has the loopback address, as it does by default on the systems after which the variable is named."""

_started_here = False


def started_here() -> bool:
    """Whether `connect` started the cluster on this machine (then its resources are all there will ever be)."""
    return _started_here


def in_submitted_job() -> bool:
    """Whether this driver runs in a `ray job submit` working directory, which is deleted afterwards."""
    return JOB_VARIABLE in os.environ


def lasting(path: str) -> str:
    """A place for results that is still there afterwards: in a submitted job, a relative path is taken from the home directory."""
    if not in_submitted_job() or "://" in path or Path(path).expanduser().is_absolute():
        return path
    return str(Path.home() / "rayward" / path)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a job submission names, or a running local one, or start one here, on the loopback address.

    Workers find the package through PYTHONPATH: in a submitted job relative to the job's working directory (which lies
    elsewhere on every node), else as an absolute path.

    Raises:
        ConfigError: the token of a cluster that is started here cannot be kept.
    """
    import ray

    if ray.is_initialized():
        return
    global _started_here
    in_job = in_submitted_job()
    os.environ.update(WORKER_ENV)
    source_root = SOURCE_ROOT.name if in_job and _inside_working_dir() else str(SOURCE_ROOT)
    _started_here = _join_or_start(
        runtime_env={"env_vars": {**WORKER_ENV, "PYTHONPATH": source_root}},
        logging_level=logging.WARNING,
        # What a user must know is written to the run's metrics file and shown from there; a failure carries its traceback.
        log_to_driver=os.environ.get(SHOW_WORKER_LOGS) == "1",
    )
    _quiet_data_logs()


def _join_or_start(**settings: Any) -> bool:
    # Whether a cluster was started. Plain `ray.init()` does the same and does not say which of the two it did.
    import ray

    # That tokens are used is said in the documentation, and when one is missing.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with _on_loopback(), _own_sigterm():
        if os.environ.get("RAY_ADDRESS") == "local":
            _start(**settings)
            return True
        if in_submitted_job() or "RAY_ADDRESS" in os.environ:
            ray.init(**settings)
            return False
        try:
            ray.init(address="auto", **settings)
        except ConnectionError:
            _start(address="local", **settings)
            return True
    return False


def _start(**settings: Any) -> None:
    import ray

    if os.environ.get(AUTH_MODE, "token").lower() == "token":
        _keep_token()
    ray.init(**settings)


def _keep_token() -> None:
    # Ray would write it for everybody on this machine to read.
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        return
    # RuntimeError: nobody knows where home is.
    except (OSError, RuntimeError) as exc:
        raise ConfigError(
            f"the token that guards the Ray of this machine cannot be kept in ~/.ray/auth_token ({exc})",
            remedy="set RAY_AUTH_TOKEN to a secret, or RAY_AUTH_MODE=disabled to let every user of this machine in",
        ) from exc


@contextmanager
def _on_loopback() -> Iterator[None]:
    # Ray replaces the loopback address by one that the network reaches, of a node that it starts and of a cluster that it looks for, unless
    # it is told that it cannot form clusters. What it starts in here is told so too, by the environment. Other addresses stay as they are.
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    variable = os.environ.get(LOOPBACK_VARIABLE)
    os.environ[LOOPBACK_VARIABLE] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(LOOPBACK_VARIABLE)
        if variable is not None:
            os.environ[LOOPBACK_VARIABLE] = variable


@contextmanager
def _own_sigterm() -> Iterator[None]:
    # Ray puts its own handler over the process's, which prints a C++ trace and ends without waiting for what Serve still answers.
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _inside_working_dir() -> bool:
    return Path.cwd().resolve() in SOURCE_ROOT.parents


def _quiet_data_logs() -> None:
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def gpu_reserved() -> bool | None:
    """Whether Ray reserved a GPU for this task or actor; None outside of Ray and in a driver, for which nothing is reserved."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return bool(context.get_accelerator_ids().get("GPU")) if context.worker.mode == ray.WORKER_MODE else None


def device_environment(gpus: float) -> dict[str, str]:
    """Environment variables of a worker or actor with so many reserved GPUs: with none, it sees none."""
    return {} if gpus > 0 else {"CUDA_VISIBLE_DEVICES": ""}


def actor_options(gpus: float) -> dict[str, Any]:
    """Options of a Ray Data actor that computes on so many GPUs."""
    return {"num_gpus": gpus, "runtime_env": {"env_vars": device_environment(gpus)}}


class Deferred(Generic[T]):
    """What the constructor of an actor makes, or what went wrong, which every call then raises.

    An actor that raises in its constructor is started again and again, and leaves the text of a traceback; from a call, Ray gives
    the error back.

    Args:
        make: called here, once.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._made: list[T] = []
        self._error: Exception | None = None
        try:
            self._made.append(make())
        # Whatever it is, it is raised at the first call.
        except Exception as exc:
            self._error = exc

    def get(self) -> T:
        """What was made.

        Raises:
            Exception: what its making raised; an error of ours is marked.
        """
        if self._error is not None:
            with marking:
                raise self._error
        return self._made[0]


@contextmanager
def ray_errors() -> Iterator[None]:
    """Around what waits for tasks and actors: the user is told what went wrong there, not where it was noticed."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as exc:
        error = carried_by(exc)
        if error is None:
            raise
        raise error from exc
