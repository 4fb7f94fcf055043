"""Mixture of objectives in two stages on a frozen reward model (ArmoRM, arXiv 2406.12845): fit, export, import of published checkpoints.

rated rows ──features (Ray Data)──> ridge regression to the attributes ──> verbosity taken out ─┐
pairs ─────features (Ray Data)──────────────────────────────────────────> gate on the prompt ──┴─> export with contract
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rayward import storage
from rayward.config.load import dump_config, parse_config
from rayward.config.mixture import MixtureConfig
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.errors import DataError
from rayward.workflows.mixture_features import Features, features_of, projected

if TYPE_CHECKING:
    import torch

    from rayward.artifacts.tensors import TensorFiles
    from rayward.data.prepared import PreparedData
    from rayward.model.gate import Gating
    from rayward.workflows.mixture_fit import RidgeFit


SCORE = "score"
REPORT_FILE = "mixture.json"
OTHER_HEADS = ("regression_layer.", "gating.", "reward_transform_matrix")
"""Prefixes of the published layout's tensors that are no backbone."""


def fit_mixture(config: MixtureConfig) -> Path:
    """Fit both stages on the features of `config.model` and write the model to `<storage_path>/<name>/export`.

    Raises:
        ConfigError: the model is no exported reward model, or an attribute has too few ratings.
        DataError, ContractError: the data cannot be read or prepared.
    """
    import torch

    from rayward.cluster import connect
    from rayward.evaluation.card import write_model_card
    from rayward.model.gate import Gating
    from rayward.workflows.mixture_fit import as_tensor, debiasing, fit_gate, ridge

    base = Contract.load(Path(config.model))
    connect()
    attributes = config.ratings.attributes
    root = Path(storage.absolute(config.run.storage_path)) / config.run.name
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".features-", dir=root) as scratch:
        rated = _features(config, "ratings", Path(scratch))
        compared = _features(config, "preferences", Path(scratch))
        if not len(compared.pairs):
            raise DataError("the preferences hold no pair with a winner", remedy="give pairs or rankings in preferences")
        found = ridge(rated.ends, rated.ratings, rated.held_out)
        weights = torch.from_numpy(found.weights).float()
        gate = Gating(
            rated.ends.shape[1], len(attributes), width=config.gate_width, depth=config.gate_depth,
            temperature=config.gate_temperature, dropout=config.gate_dropout,
        )  # fmt: skip
        torch.manual_seed(config.run.seed)
        for layer in gate.layers:
            cast(torch.nn.Linear, layer).reset_parameters()
        if config.verbosity_attribute is not None:
            predicted = projected(rated.ends, found.weights, Path(scratch, "predicted"))
            column = attributes.index(config.verbosity_attribute)
            gate.transform.copy_(torch.from_numpy(debiasing(predicted, column, config.correlation_limit)).float())
        sides = [projected(compared.ends, weights.numpy(), Path(scratch, f"side{k}"), compared.pairs[:, k]) for k in (0, 1)]
        losses = fit_gate(
            gate, as_tensor(compared.gates), as_tensor(sides[0]), as_tensor(sides[1]), rows=as_tensor(compared.pairs)[:, 0],
            steps=config.gate_steps, batch_size=config.gate_batch_size, learning_rate=config.gate_learning_rate, seed=config.run.seed,
        )  # fmt: skip
        report = _report(attributes, found, gate, losses, num_pairs=len(compared.pairs))
    output = root / "export"
    described = {
        "objective": {"type": "mixture"},
        "model": {"path": config.model},
        "run": {"name": config.run.name, "seed": config.run.seed},
    }

    def card(directory: Path, contract: Contract) -> None:
        write_model_card(directory, contract=contract, config_json=json.dumps(described), manifest=None, evaluation=None)

    write_mixture(
        Path(config.model), output, weights, gate, base, attributes, gate_ids=(), report=report, settings=dump_config(config), card=card
    )
    return output


def _features(config: MixtureConfig, which: str, scratch: Path) -> Features:
    directory = scratch / which
    directory.mkdir()
    return features_of(config.model, _prepare(config, which), directory, placement=config.placement)


def _prepare(config: MixtureConfig, which: str) -> PreparedData:
    from rayward.data.prepare.job import prepare

    base = Contract.load(Path(config.model))
    values = {
        "run": config.run.model_dump(),
        "data": getattr(config, which).model_dump(),
        "model": {
            "path": config.model,
            "max_tokens": base.max_tokens,
            "template_kwargs": base.template_kwargs,
            "templated_text": base.templated_text,
            "unshown_text": base.unshown_text,
        },
        "training": {"tokens_per_microbatch": max(4096, base.max_tokens)},
    }
    return prepare(parse_config(values, Config))


def _report(attributes: tuple[str, ...], found: RidgeFit, gate: Gating, losses: list[float], *, num_pairs: int) -> dict[str, Any]:
    return {
        "attributes": list(attributes),
        "ridge": {
            name: {"alpha": alpha, "validation_mse": mse, "num_ratings": count}
            for name, alpha, mse, count in zip(attributes, found.alphas, found.validation_mse, found.num_ratings, strict=True)
        },
        "transform": gate.transform.tolist(),
        "num_pairs": num_pairs,
        "gate_loss": {"first": float(np.mean(losses[:20])), "last": float(np.mean(losses[-20:]))},
    }


def write_mixture(
    source: Path,
    output: Path,
    weights: torch.Tensor,
    gate: Gating,
    base: Contract,
    attributes: tuple[str, ...],
    *,
    gate_ids: tuple[int, ...],
    report: dict[str, Any],
    settings: str,
    card: Callable[[Path, Contract], object] | None = None,
) -> Contract:
    """Backbone of `source`, regression layer, gate and contract as one export, with golden scores of its own, verified.

    Args:
        weights: float32 [A, H], the regression layer.
        base: the contract whose rules of text stay.
        gate_ids: see `Contract.gate`.
        card: writes the model card into the directory.

    Raises:
        ConfigError: `output` exists and is not an export.
    """
    from rayward.artifacts.tensors import TensorFiles
    from rayward.artifacts.writer import SETTINGS_FILE, new_model

    with new_model(output, replace=True) as writer, TensorFiles(source) as files:
        writer.copy_small_files(source)
        hf_config = json.loads((writer.directory / "config.json").read_text(encoding="utf-8"))
        hf_config |= {
            "num_labels": len(attributes),
            "id2label": {str(index): name for index, name in enumerate(attributes)},
            "label2id": {name: index for index, name in enumerate(attributes)},
        }
        writer.write_json("config.json", hf_config)
        writer.write_weights(_with_head(files, weights))
        gate.save(writer.directory)
        writer.write_json(REPORT_FILE, report)
        (writer.directory / SETTINGS_FILE).write_text(settings + "\n", encoding="utf-8")
        contract = base.for_head((*attributes, SCORE), (*(0.0,) * len(attributes), 1.0))
        contract = writer.finish(contract.model_copy(update={"gate": gate_ids, "normaliser": None}), rescore=True)
        if card is not None:
            card(writer.directory, contract)
    return contract


def _with_head(files: TensorFiles, weights: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from rayward.model.weights import HEAD_PREFIX

    for name in files.names:
        if not name.startswith((HEAD_PREFIX, *OTHER_HEADS)):
            yield name, files.read(name)
    yield f"{HEAD_PREFIX}weight", weights.float()
