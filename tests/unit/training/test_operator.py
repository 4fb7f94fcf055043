"""A start that was killed while DeepSpeed compiled must not hold up the next one."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayward.errors import ConfigError, TrainingError
from rayward.training.engines.operator import (
    OPERATOR,
    TIMEOUT_S,
    TORCH_LOCK_FILE,
    TURN_FILE,
    Waiting,
    build_before_workers,
    build_operator,
    is_built,
    operator_directory,
)


class Clock:
    """Time passes only in sleep; `then` happens at the first look after that many seconds."""

    def __init__(self, after_s: float = float("inf"), then: Callable[[], None] | None = None) -> None:
        self.now, self._after_s, self._then = 0.0, after_s, then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self._then is not None and self.now >= self._after_s:
            self._then()
            self._then = None

    def waiting(self, timeout_s: float = TIMEOUT_S) -> Waiting:
        return Waiting(timeout_s, clock=lambda: self.now, sleep=self.sleep)


def take(path: Path) -> int:
    """As torch takes its lock."""
    return os.open(path, os.O_CREAT | os.O_EXCL)


def test_a_lock_of_a_killed_process_is_removed_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / TORCH_LOCK_FILE
    program = f"import os; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print('taken', flush=True); os.read(0, 1)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    built: list[str] = []

    def kill() -> None:
        assert built == []
        process.send_signal(signal.SIGKILL)
        process.wait()

    clock = Clock(20.0, kill)
    with caplog.at_level(logging.WARNING):
        build_operator(lambda: built.append("built"), tmp_path, clock.waiting())
    process.stdin.close()
    process.stdout.close()
    assert built == ["built"]
    assert not lock.exists()
    assert 20.0 <= clock.now <= 22.0, "it waits for the living and not for the dead"
    assert str(lock) in caplog.text
    assert "was killed" in caplog.text


def test_a_planted_lock_delays_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.close(take(tmp_path / TORCH_LOCK_FILE))
    clock, built = Clock(), list[str]()
    build_operator(lambda: built.append("built"), tmp_path, clock.waiting())
    assert built == ["built"]
    assert clock.now < 2.0
    assert "waiting" not in caplog.text


def test_a_living_process_is_waited_for_and_its_lock_is_left_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / TORCH_LOCK_FILE
    held = take(lock)

    def release() -> None:
        os.close(held)
        lock.unlink()

    clock, built = Clock(55.0, release), list[str]()
    build_operator(lambda: built.append("built"), tmp_path, clock.waiting())
    assert built == ["built"]
    assert clock.now == pytest.approx(55.0, abs=1.0)
    assert caplog.text.count("waiting for another process") == 1
    assert "was killed" not in caplog.text


def test_the_wait_for_a_living_process_ends_with_a_typed_error(tmp_path: Path) -> None:
    lock = tmp_path / TORCH_LOCK_FILE
    held, clock = take(lock), Clock()
    try:
        with pytest.raises(TrainingError, match=f"{lock} for 90 s") as caught:
            build_operator(lambda: pytest.fail("built"), tmp_path, clock.waiting(90.0))
    finally:
        os.close(held)
    assert lock.exists()
    assert str(lock.parent) in str(caught.value)
    assert not caught.value.retryable


def test_our_processes_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def build_while_another_waits() -> None:
        with pytest.raises(TrainingError, match=TURN_FILE):
            build_operator(lambda: order.append("second"), tmp_path, Clock().waiting(5.0))
        order.append("first")

    build_operator(build_while_another_waits, tmp_path, Clock().waiting())
    build_operator(lambda: order.append("third"), tmp_path, Clock().waiting())
    assert order == ["first", "third"]


def test_the_lock_is_the_one_that_torch_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Private parts of torch: when one of these lines fails, look at what the new version locks, and where.
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert operator_directory() == tmp_path / ShareMemCommBuilder.NAME
    assert OPERATOR == ShareMemCommBuilder.NAME
    assert "FileBaton(os.path.join(build_directory, 'lock'))" in inspect.getsource(cpp_extension)
    baton = FileBaton(str(operator_directory() / TORCH_LOCK_FILE))
    assert baton.try_acquire()
    with pytest.raises(TrainingError):
        build_operator(lambda: None, operator_directory(), Clock().waiting(5.0))
    baton.release()
    build_operator(lambda: None, operator_directory(), Clock().waiting(5.0))


def test_the_driver_starts_no_compiler_where_the_operator_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: pytest.fail("compiled again"))
    (tmp_path / f"{OPERATOR}.so").write_bytes(b"")
    os.close(take(tmp_path / TORCH_LOCK_FILE))
    assert not is_built(tmp_path)
    build_before_workers({}, directory=tmp_path, waiting=Clock().waiting())
    assert is_built(tmp_path)


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("Traceback …\nrayward-error: " + ConfigError("the reason", remedy="r").to_json() + "\n", ConfigError),
        ("g++: not found: the reason", TrainingError),
    ],
)
def test_what_fails_in_the_building_process_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, kind: type[Exception]
) -> None:
    def run(command: list[str], *, env: dict[str, str], **_options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "rayward.training.engines.operator"]
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(kind, match="the reason"):
        build_before_workers({"CUDA_VISIBLE_DEVICES": ""}, directory=tmp_path, waiting=Clock().waiting())
