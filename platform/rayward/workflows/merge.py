"""Weighted sums of models, tensor by tensor from shard to shard: averages (model soups), and extrapolations with a negative weight
(ExPO, arXiv 2404.16792: start + alpha (trained - start); alpha 1.52 in arXiv 2410.01257).

Peak memory is one shard of the result and one tensor of each model; nothing is loaded as a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.weights import HEAD_PREFIX, INDEX_FILE, SINGLE_FILE, head_sha256, weight_map
from rayward.schema import file_sha256

SUM_TOLERANCE = 1e-6
CARD_FILES = ("README.md", "training_config.json", "data_manifest.json")
"""What an export says about its own training; a merged model was not trained so."""


def merge(models: Sequence[Path], weights: Sequence[float], output: Path) -> Contract:
    """Write the weighted sum of exported models; names of outputs, tokenizer and configuration are the last model's.

    Args:
        models: two or more exports of one architecture under one set of contract rules.
        weights: one for each model; they sum to 1 and may be negative.
        output: a directory that does not exist yet.

    Returns:
        The contract as written, without golden scores: they need a forward of the merged model.

    Raises:
        ConfigError: too few models, weights that do not sum to 1, or `output` exists.
        ModelLoadError: the models do not fit each other, or a file cannot be read.
    """
    if len(models) < 2 or len(weights) != len(models):
        raise ConfigError(
            f"{len(models)} models and {len(weights)} weights; the rule is two models or more, one weight each", remedy="see --help"
        )
    if abs(sum(weights) - 1.0) > SUM_TOLERANCE:
        raise ConfigError(f"the weights {list(weights)} sum to {sum(weights):g}; the rule is 1", remedy="scale them")
    if output.exists():
        raise ConfigError(f"{output} exists already", remedy="choose another directory")
    readers = [_Reader(model) for model in models]
    contract = _common_contract(readers)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_small_files(models[-1], partial)
    files: dict[str, list[str]] = {}
    for name, file in readers[-1].file_of.items():
        files.setdefault(file, []).append(name)
    head: dict[str, Tensor] = {}
    for file, names in files.items():
        tensors = {name: _weighted_sum(readers, name, weights) for name in names}
        head |= {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD_PREFIX)}
        save_file(tensors, partial / file, metadata={"format": "pt"})
    recipe = {"models": [model.name for model in models], "weights": list(weights)}
    (partial / "merge.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    hashes = {path.name: file_sha256(path) for path in sorted(partial.iterdir()) if path.is_file()}
    contract = contract.model_copy(update={"golden": (), "normaliser": None, "files": hashes, "head_sha256": head_sha256(head)})
    contract.save(partial)
    partial.rename(output)
    return contract


class _Reader:
    # Tensors of one export by name; files stay open, memory-mapped.

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of = weight_map(directory)
        self._open: dict[str, Any] = {}

    def read(self, name: str) -> Tensor:
        file = self.file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.directory / file, framework="pt")
            return cast(Tensor, self._open[file].get_tensor(name))
        except (OSError, SafetensorError) as exc:
            raise ModelLoadError(f"{self.directory / file} cannot be read ({exc})", remedy="restore it, or export the model again") from exc


def _weighted_sum(readers: Sequence[_Reader], name: str, weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for reader, weight in zip(readers, weights, strict=True):
        tensor = reader.read(name)
        if total is not None and tensor.shape != total.shape:
            raise ModelLoadError(
                f"{name} has shape {tuple(tensor.shape)} in {reader.directory} and {tuple(total.shape)} in {readers[0].directory}",
                remedy="merge models of one architecture with as many outputs",
            )
        scaled = tensor.float() * weight
        total = scaled if total is None else total + scaled
        dtype = tensor.dtype
    assert total is not None
    return total.to(dtype).contiguous()


def _common_contract(readers: Sequence[_Reader]) -> Contract:
    models = [reader.directory for reader in readers]
    contracts = [Contract.load(model) for model in models]
    first, last = contracts[0], contracts[-1]
    for model, contract in zip(models, contracts, strict=True):
        if contract.gate is not None:
            raise ModelLoadError(
                f"{model} is a mixture of objectives; its gate cannot be averaged", remedy="merge first, then fit the mixture"
            )
        if contract.fingerprint() != first.fingerprint() or contract.dtype != first.dtype or len(contract.outputs) != len(first.outputs):
            raise ModelLoadError(
                f"{model} and {models[0]} have different contracts (template, tokens, limit, dtype or number of outputs)",
                remedy="merge models that were trained from one start under one contract",
            )
    names = set(readers[0].file_of)
    for model, found in zip(models, (set(reader.file_of) for reader in readers), strict=True):
        if found != names:
            raise ModelLoadError(
                f"{model} and {models[0]} do not have the same tensors, for example {sorted(found ^ names)[0]}",
                remedy="merge models of one architecture",
            )
    return last


def _copy_small_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        is_weights = path.suffix == ".safetensors" and path.name != SINGLE_FILE
        if path.is_file() and not is_weights and path.name not in (CONTRACT_FILE, SINGLE_FILE, *CARD_FILES):
            shutil.copyfile(path, target / path.name)
    assert (target / INDEX_FILE).is_file() == (source / INDEX_FILE).is_file()


def merge_pipeline(output: Path, models: Sequence[str], weights: Sequence[float]) -> Path:
    """Merge exported models, recompute the golden scores with the merged one, and verify it."""
    from rayward.contract.contract import Contract
    from rayward.scoring.scorer import Scorer

    golden = Contract.load(Path(models[-1])).golden
    contract = merge([Path(model) for model in models], list(weights), output)
    rescored = Scorer.load(output, verify=False).golden_scores(golden)
    contract.model_copy(update={"golden": rescored}).save(output)
    Scorer.load(output, verify=True)
    return output
