"""`rayward export`: a committed checkpoint as a plain Transformers model with its contract, one shard in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayward import storage
from rayward.artifacts.writer import DEFAULT_SHARD_BYTES, MANIFEST_COPY, SETTINGS_FILE, new_model
from rayward.config.load import dump_config
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import MANIFEST_FILE, PreparedData
from rayward.errors import ConfigError
from rayward.model.build import resolve_hf_config
from rayward.model.weights import HEAD_PREFIX
from rayward.training.checkpoints.format import CommittedCheckpoint
from rayward.training.checkpoints.reader import CheckpointReader
from rayward.training.checkpoints.store import CheckpointStore
from rayward.workflows.console import console

if TYPE_CHECKING:
    from rayward.evaluation.records import Evaluation
    from rayward.training.trainer import TrainResult


def export(
    config: Config,
    prepared: PreparedData,
    checkpoint: CommittedCheckpoint,
    store: CheckpointStore,
    output: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Contract:
    """Write the export with its card; an existing one is replaced when the new one is complete and its golden scores agree.

    Returns:
        the contract as exported, with file hashes and golden scores.

    Raises:
        ConfigError: `output` exists and is not an export.
        ContractMismatchError: the written model does not give the golden scores of the training forward.
    """
    commit, objective = checkpoint.commit, config.objective
    with (
        new_model(output, replace=True) as writer,
        storage.localized(prepared.directory, "contract.json", "tokenizer", MANIFEST_FILE) as source,
        CheckpointReader(store.filesystem, checkpoint) as reader,
    ):
        tokenizer = load_tokenizer(str(source / "tokenizer"))
        contract = (
            Contract.load(source)
            .for_head(config.outputs, objective.reward_weights(config.outputs), objective.reading(config.data.step_separator))
            .model_copy(update={"golden": commit.golden, "dtype": commit.dtype})
        )
        writer.write_tokenizer(tokenizer, contract)
        writer.write_config(resolve_hf_config(config.model, contract, vocab_size=len(tokenizer)), contract)
        writer.write_weights(_tensors(reader), max_shard_bytes=max_shard_bytes)
        (writer.directory / SETTINGS_FILE).write_text(dump_config(config) + "\n", encoding="utf-8")
        shutil.copyfile(source / MANIFEST_FILE, writer.directory / MANIFEST_COPY)
        contract = writer.finish(contract, rescore=False)
        write_card(config, prepared, writer.directory, contract, None)
    return contract


def _tensors(reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
    # The backbone in the type of the training forward; the head keeps the same values in fp32, so that loading and pooling in plain
    # Transformers loses nothing. Persistent buffers are as they are in training.
    commit = reader.commit
    dtype = getattr(torch, commit.dtype)
    for name, entry in commit.parameters.items():
        values = reader.read(name, entry.shape, 0, math.prod(entry.shape)).view(entry.shape).to(dtype)
        yield name, values.float() if name.startswith(HEAD_PREFIX) else values
    yield from reader.buffers().items()


def export_pipeline(config: Config, output: Path, *, which: str) -> Path:
    """Export one checkpoint of an existing run."""
    from rayward.data.prepare.job import prepare
    from rayward.training.checkpoints.store import choose_checkpoint
    from rayward.training.trainer import TrainResult, resolve_job

    prepared = prepare(config)
    job, _ = resolve_job(config, prepared)
    checkpoint = choose_checkpoint(job.store, which)
    export_result(config, TrainResult(job.location, prepared, job, checkpoint), output)
    return output


def default_export(config: Config) -> Path:
    location = storage.join(storage.absolute(config.run.storage_path), config.run.name)
    if "://" in location:
        raise ConfigError(
            f"run.storage_path is {config.run.storage_path}; an export is written to a local directory and none is named",
            remedy="name one with --export DIRECTORY",
        )
    return Path(location) / "export"


def export_result(config: Config, result: TrainResult, output: Path) -> Contract:
    """Export the checkpoint that a run ended with, and say so."""
    contract = export(config, result.prepared, result.checkpoint, result.job.store, output)
    console.print(f"exported step {result.checkpoint.commit.step}; {len(contract.golden)} golden scores of the training forward agree")
    return contract


def write_card(
    config: Config, prepared: PreparedData, directory: Path, contract: Contract, evaluation: Evaluation | None, *, plots: Path | None = None
) -> None:
    """Write the model card into a directory that is not published yet.

    Args:
        plots: directory of the evaluation's plots.
    """
    from rayward.evaluation.card import write_model_card

    write_model_card(
        directory,
        contract=contract,
        config_json=dump_config(config),
        manifest=json.loads(prepared.manifest.model_dump_json()),
        evaluation=evaluation,
        plots=sorted(plots.glob("*.png")) if plots is not None else [],
    )
