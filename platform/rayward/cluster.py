"""Connecting to Ray, and what every Ray process of ours needs in its environment."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

SHOW_WORKER_LOGS = "RAYWARD_WORKER_LOGS"
"""Environment variable: 1 shows the output of every Ray worker on the driver's terminal."""

SOURCE_ROOT = Path(__file__).resolve().parents[1]

WORKER_ENV = {
    # A long validation or checkpoint pauses the consumer; Ray Data would abort the run after 30 minutes.
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "-1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_started_here = False


def started_here() -> bool:
    """Whether `connect` started the cluster on this machine (then its resources are all there will ever be)."""
    return _started_here


def in_submitted_job() -> bool:
    """Whether this driver runs in a `ray job submit` working directory, which is deleted afterwards."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


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
    ray.init(
        runtime_env={"env_vars": {**WORKER_ENV, "PYTHONPATH": source_root}},
        logging_level=logging.WARNING,
        # What a user must know is written to the run's metrics file and shown from there; a failure carries its traceback.
        log_to_driver=os.environ.get(SHOW_WORKER_LOGS) == "1",
    )
    _started_here = not in_job and ray._private.worker._global_node.is_head()
    _quiet_data_logs()


def _inside_working_dir() -> bool:
    return Path.cwd().resolve() in SOURCE_ROOT.parents


def _quiet_data_logs() -> None:
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
