"""The one way a model directory is made: written beside its place, scored, verified, and only then published by a rename.

    with new_model(output, replace=False) as writer:
        writer.write_tokenizer(tokenizer, contract)
        writer.write_config(hf_config, contract)
        writer.write_weights((name, tensor) for …)
        contract = writer.finish(contract, rescore=False)

When anything fails on the way, nothing is left and what was at `output` is untouched. A published directory does not change: another
normaliser, card or weight is another directory, or replaces this one as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rayward.artifacts.staging import staged
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.model.weights import HEAD_PREFIX, INDEX_FILE, SINGLE_FILE, head_sha256
from rayward.schema import file_sha256
from rayward.scoring.scorer import Scorer
from rayward.scoring.verify import verify_artifacts

DEFAULT_SHARD_BYTES = 5 << 30
GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest accepted difference to a golden reward by the type of the backbone, relative to max(1, |reward|)."""
CARD_FILE = "README.md"
SETTINGS_FILE = "training_config.json"
MANIFEST_COPY = "data_manifest.json"
ORIGIN_FILES = (SETTINGS_FILE, MANIFEST_COPY, "merge.json", "mixture.json", "import.json")
"""What an export says about its own making; a model made from it was not made so."""
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")


class ModelWriter:
    """A model directory in the making; use `new_model`.

    Attributes:
        directory: where it is written; other files of the model are put there before `finish`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.finished = False
        self._head: dict[str, Tensor] = {}

    def copy_small_files(self, source: Path) -> None:
        """Copy tokenizer and configuration of another model, without what it says about its own making."""
        left_out = (CONTRACT_FILE, INDEX_FILE, *ORIGIN_FILES)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix in _SMALL_SUFFIXES and path.name not in left_out:
                shutil.copyfile(path, self.directory / path.name)

    def write_tokenizer(self, tokenizer: PreTrainedTokenizerBase, contract: Contract) -> None:
        """Save a tokenizer with the template and the pad token of the contract, for plain Transformers."""
        if contract.template_source == "tokenizer":
            tokenizer.chat_template = contract.template
        tokenizer.pad_token = contract.pad_token
        tokenizer.save_pretrained(self.directory)

    def write_config(self, config: PretrainedConfig, contract: Contract) -> None:
        """Save a Transformers configuration as that of a sequence classifier with the contract's outputs, pad token and dtype."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        config.architectures = [cast(type, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]).__name__]
        config.dtype = getattr(torch, contract.dtype)
        config.save_pretrained(self.directory)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON file."""
        (self.directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def write_weights(self, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        """Write tensors as they come, in one file or in shards with an index; the host holds one shard and one tensor at a time.

        Args:
            tensors: names and values in the type that they are stored in, each name once.
            max_shard_bytes: a single tensor over it stands alone.
        """
        shards: list[tuple[Path, list[str]]] = []
        pending: dict[str, Tensor] = {}
        size = total = 0
        for name, tensor in tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            if pending and size + num_bytes > max_shard_bytes:
                shards.append(self._write_shard(pending, len(shards)))
                pending, size = {}, 0
            pending[name] = tensor.contiguous()
            size, total = size + num_bytes, total + num_bytes
            if name.startswith(HEAD_PREFIX):
                self._head[name] = pending[name]
        shards.append(self._write_shard(pending, len(shards)))
        if len(shards) == 1:
            shards[0][0].rename(self.directory / SINGLE_FILE)
            return
        file_of: dict[str, str] = {}
        for number, (path, names) in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path.rename(self.directory / file)
            file_of |= dict.fromkeys(names, file)
        self.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": file_of})

    def _write_shard(self, tensors: dict[str, Tensor], number: int) -> tuple[Path, list[str]]:
        # How many there will be, and so their names, is known at the end.
        path = self.directory / f"shard-{number:05d}.tmp"
        save_file(tensors, path, metadata={"format": "pt"})
        return path, list(tensors)

    def finish(self, contract: Contract, *, rescore: bool) -> Contract:
        """Write the contract over all files written so far, then load and verify the model as a server would.

        Args:
            contract: its golden rewards were computed elsewhere (the training forward, an imported model) and are verified here.
            rescore: they are computed here instead, with the written model; a contract without any gets those that it can hold.

        Returns:
            the contract as written.

        Raises:
            ContractMismatchError: the written model does not give the golden scores.
            ModelLoadError: it cannot be loaded, or gives no finite reward.
            ContractError: the contract can hold no golden conversation.
        """
        files = {path.name: file_sha256(path) for path in sorted(self.directory.iterdir()) if path.is_file() and path.name != CARD_FILE}
        contract = contract.model_copy(
            update={"files": files, "head_sha256": head_sha256(self._head), "golden_tolerance": GOLDEN_TOLERANCE[contract.dtype]}
        )
        if rescore:
            contract.model_copy(update={"golden": ()}).save(self.directory)
            contract = contract.model_copy(update={"golden": _rescored(self.directory, contract)})
        contract.save(self.directory)
        Scorer.load(self.directory, verify=True)
        self.finished = True
        return contract

    def finish_revision(self, source: Path, contract: Contract) -> None:
        """Take the files of a published model under another contract of the same version, for instance with a normaliser.

        Weights and tokenizer are hard links where the filesystem allows, else copies; the card and its plots are copies.

        Raises:
            ContractMismatchError: a file of `source` is not the contract's.
        """
        for path in sorted(source.iterdir()):
            target = self.directory / path.name
            if path.is_dir():
                shutil.copytree(path, target)
            elif path.name in contract.files:
                _link_or_copy(path, target)
            elif path.name != CONTRACT_FILE:
                shutil.copyfile(path, target)
        contract.save(self.directory)
        verify_artifacts(contract, self.directory)
        self.finished = True


@contextmanager
def new_model(output: Path, *, replace: bool) -> Iterator[ModelWriter]:
    """A model to write; it is published at `output` when the block ends, and vanishes when the block fails.

    Args:
        replace: an exported model at `output` makes way, as a whole and only at the end.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """
    with staged(output, replace=replace) as directory:
        writer = ModelWriter(directory)
        yield writer
        assert writer.finished, "a model that was not verified is not published"


def _rescored(directory: Path, contract: Contract) -> tuple[Any, ...]:
    return Scorer.load(directory, verify=False).golden_scores(contract.golden)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another filesystem, or one without hard links.
        shutil.copyfile(source, target)
