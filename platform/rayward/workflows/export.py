"""`rayward export`: a committed checkpoint as a plain Transformers model with its contract, one shard in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from rayward import storage
from rayward.config.load import dump_config
from rayward.config.run import Config
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import MANIFEST_FILE, PreparedData
from rayward.errors import ConfigError
from rayward.model.build import resolve_hf_config
from rayward.model.weights import HEAD_PREFIX, INDEX_FILE, SINGLE_FILE, head_sha256
from rayward.schema import file_sha256
from rayward.training.checkpoints.format import Commit, CommittedCheckpoint
from rayward.training.checkpoints.reader import CheckpointReader
from rayward.training.checkpoints.store import CheckpointStore
from rayward.workflows.console import console

if TYPE_CHECKING:
    from rayward.data.prepared import PreparedData
    from rayward.evaluation.records import Evaluation
    from rayward.training.trainer import TrainResult


DEFAULT_SHARD_BYTES = 5 << 30
GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def export(
    config: Config,
    prepared: PreparedData,
    checkpoint: CommittedCheckpoint,
    store: CheckpointStore,
    output: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Contract:
    """Write the export directory; an existing one is replaced only when the new one is complete.

    Returns:
        the contract as exported, with file hashes and golden scores.

    Raises:
        ConfigError: `output` exists and is not an export.
    """
    if output.exists() and not (output / CONTRACT_FILE).is_file() and any(output.iterdir()):
        raise ConfigError(f"{output} exists and is not an exported model", remedy="choose another directory")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    commit = checkpoint.commit
    source = storage.localize(prepared.directory, "contract.json", "tokenizer", MANIFEST_FILE)
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    objective = config.objective
    contract = Contract.load(source).for_head(
        config.outputs, objective.reward_weights(config.outputs), objective.reading(config.data.step_separator)
    )
    if contract.template_source == "tokenizer":
        tokenizer.chat_template = contract.template
    tokenizer.pad_token = contract.pad_token
    tokenizer.save_pretrained(partial)
    hf_config = resolve_hf_config(config.model, contract, vocab_size=len(tokenizer))
    hf_config.architectures = [_architecture(hf_config)]
    hf_config.dtype = getattr(torch, commit.dtype)
    hf_config.save_pretrained(partial)
    head = _write_weights(CheckpointReader(store.filesystem, checkpoint), commit, partial, max_shard_bytes)
    (partial / "training_config.json").write_text(dump_config(config) + "\n", encoding="utf-8")
    shutil.copyfile(source / MANIFEST_FILE, partial / "data_manifest.json")
    named = {p.name: file_sha256(p) for p in sorted(partial.iterdir()) if p.is_file()}
    contract = contract.model_copy(
        update={
            "golden": commit.golden,
            "dtype": commit.dtype,
            "golden_tolerance": GOLDEN_TOLERANCE[commit.dtype],
            "files": named,
            "head_sha256": head_sha256(head),
        }
    )
    contract.save(partial)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    return contract


def _architecture(hf_config: PretrainedConfig) -> str:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return cast(type, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(hf_config)]).__name__


def _write_weights(reader: CheckpointReader, commit: Commit, directory: Path, max_shard_bytes: int) -> dict[str, Tensor]:
    # The backbone in the type of the training forward; the head keeps the same values in fp32, so that loading and pooling in plain
    # Transformers loses nothing. Persistent buffers are as they are in training.
    dtype = getattr(torch, commit.dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in commit.parameters.items():
        num_bytes = math.prod(entry.shape) * (4 if name.startswith(HEAD_PREFIX) else dtype.itemsize)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    head: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = commit.parameters[name].shape
            values = reader.read(name, shape, 0, math.prod(shape)).view(shape).to(dtype)
            if name.startswith(HEAD_PREFIX):
                values = values.float()
                head[name] = values
            tensors[name] = values
            weight_map[name] = file
        if index == len(shards) - 1:
            buffers = reader.buffers()
            tensors |= buffers
            weight_map |= dict.fromkeys(buffers, file)
        total += sum(values.numel() * values.element_size() for values in tensors.values())
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (directory / INDEX_FILE).write_text(index_text + "\n", encoding="utf-8")
    return head


def export_pipeline(config: Config, output: Path, *, which: str) -> Path:
    """Export one checkpoint of an existing run."""
    from rayward.data.prepare.job import prepare
    from rayward.training.checkpoints.store import choose_checkpoint
    from rayward.training.trainer import TrainResult, resolve_job

    prepared = prepare(config)
    job, _ = resolve_job(config, prepared)
    checkpoint = choose_checkpoint(job.store, which)
    export_and_verify(config, TrainResult(job.location, prepared, job, checkpoint), output)
    write_card(config, prepared, output, None)
    return output


def default_export(config: Config) -> Path:
    location = storage.join(storage.absolute(config.run.storage_path), config.run.name)
    if "://" in location:
        raise ConfigError(
            f"run.storage_path is {config.run.storage_path}; an export is written to a local directory and none is named",
            remedy="name one with --export DIRECTORY",
        )
    return Path(location) / "export"


def export_and_verify(config: Config, result: TrainResult, output: Path) -> None:
    from rayward.scoring.scorer import Scorer

    contract = export(config, result.prepared, result.checkpoint, result.job.store, output)
    Scorer.load(str(output), verify=True)
    console.print(f"exported step {result.checkpoint.commit.step}; {len(contract.golden)} golden scores of the training forward agree")


def write_card(config: Config, prepared: PreparedData, output: Path, evaluation: Evaluation | None) -> None:
    from rayward.contract.contract import Contract
    from rayward.evaluation.card import write_model_card

    plots = sorted(Path(f"{output}-evaluation", "plots").glob("*.png")) if evaluation is not None else []
    write_model_card(
        output,
        contract=Contract.load(output),
        config_json=dump_config(config),
        manifest=json.loads(prepared.manifest.model_dump_json()),
        evaluation=evaluation,
        plots=plots,
    )
