"""Connecting to Ray, and what every Ray process of ours needs in its environment."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from rayward.errors import carried_by, marking

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
    """Join the cluster that RAY_ADDRESS or a job submission names, or a running local one, or start one here.

    Workers find the package through PYTHONPATH: in a submitted job relative to the job's working directory (which lies
    elsewhere on every node), else as an absolute path.
    """
    import ray

    if ray.is_initialized():
        return
    global _started_here
    in_job = in_submitted_job()
    if not in_job and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
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

    if in_submitted_job() or "RAY_ADDRESS" in os.environ:
        ray.init(**settings)
        return os.environ.get("RAY_ADDRESS") == "local"
    try:
        ray.init(address="auto", **settings)
    except ConnectionError:
        ray.init(address="local", **settings)
        return True
    return False


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
