"""What a run tells: the metrics file, locally line by line and remotely at checkpoints, and the lines on the driver's terminal."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from rayward import storage
from rayward.training.tracking import MetricsLog, follow

METRICS = {"loss": 0.5, "accuracy": 0.75, "margin": 1.5, "gradient_norm": 2.0, "tokens_per_s": 1000.0, "comparisons_per_s": 12.5}


@pytest.fixture(params=["path", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/run" if request.param == "path" else f"memory://{uuid.uuid4().hex}/run"


def lines_of(location: str) -> list[dict[str, Any]]:
    filesystem, path = storage.resolve(storage.join(location, "metrics.jsonl"))
    return [json.loads(line) for line in storage.read_text(filesystem, path).splitlines()]


def test_the_file_holds_every_line_once_whatever_is_resumed(location: str) -> None:
    log = MetricsLog(location, first_step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0 / step})
    log.note(3, "half way")
    log.close()
    assert [(line["step"], line["kind"]) for line in lines_of(location)] == [(1, "train"), (2, "train"), (3, "train"), (3, "note")]
    again = MetricsLog(location, first_step=2, tensorboard=False)  # the last checkpoint was at step 2
    again.write(3, "train", {"loss": 7.0})
    again.close()
    assert [(line["step"], line.get("loss")) for line in lines_of(location)] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_a_local_line_is_on_disk_at_once_and_a_remote_one_with_the_checkpoint(location: str) -> None:
    log = MetricsLog(location, first_step=0, tensorboard=False)
    log.write(1, "train", {"loss": 1.0})
    assert len(lines_of(location)) == (0 if "://" in location else 1)
    log.flush()
    assert len(lines_of(location)) == 1


def test_lines_wait_while_they_cannot_be_written(location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(location, first_step=0, tensorboard=False)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open" if "://" not in location else "rayward.storage.write_text", full)
        log.write(1, "train", {"loss": 1.0})
        log.flush()
    assert "cannot be written" in caplog.text
    assert lines_of(location) == []
    log.write(2, "train", {"loss": 0.5})
    log.flush()
    assert [line["step"] for line in lines_of(location)] == [1, 2]


def test_events_for_tensorboard_are_written_beside_a_local_log(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), first_step=0, tensorboard=True)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


class Looks:
    """The event that `follow` waits for between two looks; before each look it lets the run write."""

    def __init__(self, *writes: Any) -> None:
        self._writes = list(writes)

    def wait(self, _timeout_s: float) -> bool:
        if self._writes:
            self._writes.pop(0)()
        return not self._writes


def shown(location: str, total_steps: int, *writes: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    event: Any = Looks(*writes)
    follow(location, total_steps, event)
    return capsys.readouterr().out.splitlines()


def test_the_driver_shows_about_twenty_lines_and_every_note(location: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(location, first_step=0, tensorboard=False)

    def first() -> None:
        log.note(0, "warning: one epoch is enough")
        for step in range(1, 51):
            log.write(step, "train", METRICS)
        log.flush()

    def second() -> None:
        for step in range(51, 101):
            log.write(step, "train", METRICS)
        log.write(100, "validation", {"accuracy": 0.875, "loss": 0.25})
        log.flush()

    lines = shown(location, 100, first, second, capsys=capsys)
    assert lines[0] == "warning: one epoch is enough"
    assert lines[1].startswith("step 5/100  loss 0.5000  accuracy 0.750  margin 1.500  gradient 2.00  1000 tokens/s  12.5 comparisons/s")
    assert [line.split()[1] for line in lines[1:-1]] == [f"{step}/100" for step in range(5, 101, 5)]
    assert lines[-1] == "validation at step 100: accuracy 0.875  loss 0.2500"


def test_half_a_line_is_shown_when_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    note = json.dumps({"step": 1, "kind": "note", "message": "checkpoint at step 1"})

    def half() -> None:
        path.write_text(note[:20])

    def whole() -> None:
        path.write_text(note + "\n")

    assert shown(str(tmp_path), 1, half, whole, capsys=capsys) == ["checkpoint at step 1"]


def test_storage_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[str | OSError] = [
        FileNotFoundError("the run has written nothing"),
        OSError("When reading: AWS Error SLOW_DOWN"),
        json.dumps({"step": 1, "kind": "note", "message": "after all"}),
    ]

    def read(_filesystem: object, _path: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(storage, "read_text", read)
    nothing: list[Any] = [lambda: None] * 3
    assert shown(str(tmp_path), 1, *nothing, capsys=capsys) == ["after all"]


def test_a_restarted_worker_is_followed_from_its_first_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"

    def write(*messages: str) -> None:
        path.write_text("".join(json.dumps({"step": 1, "kind": "note", "message": message}) + "\n" for message in messages))

    looks = (lambda: write("one", "two", "three"), lambda: write("one"), lambda: write("one", "again"))
    assert shown(str(tmp_path), 1, *looks, capsys=capsys) == ["one", "two", "three", "one", "again"]


def test_following_ends_when_it_is_told_to(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    follow(str(tmp_path), 1, stop)
