"""A committed checkpoint -> a plain Transformers model with its contract: sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from rayward import storage
from rayward.config import Config, dump_config
from rayward.contract import CONTRACT_FILE, Contract, file_sha256, load_tokenizer
from rayward.data.manifest import MANIFEST_FILE, PreparedData
from rayward.errors import CheckpointError, ConfigError
from rayward.model.loading import HEAD_PREFIX, INDEX_FILE, SINGLE_FILE, head_sha256, resolve_hf_config
from rayward.training.checkpoint import CheckpointReader, CheckpointStore, Commit, CommittedCheckpoint

DEFAULT_SHARD_BYTES = 5 << 30
GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def choose_checkpoint(store: CheckpointStore, which: str) -> CommittedCheckpoint:
    """`last`, `best` (validation accuracy), or a step number.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    committed = store.committed()
    chosen: CommittedCheckpoint | None = None
    if which == "last":
        chosen = committed[0] if committed else None
    elif which == "best":
        judged = [c for c in committed if c.commit.validation_accuracy is not None]
        chosen = max(judged, key=lambda c: (c.commit.validation_accuracy, c.commit.step), default=None)
    else:
        chosen = next((c for c in committed if str(c.commit.step) == which), None)
    if chosen is None:
        steps = ", ".join(str(c.commit.step) for c in committed) or "none"
        raise CheckpointError(
            f"no checkpoint {which!r} in {store.root}; committed steps: {steps}", remedy="choose last, best or one of these steps"
        )
    return chosen


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
    # Transformers loses nothing.
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
            total += values.numel() * values.element_size()
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (directory / INDEX_FILE).write_text(index_text + "\n", encoding="utf-8")
    return head
