"""What a job says about a cluster that is too small, or taken; Ray's answers are given here."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rayward.config.training import TrainingConfig
from rayward.errors import ConfigError
from rayward.training import trainer


def check(training: TrainingConfig) -> None:
    trainer.check_resources(training, sleep=lambda _: None)


def cluster(monkeypatch: pytest.MonkeyPatch, total: dict[str, float], *free: dict[str, float], started_here: bool) -> None:
    """A cluster whose free resources are asked for again and again."""
    answers = list(free)

    def available() -> dict[str, float]:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    monkeypatch.setattr("ray.available_resources", available)
    monkeypatch.setattr(trainer, "started_here", lambda: started_here)


def settings(**changed: Any) -> TrainingConfig:
    return TrainingConfig(num_workers=2, cpus_per_worker=1.0, **changed)


def test_a_machine_that_is_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 2.0}, {"CPU": 2.0}, started_here=True)
    with pytest.raises(ConfigError, match="less than one of the cluster's 2 CPUs"):
        check(settings())


def test_a_cluster_that_is_too_small_may_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster(monkeypatch, {"CPU": 2.0}, {"CPU": 2.0}, started_here=False)
    with caplog.at_level(logging.WARNING):
        check(settings())
    assert "until the cluster grows" in caplog.text


@pytest.mark.parametrize(
    ("free", "gpus", "said"),
    [
        ({"CPU": 2.0}, 0.0, "3 CPU are needed (workers and data) and 2 are free"),
        ({}, 0.0, "3 CPU are needed (workers and data) and 0 are free"),
        ({"CPU": 3.0, "GPU": 1.0}, 1.0, "2 GPU are needed (workers and data) and 1 are free"),
    ],
)
def test_what_others_hold_is_waited_for_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: dict[str, float], gpus: float, said: str
) -> None:
    cluster(monkeypatch, {"CPU": 4.0, "GPU": 2.0}, free, started_here=True)
    with caplog.at_level(logging.WARNING):
        check(settings(gpus_per_worker=gpus))
    assert said in caplog.text
    assert "rayward models retire" in caplog.text


def test_enough_is_nothing_to_speak_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster(monkeypatch, {"CPU": 4.0}, {"CPU": 3.0}, started_here=True)
    check(settings())
    assert caplog.text == ""


def test_what_has_just_ended_is_not_complained_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster(monkeypatch, {"CPU": 4.0}, {"CPU": 0.0}, {"CPU": 4.0}, started_here=True)
    check(settings())
    assert caplog.text == ""
