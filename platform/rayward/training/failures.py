"""What becomes of a run when a worker fails: a decision by the error alone, and the record that outlives the worker group.

Ray Train starts the group again whatever was raised, up to `training.max_failures` times. An error that no restart can cure is
therefore recorded in the run's directory before it is raised; the restarted group finds the record and ends at once, and the driver
raises the error that was recorded. No Ray in here.
"""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable
from enum import StrEnum

import torch

from rayward import storage
from rayward.errors import RaywardError, TrainingError, WorkerError, carried_by

logger = logging.getLogger(__name__)
FAILURE_FILE = "failure.json"


class FailureDecision(StrEnum):
    """What to do about a failed worker group."""

    RETRY_GROUP = "retry_group"
    """Start it again from the last committed checkpoint: something died or was out of reach, and may be back."""
    RESUME = "resume"
    """End the run; when its surroundings are mended (space, files, rights), the same command continues it."""
    STOP = "stop"
    """End the run; it would fail the same way again until data, settings or code change."""


NETWORK_ERRNOS = frozenset(
    {
        errno.EAGAIN, errno.EINTR, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    }
)  # fmt: skip

STORE_CODES = (
    "NETWORK_CONNECTION", "REQUEST_TIMEOUT", "SLOW_DOWN", "THROTTLING", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE",
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "timed out",
)  # fmt: skip
"""What Arrow's object stores write into an OSError without a number when the store was out of reach."""

NETWORK_TYPES = frozenset({"ConnectionError", "Timeout", "TransportError", "HTTPClientError"})
"""Base classes of requests, httpx and botocore, by name: none of them is loaded here."""


def decide(error: BaseException, *, alone: bool = False) -> FailureDecision:
    """The decision for an error that a worker raised.

    Args:
        alone: the group has one worker, so that no other can have died under it.
    """
    own = carried_by(error)
    if own is not None:
        if isinstance(own.__cause__, OSError):
            return _about_storage(own.__cause__)
        return FailureDecision.RETRY_GROUP if own.retryable else FailureDecision.STOP
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return decide(inner, alone=alone)
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "ray.exceptions.UserCodeException" in names:
        # Our own function of the data stream, which computes and nothing else.
        return FailureDecision.STOP
    if any(name.startswith("ray.") for name in names):
        return FailureDecision.RETRY_GROUP
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError | torch.distributed.DistError):
        return FailureDecision.RETRY_GROUP
    if isinstance(error, ConnectionError | TimeoutError) or NETWORK_TYPES & {name.rpartition(".")[2] for name in names}:
        return FailureDecision.RETRY_GROUP
    if isinstance(error, OSError):
        return _about_storage(error)
    if type(error) is RuntimeError and not alone:
        # Gloo raises nothing more exact in the workers that survive the death of another.
        return FailureDecision.RETRY_GROUP
    return FailureDecision.STOP


def _about_storage(error: OSError) -> FailureDecision:
    unreachable = isinstance(error, ConnectionError | TimeoutError) or error.errno in NETWORK_ERRNOS
    if unreachable or (error.errno is None and any(code in str(error) for code in STORE_CODES)):
        return FailureDecision.RETRY_GROUP
    return FailureDecision.RESUME


def run_recorded(location: str, run: Callable[[], None], *, alone: bool) -> None:
    """Run one worker's part; nothing runs where a failure is on record, and what no restart can cure is put on record.

    Args:
        location: directory or URI of the run.
        alone: the group has one worker.
    """
    if failure_on_record(location) is not None:
        return
    try:
        run()
    # Whatever a library raises is decided about.
    except Exception as exc:
        decision = decide(exc, alone=alone)
        if decision is not FailureDecision.RETRY_GROUP:
            _record(location, _as_ours(exc, decision))
        raise


def failure_on_record(location: str) -> RaywardError | None:
    """The error that ended the run, or None."""
    filesystem, root = storage.resolve(location)
    if not storage.exists(filesystem, f"{root}/{FAILURE_FILE}"):
        return None
    try:
        return RaywardError.from_json(storage.read_text(filesystem, f"{root}/{FAILURE_FILE}"))
    except ValueError:
        return TrainingError(f"{location}/{FAILURE_FILE} cannot be read", remedy="see the logs, then run the same command to continue")


def clear_failure(location: str) -> None:
    """Forget the record: the user starts the run again."""
    filesystem, root = storage.resolve(location)
    if storage.exists(filesystem, f"{root}/{FAILURE_FILE}"):
        filesystem.delete_file(f"{root}/{FAILURE_FILE}")


def _record(location: str, error: RaywardError) -> None:
    filesystem, root = storage.resolve(location)
    path = f"{root}/{FAILURE_FILE}"
    try:
        # The first worker to fail knows why; others fail because of it.
        if not storage.exists(filesystem, path):
            storage.write_text(filesystem, path, error.to_json())
    except OSError as exc:
        logger.error("the failure could not be recorded in %s (%s): %s", path, exc, error)


def _as_ours(exc: Exception, decision: FailureDecision) -> RaywardError:
    own = carried_by(exc)
    if own is not None:
        return own
    name = f"{type(exc).__module__}.{type(exc).__qualname__}"
    mended = {
        FailureDecision.RESUME: "see to the storage (space, files, rights)",
        FailureDecision.STOP: "a restart would not help: see the traceback in failure.json and correct the cause",
    }
    return WorkerError(
        f"{name.removeprefix('builtins.')} on a training worker: {exc}",
        remedy=f"{mended[decision]}; the same command then continues at the last committed checkpoint",
        error_type=name,
        traceback="".join(traceback.format_exception(exc)),
    )
