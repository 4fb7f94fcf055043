from __future__ import annotations

import errno
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, UserCodeException
from safetensors import SafetensorError

from rayward.errors import (
    CheckpointDamagedError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelLoadError,
    NonFiniteError,
    RaywardError,
    StreamOrderError,
    TrainingError,
    WorkerError,
)
from rayward.training.failures import FAILURE_FILE, FailureDecision, clear_failure, decide, failure_on_record, run_recorded

RETRY, RESUME, STOP = FailureDecision.RETRY_GROUP, FailureDecision.RESUME, FailureDecision.STOP
NON_FINITE = NonFiniteError("NaN", remedy="r", step=12, comparison_ids=("a", "b"))


def task_error(cause: Exception, text: str = "Traceback …") -> Exception:
    error: Exception = RayTaskError("f", text, cause, proctitle="p", pid=1, ip="0.0.0.0")
    return error


def named(base: type[Exception], name: str, module: str) -> Exception:
    """An error of a library that is not installed here."""
    return type("ReadTimeout", (type(name, (base,), {"__module__": module}),), {"__module__": module})("x")


def caused(error: RaywardError, cause: Exception) -> RaywardError:
    error.__cause__ = cause
    return error


TABLE: list[tuple[BaseException, FailureDecision]] = [
    (StreamOrderError("p", remedy="r"), RETRY),
    (CheckpointDamagedError("p", remedy="r"), RETRY),
    (CheckpointError("has matrix with shape (7, 5); the model needs (5, 7)", remedy="r"), STOP),
    (NON_FINITE, STOP),
    (ConfigError("p", remedy="r"), STOP),
    (ModelLoadError("p", remedy="r"), STOP),
    (caused(DataError("a shard cannot be read", remedy="r"), ConnectionResetError(errno.ECONNRESET, "reset")), RETRY),
    (caused(DataError("a shard cannot be read", remedy="r"), FileNotFoundError(errno.ENOENT, "gone")), RESUME),
    (caused(CheckpointError("not written", remedy="r"), OSError(errno.ENOSPC, "rank 1: No space left on device")), RESUME),
    (caused(CheckpointError("not written", remedy="r"), OSError(errno.ETIMEDOUT, "rank 0: timed out")), RETRY),
    (task_error(StreamOrderError("p", remedy="r")), RETRY),
    (task_error(DataError("p", remedy="r")), STOP),
    (task_error(ValueError("x")), STOP),
    (task_error(ConnectionError("x")), RETRY),
    (task_error(UserCodeException("UDF failed"), "KeyError: 'row'"), STOP),
    (ActorDiedError(), RETRY),
    (ObjectLostError("ab", None, ""), RETRY),
    (OutOfMemoryError("killed by the memory monitor"), RETRY),
    (MemoryError(), RETRY),
    (torch.OutOfMemoryError("CUDA out of memory"), RETRY),
    (torch.distributed.DistBackendError("NCCL communicator was aborted"), RETRY),
    (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), RETRY),
    (ConnectionResetError(errno.ECONNRESET, "reset by peer"), RETRY),
    (TimeoutError(errno.ETIMEDOUT, "timed out"), RETRY),
    (OSError(errno.EHOSTUNREACH, "no route to host"), RETRY),
    (OSError(errno.ESTALE, "stale file handle"), RETRY),
    (OSError("When reading information for key: AWS Error NETWORK_CONNECTION during HeadObject operation"), RETRY),
    (named(OSError, "Timeout", "requests.exceptions"), RETRY),
    (named(Exception, "TransportError", "httpx"), RETRY),
    (OSError(errno.ENOSPC, "No space left on device"), RESUME),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), RESUME),
    (PermissionError(errno.EACCES, "denied"), RESUME),
    (FileNotFoundError(errno.ENOENT, "gone"), RESUME),
    (OSError("Couldn't deserialize thrift: invalid parquet"), RESUME),
    (SafetensorError("header too large"), STOP),
    (NotImplementedError("no kernel"), STOP),
    (ValueError("bad shape"), STOP),
    (TypeError("unexpected keyword"), STOP),
    (IndexError("token id"), STOP),
    (RecursionError(), STOP),
    (ZeroDivisionError(), STOP),
]


@pytest.mark.parametrize(("error", "expected"), TABLE, ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None)
@pytest.mark.parametrize("alone", [False, True])
def test_what_a_restart_can_cure_is_retried_and_nothing_else(error: BaseException, expected: FailureDecision, alone: bool) -> None:
    assert decide(error, alone=alone) is expected


def test_a_plain_runtime_error_may_come_from_a_dead_neighbour_where_there_is_one() -> None:
    error = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:59566")
    assert decide(error) is RETRY
    assert decide(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), alone=True) is STOP


def raising(error: Exception, calls: list[str]) -> NoReturn:
    calls.append("run")
    raise error


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("error", [ValueError("cannot reshape"), NotImplementedError("ALiBi"), SafetensorError("truncated"), NON_FINITE])
def test_what_a_worker_raises_is_recorded_with_its_type_and_the_next_group_ends_at_once(
    tmp_path: Path, scheme: str, error: Exception
) -> None:
    location, calls = f"{scheme}{tmp_path}", list[str]()
    with pytest.raises(type(error)):
        run_recorded(location, lambda: raising(error, calls), alone=False)
    for _ in range(3):
        run_recorded(location, lambda: raising(error, calls), alone=False)
    assert calls == ["run"]
    found = failure_on_record(location)
    assert found is not None
    assert str(error) in str(found)
    if isinstance(error, RaywardError):
        assert (type(found), vars(found)) == (type(error), vars(error))
    else:
        assert isinstance(found, WorkerError)
        assert found.error_type.endswith(type(error).__name__)
        assert "in raising" in found.traceback
        assert "continues at the last committed checkpoint" in found.remedy
    clear_failure(location)
    assert failure_on_record(location) is None
    run_recorded(location, lambda: calls.append("again"), alone=False)
    assert calls == ["run", "again"]


def test_a_retried_error_leaves_no_record(tmp_path: Path) -> None:
    for error in (ConnectionError("reset"), StreamOrderError("p", remedy="r"), RuntimeError("Connection closed by peer")):
        calls: list[str] = []
        for _ in range(2):
            with pytest.raises(type(error)):
                run_recorded(str(tmp_path), lambda error=error, calls=calls: raising(error, calls), alone=False)  # type: ignore[misc]
        assert calls == ["run", "run"]
    assert list(tmp_path.iterdir()) == []


def test_the_first_worker_to_fail_is_the_one_on_record(tmp_path: Path) -> None:
    def fail_after_another() -> None:
        with pytest.raises(ValueError, match="the cause"):
            run_recorded(str(tmp_path), lambda: raising(ValueError("the cause"), []), alone=False)
        raise TypeError("a consequence")

    with pytest.raises(TypeError):
        run_recorded(str(tmp_path), fail_after_another, alone=False)
    assert "the cause" in str(failure_on_record(str(tmp_path)))


def test_a_full_disk_does_not_hide_the_error_and_says_how_to_go_on(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="No space left"):
        run_recorded(str(blocked / "run"), lambda: raising(full, []), alone=True)
    with pytest.raises(OSError, match="No space left"):
        run_recorded(str(tmp_path), lambda: raising(full, []), alone=True)
    assert "space" in str(failure_on_record(str(tmp_path)))


def test_a_damaged_record_still_ends_the_group(tmp_path: Path) -> None:
    (tmp_path / FAILURE_FILE).write_text('{"types": ["Train')
    calls: list[str] = []
    run_recorded(str(tmp_path), lambda: calls.append("run"), alone=True)
    assert calls == []
    assert isinstance(failure_on_record(str(tmp_path)), TrainingError)
