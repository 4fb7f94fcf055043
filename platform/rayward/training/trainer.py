"""The train job on Ray: the driver resolves everything that can be wrong, Ray Train runs the sessions.

The driver's part (`train`) prepares the data, checks model, budget and data against each other, and starts a `TorchTrainer`. A
worker group that dies is restarted by Ray Train; the data sets are then built again from the step of the last committed
checkpoint, for the world size that the new group has.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from rayward import storage
from rayward.batch.layout import Layout
from rayward.cluster import device_environment, started_here
from rayward.config.load import dump_config
from rayward.config.run import Config
from rayward.config.training import TrainingConfig
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import PreparedData
from rayward.data.stream.shares import StepShare, read_share
from rayward.data.stream.stream import StepShares, dataset_factory
from rayward.errors import ConfigError, DataError, TrainingError, carried_by
from rayward.training.checkpoints.format import CommittedCheckpoint
from rayward.training.engines.operator import build_before_workers
from rayward.training.failures import clear_failure, failure_on_record, run_recorded
from rayward.training.session import Job, Session, resume_point
from rayward.training.tracking import follow

logger = logging.getLogger(__name__)

NUM_LOOKS = 20
"""At what is free, before it is said that the job waits."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a finished run lies.

    Attributes:
        location: directory or URI of the run.
        checkpoint: the checkpoint of the last step.
    """

    location: str
    prepared: PreparedData
    job: Job
    checkpoint: CommittedCheckpoint


def run_location(config: Config) -> str:
    """Directory or URI of the run that the configuration names."""
    return storage.join(storage.absolute(config.run.storage_path), config.run.name)


def resolve_job(config: Config, prepared: PreparedData) -> tuple[Job, Layout]:
    """Check configuration, model and data against each other before any worker starts.

    Raises:
        ConfigError, ModelLoadError, DataError: with the numbers.
    """
    from accelerate import init_empty_weights

    from rayward.model.build import build_reward_model, resolve_hf_config
    from rayward.model.capabilities import position_limit
    from rayward.model.pretrained import weight_source
    from rayward.model.routers import check_routers
    from rayward.model.weights import check_language_head, resolve_model_dir

    # Workers run in other directories than the driver.
    local = {key: os.path.abspath(path) for key in ("path", "tokenizer") if (path := getattr(config.model, key)) and os.path.isdir(path)}
    config = config.model_copy(update={"model": config.model.model_copy(update=local)})
    manifest, training = prepared.manifest, config.training
    if manifest.num_train == 0:
        raise DataError(f"{prepared.directory} holds no training row", remedy="lower data.validation_fraction or add data")
    if training.num_epochs > 1:
        logger.warning(
            "training.num_epochs is %d: reward models over-fit after the first epoch; watch the validation loss", training.num_epochs
        )
    config.objective.check(manifest.labels)
    if config.data.critique_lead_in is not None and not config.objective.language_coefficient:
        raise ConfigError(
            "data.critique_lead_in is set and objective.language_coefficient is 0: the model would not learn to write critiques",
            remedy="set objective.language_coefficient, for example to 1.25, or leave data.critique_lead_in out",
        )
    contract, tokenizer_length = _contract_and_vocabulary(prepared)
    objective = config.objective
    contract = contract.for_head(config.outputs, objective.reward_weights(config.outputs), objective.reading(config.data.step_separator))
    hf_config = resolve_hf_config(config.model, contract, vocab_size=tokenizer_length)
    with_language = objective.language_coefficient > 0
    if config.model.path is not None and with_language:
        check_language_head(resolve_model_dir(config.model.path, config.model.revision), hf_config)
    with init_empty_weights(include_buffers=False):
        model = build_reward_model(hf_config, max_tokens=contract.max_tokens, with_language=with_language)
    limit = position_limit(model.model)
    if limit is not None and contract.max_tokens > limit:
        raise ConfigError(
            f"model.max_tokens is {contract.max_tokens}, {type(model.model).__name__} has positions for {limit} tokens",
            remedy=f"set model.max_tokens to at most {limit}",
        )
    if training.router_coefficient:
        check_routers(model.backbone)
    weight_source(model.model, config.model, seed=config.run.seed, announce=True)
    if objective.place != "end" and not model.has_linear_head:
        raise ConfigError(
            f"objective {objective.type} reads the head at {objective.place}, and {type(model.model).__name__} pools by itself",
            remedy="use a decoder model, or an objective that is read at the end",
        )
    longest = manifest.longest_comparison_tokens
    if model.layout == "padded":
        logger.warning("prefixes are not shared and rows are padded, because of the model: %s", model.why_padded)
        longest = manifest.max_completions * contract.max_tokens
    if longest > training.tokens_per_microbatch:
        raise ConfigError(
            f"the longest comparison takes up to {longest} tokens, training.tokens_per_microbatch is {training.tokens_per_microbatch}; "
            "a comparison is never split",
            remedy=f"set training.tokens_per_microbatch to at least {longest}, or lower model.max_tokens (now {contract.max_tokens})",
        )
    steps_per_epoch = math.ceil(manifest.num_train / training.comparisons_per_step)
    total_steps = steps_per_epoch * training.num_epochs
    job = Job(
        config=config,
        contract=contract,
        location=run_location(config),
        total_steps=min(total_steps, training.max_steps or total_steps),
        steps_per_epoch=steps_per_epoch,
        data_fingerprint=manifest.fingerprint,
    )
    return job, model.layout


def train(config: Config, prepared: PreparedData) -> TrainResult:
    """Run (or continue) the training job to its last step.

    Raises:
        ConfigError, DataError, ModelLoadError: before any worker starts.
        TrainingError: the run stopped; its last committed checkpoint stays and the same command continues it.
    """
    job, layout = resolve_job(config, prepared)
    filesystem, root = storage.resolve(job.location)
    filesystem.create_dir(root)
    checkpoint = resume_point(job)
    if checkpoint is not None:
        logger.warning("run %s continues at step %d of %d", config.run.name, checkpoint.commit.step, job.total_steps)
    if checkpoint is None or checkpoint.commit.step < job.total_steps:
        storage.write_text(filesystem, f"{root}/config.json", dump_config(config))
        clear_failure(job.location)
        _fit(job, prepared, layout)
        checkpoint = job.store.latest()
    if checkpoint is None or checkpoint.commit.step < job.total_steps:
        raise TrainingError(
            "training ended without a checkpoint of the last step", remedy=f"see the logs, then continue run {config.run.name}"
        )
    return TrainResult(location=job.location, prepared=prepared, job=job, checkpoint=checkpoint)


def _contract_and_vocabulary(prepared: PreparedData) -> tuple[Contract, int]:
    with storage.localized(prepared.directory, "contract.json", "tokenizer") as directory:
        return Contract.load(directory), len(load_tokenizer(str(directory / "tokenizer")))


def check_resources(training: TrainingConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Say what the job has to wait for: Ray Train and Ray Data wait without a word, and without a CPU for the data tasks for ever.

    Args:
        sleep: between two looks; what has just ended is counted as taken for a moment.

    Raises:
        ConfigError: this machine, which is all there will be, is too small.
    """
    low, _ = training.worker_range
    total = ray.cluster_resources().get("CPU", 0.0)
    needed = {"CPU": low * training.cpus_per_worker + 1.0, "GPU": low * training.gpus_per_worker}
    if needed["CPU"] > total:
        problem = (
            f"{low} workers with training.cpus_per_worker {training.cpus_per_worker} leave less than one of the cluster's {total:g} CPUs "
            "to the data stream"
        )
        if started_here():
            raise ConfigError(problem, remedy="lower training.cpus_per_worker or training.num_workers, or use a larger cluster")
        logger.warning("%s; the job waits until the cluster grows", problem)
        return
    for _ in range(NUM_LOOKS):
        lacking = _lacking(needed)
        if not lacking:
            return
        sleep(0.25)
    logger.warning(
        "%s; the job waits for it. `ray status` shows what is taken; a version that a service keeps for a rollback is one such thing, and "
        "`rayward models retire` frees it",
        " and ".join(lacking),
    )


def _lacking(needed: dict[str, float]) -> list[str]:
    free = ray.available_resources()
    return [
        f"{low:g} {kind} are needed (workers and data) and {free.get(kind, 0.0):g} are free"
        for kind, low in needed.items()
        if low > free.get(kind, 0.0)
    ]


def _fit(job: Job, prepared: PreparedData, layout: Layout) -> None:
    training, manifest = job.config.training, prepared.manifest
    check_resources(training)
    if training.engine == "deepspeed" and training.gpus_per_worker == 0 and started_here():
        build_before_workers(worker_environment(training))
    low, high = training.worker_range
    store = job.store

    def first_row(epoch: int) -> int:
        checkpoint = store.latest()
        step = checkpoint.commit.step if checkpoint else 0
        done = step - epoch * job.steps_per_epoch
        # Ray Train also builds the data sets of epochs that are over; nobody opens them, but without rows they cannot be built.
        return done * training.comparisons_per_step if 0 < done < job.steps_per_epoch else 0

    stop_row = min(manifest.num_train, job.total_steps * training.comparisons_per_step)
    datasets: dict[str, Any] = {
        f"train_epoch_{epoch}": dataset_factory(
            prepared.directory, manifest.train_shards, start_row=partial(first_row, epoch), stop_row=stop_row
        )
        for epoch in range(math.ceil(job.total_steps / job.steps_per_epoch))
    }
    if manifest.num_validation:
        datasets["validation"] = dataset_factory(
            prepared.directory, manifest.validation_shards, start_row=lambda: 0, stop_row=manifest.num_validation
        )
    settings = {
        "config": job.config.model_dump(mode="json"),
        "contract": job.contract.model_dump_json(),
        "prepared": prepared.directory,
        "location": job.location,
        "total_steps": job.total_steps,
        "steps_per_epoch": job.steps_per_epoch,
        "data_fingerprint": job.data_fingerprint,
        "has_validation": manifest.num_validation > 0,
    }
    on_cuda = training.gpus_per_worker > 0
    filesystem, path = storage.resolve(job.location)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if on_cuda else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=on_cuda,
            resources_per_worker={"CPU": training.cpus_per_worker, **({"GPU": training.gpus_per_worker} if on_cuda else {})},
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=path,
            storage_filesystem=filesystem,  # opened by us: Ray itself knows pyarrow's schemes only
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": worker_environment(training)},
        ),
        datasets=datasets,
        dataset_config=StepShares(
            comparisons_per_step=training.comparisons_per_step, tokens_per_microbatch=training.tokens_per_microbatch, layout=layout
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=follow, args=(job.location, job.total_steps, stop), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as exc:
        _raise_recorded(job.location)
        # What Ray's controller met on the way to the workers, such as data that is gone.
        own = carried_by(exc.controller_failure) if isinstance(exc, ControllerError) else None
        if own is not None:
            raise own from exc
        what = f"failed more than {training.max_failures} times" if isinstance(exc, TrainingFailedError) else "lost its controller"
        raise TrainingError(
            f"training {what}: {exc}",
            remedy=f"the last committed checkpoint stays; correct the cause and run the same command to continue {job.config.run.name!r}",
        ) from exc
    finally:
        stop.set()
        watcher.join(timeout=10)
    _raise_recorded(job.location)


def worker_environment(training: TrainingConfig) -> dict[str, str]:
    """Environment variables of a train worker; one without a GPU sees none, and DeepSpeed does not look for one."""
    environment = {"OMP_NUM_THREADS": str(training.threads_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    on_cpu = {} if training.gpus_per_worker > 0 else {"DS_ACCELERATOR": "cpu"}
    return {**environment, **on_cpu, **device_environment(training.gpus_per_worker)}


def _raise_recorded(location: str) -> None:
    error = failure_on_record(location)
    if error is not None:
        raise error


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker; an error that a restart cannot cure ends the run (`failures`)."""
    alone = ray.train.get_context().get_world_size() == 1
    run_recorded(settings["location"], partial(_run_session, settings), alone=alone)


def _run_session(settings: dict[str, Any]) -> None:
    import torch

    from rayward.model.build import build_reward_model, resolve_hf_config
    from rayward.model.pretrained import weight_source
    from rayward.training.engines.build import build_engine, initialize, pretrained

    config = Config.model_validate(settings["config"])
    contract = Contract.model_validate_json(settings["contract"])
    torch.set_num_threads(config.training.threads_per_worker)
    with storage.localized(settings["prepared"], "tokenizer") as directory:
        tokenizer = load_tokenizer(str(directory / "tokenizer"))
    job = Job(config, contract, *(settings[key] for key in ("location", "total_steps", "steps_per_epoch", "data_fingerprint")))
    hf_config = resolve_hf_config(config.model, contract, vocab_size=len(tokenizer))
    with_language = config.objective.language_coefficient > 0
    engine = build_engine(
        lambda dtype: build_reward_model(hf_config, max_tokens=contract.max_tokens, dtype=dtype, with_language=with_language),
        config.training,
        # With several workers on a node each sees the GPUs of all of them.
        device=get_device() if config.training.gpus_per_worker > 0 else None,
    )
    # One decision for all ranks: what rank 0 sees.
    checkpoint = engine.all_gather_object(job.store.latest() if engine.rank == 0 else None)[0]
    if checkpoint is None:
        initialize(engine, weight_source(pretrained(engine), config.model, seed=config.run.seed))

    def shares(name: str) -> Iterator[StepShare]:
        shard = ray.train.get_dataset_shard(name)
        for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
            yield read_share(table, layout=engine.reward_model.layout, pad_token_id=contract.pad_token_id, read=config.objective.place)

    session = Session(
        engine,
        job,
        Encoder(contract, tokenizer),
        validation=(lambda: shares("validation")) if settings["has_validation"] else None,
        report=lambda metrics: ray.train.report(metrics),
    )
    session.run(lambda epoch: shares(f"train_epoch_{epoch}"), checkpoint)
