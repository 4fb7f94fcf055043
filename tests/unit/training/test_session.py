from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.jobs import STEPS, encoder_of, make_engine, make_job, make_prepared, run_session, train_comparisons
from tests.helpers.training import make_shares, steps_in

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.contract.encoder import Encoder
from rayward.contract.golden import GOLDEN_CONVERSATIONS
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import PreparedData
from rayward.data.stream.shares import StepShare
from rayward.errors import CheckpointError, ConfigError, StreamOrderError
from rayward.objectives.table import OBJECTIVES
from rayward.training.checkpoints.store import CheckpointStore
from rayward.training.engines.protocol import STATE_KINDS
from rayward.training.engines.torch import TorchEngine
from rayward.training.failures import FailureDecision, decide
from rayward.training.golden import golden_scores
from rayward.training.session import Job, Session, resume_point


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_prepared(tmp_path_factory.mktemp("prepared"))


def records(job: Job, kind: str) -> list[dict[str, float]]:
    lines = Path(job.location, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def same_state(one: TorchEngine, other: TorchEngine) -> bool:
    return all(torch.equal(one.read_state(p, kind), other.read_state(p, kind)) for p in one.partitions() for kind in STATE_KINDS)


def test_a_run_commits_validates_and_logs(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared, evaluate_every_steps=3)
    run_session(job, prepared, validation=True)
    assert [c.commit.step for c in job.store.committed()] == [6, 4]
    assert [record["step"] for record in records(job, "train")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(job, "validation")] == [3, 6]
    assert [record["step"] for record in records(job, "checkpoint")] == [2, 4, 6]
    latest = job.store.latest()
    assert latest is not None
    assert latest.commit.validation_accuracy == records(job, "validation")[-1]["accuracy"]
    assert latest.commit.trajectory == job.trajectory.model_dump(mode="json")


def test_a_run_that_dies_continues_and_ends_with_the_same_weights(tmp_path: Path, prepared: PreparedData) -> None:
    undisturbed = make_job(tmp_path / "a", prepared)
    expected = run_session(undisturbed, prepared)
    job = make_job(tmp_path / "b", prepared)
    with pytest.raises(StreamOrderError):
        run_session(job, prepared, stop_after=5)
    assert [record["step"] for record in records(job, "train")] == [1, 2, 3, 4, 5]
    found = run_session(job, prepared)
    assert same_state(found, expected)
    # The fifth step was trained twice and is logged once.
    assert [record["step"] for record in records(job, "train")] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records(job, "train")] == [r["loss"] for r in records(undisturbed, "train")]


def test_the_second_epoch_reads_the_same_rows_again_and_is_resumed_in_the_middle(tmp_path: Path, prepared: PreparedData) -> None:
    rows = train_comparisons()[:12]
    seen: list[tuple[int, int]] = []

    def run(name: str, *, die_at: int | None) -> TorchEngine:
        job = replace(make_job(tmp_path / name, prepared), steps_per_epoch=3)
        engine, checkpoint = make_engine(job), job.store.latest()
        done = checkpoint.commit.step if checkpoint else 0

        def open_epoch(epoch: int) -> Iterator[StepShare]:
            for share in make_shares(rows, per_step=4, first_step=max(0, done - 3 * epoch)):
                if 3 * epoch + share.step == die_at:
                    return
                seen.append((epoch, share.step))
                yield share

        Session(engine, job, encoder_of(prepared, job), validation=None).run(open_epoch, checkpoint)
        return engine

    expected = run("whole", die_at=None)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(StreamOrderError):
        run("dies", die_at=5)
    seen.clear()
    assert same_state(run("dies", die_at=None), expected)
    assert seen == [(1, 1), (1, 2)]


def _labelled() -> list[EncodedComparison]:
    generator = np.random.default_rng(0)

    def labels(comparison: EncodedComparison) -> Labels:
        ratings = generator.integers(0, 2, (comparison.num_completions, 2)).astype(np.float32)
        assert comparison.step_ends is not None
        steps = tuple(generator.integers(0, 2, len(ends)).astype(np.float32) for ends in comparison.step_ends)
        return replace(comparison.labels, strength=float(generator.integers(1, 4)), attributes=ratings, step_labels=steps)

    return [replace(comparison, labels=labels(comparison)) for comparison in train_comparisons()]


@pytest.mark.parametrize(
    "objective",
    [{"type": name} for name in OBJECTIVES]
    + [
        {"type": "bradley_terry", "margin": "large", "scale": "strength", "safety_coefficient": 0.5},
        {"type": "bradley_terry", "language_coefficient": 0.5},
        {"type": "outcome", "read": "tokens"},
    ],
    ids=lambda objective: "-".join(str(value) for value in objective.values()),
)
def test_every_objective_continues_to_the_same_weights(tmp_path: Path, prepared: PreparedData, objective: dict[str, object]) -> None:
    def job(name: str) -> Job:
        made = make_job(tmp_path / name, prepared)
        values = made.config.model_dump(mode="json")
        values |= {"objective": {**objective}, "data": {"attributes": ["label", "is_safe"]}}
        config = parse_config(values, Config)
        return replace(
            made,
            config=config,
            contract=made.contract.for_head(
                config.outputs, config.objective.reward_weights(config.outputs), config.objective.reading(None)
            ),
        )

    rows = _labelled()
    expected = run_session(job("a"), prepared, comparisons=rows)
    with pytest.raises(StreamOrderError):
        run_session(job("b"), prepared, stop_after=3, comparisons=rows)
    found = run_session(job("b"), prepared, comparisons=rows)
    assert same_state(found, expected)
    assert records(job("a"), "train")[-1]["loss"] != records(job("a"), "train")[0]["loss"]


def test_the_gap_between_training_and_validation_is_logged_and_warned_about_when_it_opens(
    tmp_path: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "calm", prepared, evaluate_every_steps=3)
    run_session(job, prepared, validation=True)
    train = [record["loss"] for record in records(job, "train")]
    for record, recent in zip(records(job, "validation"), (train[:3], train[3:]), strict=True):
        assert record["train_loss"] == pytest.approx(sum(recent) / 3)
        assert record["gap"] == pytest.approx(record["loss"] - sum(recent) / 3)
    gaps = [record["gap"] for record in records(job, "validation")]
    # The same run under a lower bar: a note at each validation whose gap is a new record above it.
    monkeypatch.setattr("rayward.training.session.GAP_WARNING_NATS", min(gaps) - 1e-3)
    warned = make_job(tmp_path / "warned", prepared, evaluate_every_steps=3)
    run_session(warned, prepared, validation=True)
    notes = [record["message"] for record in records(warned, "note")]
    assert len(notes) == 1 + (gaps[1] > gaps[0])
    assert "begins to over-fit" in notes[0]
    assert "--checkpoint best" in notes[0]


def test_a_line_that_a_killed_writer_left_half_written_is_dropped(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared)
    with pytest.raises(StreamOrderError):
        run_session(job, prepared, stop_after=3)
    path = Path(job.location, "metrics.jsonl")
    path.write_text(path.read_text() + '{"step": 4, "ki')
    run_session(job, prepared)
    assert [record["step"] for record in records(job, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("training", "learning_rate", 1.0, "learning_rate"),
        ("training", "comparisons_per_step", 8, "comparisons_per_step"),
        ("run", "seed", 5, "seed"),
        ("objective", "label_smoothing", 0.1, "objective"),
        ("model", "tokenizer", "another", "model"),
    ],
)
def test_other_settings_under_the_same_name_are_refused(
    tmp_path: Path, prepared: PreparedData, section: str, key: str, value: object, named: str
) -> None:
    job = make_job(tmp_path, prepared)
    with pytest.raises(StreamOrderError):
        run_session(job, prepared, stop_after=3)
    values = job.config.model_dump(mode="json")
    values[section][key] = value
    other = Job(parse_config(values, Config), job.contract, job.location, STEPS, STEPS, job.data_fingerprint)
    with pytest.raises(ConfigError, match=f"{named}: ") as caught:
        resume_point(other)
    assert "run.name" in caught.value.remedy


@pytest.mark.parametrize(("key", "value"), [("tokens_per_microbatch", 1024), ("log_every_steps", 3), ("max_failures", 0)])
def test_settings_that_do_not_decide_the_trajectory_may_change(tmp_path: Path, prepared: PreparedData, key: str, value: int) -> None:
    job = make_job(tmp_path, prepared)
    with pytest.raises(StreamOrderError):
        run_session(job, prepared, stop_after=3)
    changed: dict[str, Any] = {key: value}
    found = resume_point(make_job(tmp_path, prepared, **changed))
    assert found is not None
    assert found.commit.step == 2


def test_one_failed_write_is_survived_and_two_are_not(
    tmp_path: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls, failing = CheckpointStore.save, 0, {1}

    def save(self: CheckpointStore, *args: object) -> OSError | None:
        nonlocal calls
        calls += 1
        return OSError(errno.ENOSPC, "disk full") if calls in failing else real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", save)
    job = make_job(tmp_path / "one", prepared)
    with caplog.at_level(logging.ERROR):
        run_session(job, prepared)
    assert "checkpoint at step 2 was not written ([Errno 28] disk full)" in caplog.text
    assert steps_in(job.store.root) == [4, 6]
    calls, failing = 0, {2, 3}
    job = make_job(tmp_path / "two", prepared)
    with pytest.raises(CheckpointError, match=r"checkpoint at step 6 could not be written: \[Errno 28\] disk full") as caught:
        run_session(job, prepared)
    assert steps_in(job.store.root) == [2]
    assert decide(caught.value) is FailureDecision.RESUME, "the group would train two checkpoints' steps again for nothing"


def test_golden_scores_are_those_of_the_conversations_alone(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared)
    engine, encoder = make_engine(job), encoder_of(prepared, job)
    golden = golden_scores(engine, encoder)
    fitting = [
        (prompt, completion) for prompt, completion in GOLDEN_CONVERSATIONS if len(encoder.render(prompt, completion).encode()) < 200
    ]
    assert len(golden) >= len(fitting) > 3
    model = engine.reward_model.model
    model.set_attn_implementation("sdpa")
    for score in golden:
        assert encoder.encode(score.prompt, score.completion) == list(score.token_ids)
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([score.token_ids])).logits[0, 0].item()
        assert score.reward[0] == pytest.approx(plain, abs=1e-5)


def test_a_run_of_very_short_conversations_has_golden_scores_too(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared)
    encoder = Encoder(job.contract.model_copy(update={"max_tokens": 24}), load_tokenizer(f"{prepared.directory}/tokenizer"))
    golden = golden_scores(make_engine(job), encoder)
    assert len(golden) >= 2
    assert len({score.reward for score in golden}) == len(golden)
    assert all(len(score.token_ids) <= 24 for score in golden)
