"""What happens around the loop on every worker: resume, metrics, validation, checkpoints, golden scores. No Ray in here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import torch

from rayward import storage
from rayward.config import Config
from rayward.contract import Contract, Encoder, GoldenScore
from rayward.data.packing import EncodedComparison, Labels, pack
from rayward.data.shares import StepShare
from rayward.errors import CheckpointError, ConfigError, ContractError
from rayward.golden import GOLDEN_CONVERSATIONS
from rayward.objectives import Objective
from rayward.training.checkpoint import CheckpointStore, CommitDraft, CommittedCheckpoint
from rayward.training.engine import Engine
from rayward.training.loop import Schedule, run_steps, validate

logger = logging.getLogger(__name__)

GAP_WARNING_NATS = 0.1
"""Validation loss above the training loss since the last validation by more than this, and by more than then: the gap has opened."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver resolved, for the workers.

    Attributes:
        location: directory or URI of the run.
        total_steps, steps_per_epoch: optimizer steps.
        data_fingerprint: of the prepared data.
    """

    config: Config
    contract: Contract
    location: str
    total_steps: int
    steps_per_epoch: int
    data_fingerprint: str

    @property
    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the trajectory; workers, budgets and logging are not among them."""
        training = self.config.training.model_dump(
            mode="json",
            include={
                "comparisons_per_step", "learning_rate", "warmup_fraction", "min_lr_fraction", "weight_decay",
                "beta1", "beta2", "epsilon", "clip_norm",
            },
        )  # fmt: skip
        return {
            "seed": self.config.run.seed,
            "data": self.data_fingerprint,
            "contract": self.contract.fingerprint(),
            "model": self.config.model.model_dump(mode="json"),
            "objective": self.config.objective.model_dump(mode="json"),
            "total_steps": self.total_steps,
            **training,
        }

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(storage.join(self.location, "checkpoints"))


def resume_point(job: Job) -> CommittedCheckpoint | None:
    """The checkpoint to continue from, None for a fresh start.

    Raises:
        ConfigError: the run of this name was started with settings that lead to another trajectory.
    """
    checkpoint = job.store.latest()
    if checkpoint is None:
        return None
    theirs, ours = checkpoint.commit.trajectory, json.loads(json.dumps(job.trajectory))
    changed = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if changed:
        listing = "; ".join(f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}" for key in changed)
        raise ConfigError(
            f"run {job.config.run.name!r} has checkpoints of other settings ({listing}); a run has one trajectory",
            remedy="choose another run.name, restore the settings, or delete the run's directory",
        )
    return checkpoint


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run, written by rank 0.

    Lines of steps that will be trained again after a resume are dropped, so the file tells one trajectory. Locally a line is on
    disk when `write` returns; on remote storage the file is written when a checkpoint is. A full disk never stops training:
    lines wait until they can be written.
    """

    def __init__(self, location: str, *, first_step: int, tensorboard: bool) -> None:
        self._filesystem, root = storage.resolve(location)
        self._path = f"{root}/metrics.jsonl"
        self._local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._filesystem.create_dir(root)
        self._lines = self._kept(first_step)  # written as a whole: all of them remotely, those still waiting locally
        self._rewrite()
        self._events = None
        if tensorboard and self._local:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(f"{root}/tensorboard", purge_step=first_step)

    def _kept(self, first_step: int) -> list[str]:
        if not storage.exists(self._filesystem, self._path):
            return []
        kept = []
        for line in storage.read_text(self._filesystem, self._path).splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line that a killed writer left half written
        return kept

    def _rewrite(self) -> None:
        storage.write_text(self._filesystem, self._path, "".join(line + "\n" for line in self._lines))
        if self._local:
            self._lines.clear()

    def note(self, step: int, message: str) -> None:
        """A line for people, shown by the driver."""
        self._append({"step": step, "kind": "note", "message": message})

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        self._append({"step": step, "kind": kind, **metrics})
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        if not self._local:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in self._lines))
            self._lines.clear()
        except OSError as exc:
            logger.warning("%s cannot be written (%s); %d lines wait", self._path, exc, len(self._lines))

    def flush(self) -> None:
        """Bring remote storage up to date."""
        if self._local:
            return
        try:
            self._rewrite()
        except OSError as exc:
            logger.warning("%s cannot be written (%s); the next checkpoint tries again", self._path, exc)

    def close(self) -> None:
        self.flush()
        if self._events is not None:
            self._events.close()


def golden_scores(engine: Engine, encoder: Encoder) -> tuple[GoldenScore, ...]:
    """Rewards of the fixed texts in the training forward; texts that the contract cannot hold are left out."""
    scores = []
    for prompt, completion in GOLDEN_CONVERSATIONS:
        try:
            ids = encoder.encode(prompt, completion)
        except ContractError:
            continue
        tokens = torch.tensor(ids, dtype=torch.int32).numpy()
        comparison = EncodedComparison("golden", tokens[:-1], (tokens[-1:],), Labels())
        with torch.no_grad():
            rewards = engine.forward(pack([comparison], layout=engine.reward_model.layout, pad_token_id=encoder.contract.pad_token_id))
        scores.append(GoldenScore(prompt=prompt, completion=completion, token_ids=tuple(ids), reward=tuple(rewards[0].tolist())))
    return tuple(scores)


class Session:
    """One worker's part of a run.

    Args:
        validation: opens the validation shares (called once per validation), or None without validation data.
        report: called by all ranks with the metrics of a validation or checkpoint (Ray Train's report), or None.
    """

    def __init__(
        self,
        engine: Engine,
        job: Job,
        encoder: Encoder,
        *,
        validation: Callable[[], Iterable[StepShare]] | None,
        report: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.engine, self.job, self.encoder = engine, job, encoder
        self._validation, self._report = validation, report
        self._objective = Objective(job.config.objective, job.config.data.attributes)
        self._log: MetricsLog | None = None
        self._failed_writes = 0
        self._recent_losses: list[float] = []
        self._widest_gap = GAP_WARNING_NATS

    def run(self, open_epoch: Callable[[int], Iterator[StepShare]], checkpoint: CommittedCheckpoint | None) -> None:
        """Train from the checkpoint (or from the start) to the last step, committing on the way.

        Args:
            open_epoch: shares of an epoch, from its first step that is not done yet.

        Raises:
            NonFiniteError, StreamOrderError, CheckpointError: see there.
        """
        job, first_step = self.job, 0
        if checkpoint is not None:
            job.store.load(self.engine, checkpoint)
            first_step = checkpoint.commit.step
        if self.engine.rank == 0:
            self._log = MetricsLog(job.location, first_step=first_step, tensorboard=job.config.tracking.tensorboard)
            if first_step:
                self._log.note(first_step, f"continuing at step {first_step} with {self.engine.world_size} workers")
        try:
            self._train(open_epoch, first_step)
        finally:
            if self._log is not None:
                self._log.close()

    def _train(self, open_epoch: Callable[[int], Iterator[StepShare]], first_step: int) -> None:
        job, step = self.job, first_step
        schedule = schedule_of(job)
        while step < job.total_steps:
            epoch = step // job.steps_per_epoch
            stop = min((epoch + 1) * job.steps_per_epoch, job.total_steps)
            run_steps(
                self.engine,
                open_epoch(epoch),
                objective=self._objective,
                schedule=schedule,
                first_step=step,
                stop_step=stop,
                on_step=self._after_step,
                epoch_start=epoch * job.steps_per_epoch,
            )
            step = stop

    def _after_step(self, step: int, metrics: dict[str, float]) -> None:
        config, is_last = self.job.config, step == self.job.total_steps
        if self._validation is not None:
            self._recent_losses.append(metrics["loss"])
        if self._log is not None and (step % config.training.log_every_steps == 0 or is_last):
            self._log.write(step, "train", metrics)
        every = config.training.evaluate_every_steps
        validation = self._validate(step) if is_last or (every is not None and step % every == 0) else {}
        if is_last or step % config.checkpoint.every_steps == 0:
            self._checkpoint(step, metrics, validation, is_last=is_last)

    def _validate(self, step: int) -> dict[str, float]:
        if self._validation is None:
            return {}
        metrics = validate(self.engine, self._validation(), self._objective)
        train_loss = sum(self._recent_losses) / len(self._recent_losses)
        self._recent_losses.clear()
        metrics |= {"train_loss": train_loss, "gap": metrics["loss"] - train_loss}
        if self._log is not None:
            self._log.write(step, "validation", metrics)
            if metrics["gap"] > self._widest_gap:
                self._widest_gap = metrics["gap"]
                self._log.note(step, over_fitting(step, metrics["loss"], train_loss))
        return metrics

    def _checkpoint(self, step: int, metrics: dict[str, float], validation: dict[str, float], *, is_last: bool) -> None:
        started = time.perf_counter()
        draft = CommitDraft(
            step=step,
            total_steps=self.job.total_steps,
            trajectory=self.job.trajectory,
            keep_last=self.job.config.checkpoint.keep_last,
            dtype=str(next(self.engine.reward_model.parameters()).dtype).removeprefix("torch."),
            golden=golden_scores(self.engine, self.encoder),
            validation_accuracy=validation.get("accuracy"),
            metrics=metrics,
        )
        problem = self.job.store.save(self.engine, draft)
        if problem is None:
            self._failed_writes = 0
            if self._log is not None:
                self._log.write(step, "checkpoint", {"checkpoint_s": time.perf_counter() - started})
                self._log.flush()
        else:
            self._failed_writes += 1
            message = f"checkpoint at step {step} was not written ({problem}); the earlier ones are untouched"
            logger.error(message)
            if self._log is not None:
                self._log.note(step, message)
            if is_last or self._failed_writes > 1:
                raise CheckpointError(
                    f"checkpoint at step {step} could not be written: {problem}",
                    remedy="free space or fix the storage; the run continues from its last committed checkpoint",
                )
        if self._report is not None:
            self._report({"step": step, **metrics, **{f"validation_{key}": value for key, value in validation.items()}})


def over_fitting(step: int, validation_loss: float, train_loss: float) -> str:
    """The warning that the gap between training and validation loss has opened."""
    return (
        f"warning: at step {step} the validation loss {validation_loss:.4f} is {validation_loss - train_loss:.4f} above the training loss "
        f"since the last validation, {train_loss:.4f}: the model begins to over-fit; take the checkpoint before "
        "(rayward export --checkpoint best), or train less (training.num_epochs, training.max_steps)"
    )


def schedule_of(job: Job) -> Schedule:
    """The learning-rate schedule of a run."""
    training = job.config.training
    return Schedule(
        learning_rate=training.learning_rate,
        total_steps=job.total_steps,
        warmup_fraction=training.warmup_fraction,
        min_lr_fraction=training.min_lr_fraction,
    )
