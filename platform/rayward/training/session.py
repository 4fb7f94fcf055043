"""What happens around the loop on every worker: resume, metrics, validation, checkpoints, golden scores. No Ray in here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from rayward import storage
from rayward.config.model import ModelConfig
from rayward.config.run import Config, ObjectiveConfig
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.data.stream.shares import StepShare
from rayward.errors import CheckpointError, ConfigError
from rayward.objectives.table import Objective
from rayward.schema import Frozen, identity
from rayward.training.checkpoints.format import CommittedCheckpoint
from rayward.training.checkpoints.store import CheckpointStore, CommitDraft
from rayward.training.engines.protocol import Engine
from rayward.training.golden import check_modes, golden_scores
from rayward.training.loop import Schedule, run_steps, validate
from rayward.training.tracking import GAP_WARNING_NATS, MetricsLog, over_fitting

logger = logging.getLogger(__name__)


class Trajectory(Frozen):
    """The settings that decide the trajectory; workers, budgets and logging are not among them. A setting that is added here later needs a
    default that means what runs did before.

    Attributes:
        data, contract: fingerprints of the prepared data and of the rules of text.
    """

    seed: int
    data: str
    contract: str
    model: ModelConfig
    objective: ObjectiveConfig
    total_steps: int
    comparisons_per_step: int
    learning_rate: float
    warmup_fraction: float
    min_lr_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    router_coefficient: float = 0.0


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
    def trajectory(self) -> Trajectory:
        """What a checkpoint of this run must have been made with."""
        training = self.config.training
        return Trajectory(
            seed=self.config.run.seed,
            data=self.data_fingerprint,
            contract=self.contract.fingerprint(),
            model=self.config.model,
            objective=self.config.objective,
            total_steps=self.total_steps,
            comparisons_per_step=training.comparisons_per_step,
            learning_rate=training.learning_rate,
            warmup_fraction=training.warmup_fraction,
            min_lr_fraction=training.min_lr_fraction,
            weight_decay=training.weight_decay,
            beta1=training.beta1,
            beta2=training.beta2,
            epsilon=training.epsilon,
            clip_norm=training.clip_norm,
            router_coefficient=training.router_coefficient,
        )

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
    stored, wanted = _stored_trajectory(checkpoint), job.trajectory
    if identity(stored) != identity(wanted):
        theirs, ours = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
        listing = "; ".join(f"{key}: {theirs[key]!r} -> {ours[key]!r}" for key in sorted(ours) if theirs[key] != ours[key])
        raise ConfigError(
            f"run {job.config.run.name!r} has checkpoints of other settings ({listing}); a run has one trajectory",
            remedy="choose another run.name, restore the settings, or delete the run's directory",
        )
    return checkpoint


def _stored_trajectory(checkpoint: CommittedCheckpoint) -> Trajectory:
    # Stored in full, so that a setting which is new here, or whose default has changed, is compared by what the run was made with.
    try:
        return Trajectory.model_validate(checkpoint.commit.trajectory)
    except ValidationError as exc:
        raise ConfigError(
            f"{checkpoint.directory} was made with settings that this Rayward does not know: {exc}",
            remedy="continue the run with the Rayward that started it, or choose another run.name",
        ) from exc


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
            ModelLoadError: the model computes something else in training mode.
            NonFiniteError, StreamOrderError, CheckpointError: see there.
        """
        job, first_step = self.job, 0
        if checkpoint is not None:
            job.store.load(self.engine, checkpoint)
            first_step = checkpoint.commit.step
        check_modes(self.engine, self.encoder)
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
                router_coefficient=job.config.training.router_coefficient,
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
            trajectory=self.job.trajectory.model_dump(mode="json"),
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
                ) from problem
        if self._report is not None:
            self._report({"step": step, **metrics, **{f"validation_{key}": value for key, value in validation.items()}})


def schedule_of(job: Job) -> Schedule:
    """The learning-rate schedule of a run."""
    training = job.config.training
    return Schedule(
        learning_rate=training.learning_rate,
        total_steps=job.total_steps,
        warmup_fraction=training.warmup_fraction,
        min_lr_fraction=training.min_lr_fraction,
    )
