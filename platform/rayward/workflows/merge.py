"""Weighted sums of models, tensor by tensor from shard to shard: averages (model soups), and extrapolations with a negative weight
(ExPO, arXiv 2404.16792: start + alpha (trained - start); alpha 1.52 in arXiv 2410.01257).

Peak memory is one shard of the result and one tensor of each model; nothing is loaded as a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from rayward.artifacts.tensors import TensorFiles
from rayward.artifacts.writer import DEFAULT_SHARD_BYTES, new_model
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError

SUM_TOLERANCE = 1e-6


def shares_of(num_models: int, weights: tuple[float, ...] | None, expo: float | None) -> tuple[float, ...]:
    """What each model counts: the weights, else equal shares; with `expo`, ExPO's extrapolation from the first to the second.

    Raises:
        ConfigError: `expo` is given with weights, or not for two models.
    """
    if expo is None:
        return (1.0 / num_models,) * num_models if weights is None else weights
    if weights is not None or num_models != 2:
        raise ConfigError("--expo takes two models (start, trained) and no --weights", remedy="see rayward merge --help")
    return (1.0 - expo, expo)


def merge(models: Sequence[Path], weights: Sequence[float], output: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Contract:
    """Write the weighted sum of exported models; names of outputs, tokenizer and configuration are the last model's.

    Args:
        models: two or more exports of one architecture under one set of contract rules.
        weights: one for each model; they sum to 1 and may be negative.
        output: a directory that does not exist yet.

    Returns:
        The contract as written; its golden scores are those of the merged model, on the last model's conversations.

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
    with new_model(output, replace=False) as writer, ExitStack() as stack:
        readers = [stack.enter_context(TensorFiles(model)) for model in models]
        contract = _common_contract(readers)
        writer.copy_small_files(models[-1])
        sums = ((name, _weighted_sum(readers, name, weights)) for name in readers[-1].names)
        writer.write_weights(sums, max_shard_bytes=max_shard_bytes)
        writer.write_json("merge.json", {"models": [model.name for model in models], "weights": list(weights)})
        return writer.finish(contract.model_copy(update={"normaliser": None}), rescore=True)


def _weighted_sum(readers: Sequence[TensorFiles], name: str, weights: Sequence[float]) -> Tensor:
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


def _common_contract(readers: Sequence[TensorFiles]) -> Contract:
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
    names = set(readers[0].names)
    for model, found in zip(models, (set(reader.names) for reader in readers), strict=True):
        if found != names:
            raise ModelLoadError(
                f"{model} and {models[0]} do not have the same tensors, for example {sorted(found ^ names)[0]}",
                remedy="merge models of one architecture",
            )
    return last
