"""Mixture of objectives in two stages on a frozen reward model (ArmoRM, arXiv 2406.12845): fit, export, import of published checkpoints.

rated rows ──features (Ray Data)──> ridge regression to the attributes ──> verbosity taken out ─┐
pairs ─────features (Ray Data)──────────────────────────────────────────> gate on the prompt ──┴─> export with contract
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from rayward import storage
from rayward.config.load import dump_config, parse_config
from rayward.config.mixture import MixtureConfig
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.errors import DataError

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


@dataclass(frozen=True)
class _Features:
    """Hidden states and labels of one prepared split, completion by completion.

    Attributes:
        ends, gates: float32 [N, H]; ratings: float64 [N, A] (NaN missing).
        pairs: int64 [P, 2], better and worse completion of every pair with a winner.
        held_out: bool [N], by prompt.
    """

    ends: npt.NDArray[np.float32]
    gates: npt.NDArray[np.float32]
    ratings: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]


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
    from rayward.workflows.mixture_fit import debiasing, fit_gate, ridge

    base = Contract.load(Path(config.model))
    connect()
    rated = _features(config, _prepare(config, "ratings"))
    compared = _features(config, _prepare(config, "preferences"))
    if not len(compared.pairs):
        raise DataError("the preferences hold no pair with a winner", remedy="give pairs or rankings in preferences")
    attributes = config.ratings.attributes
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
        predicted = rated.ends @ found.weights.T
        column = attributes.index(config.verbosity_attribute)
        gate.transform.copy_(torch.from_numpy(debiasing(predicted, column, config.correlation_limit)).float())
    better, worse = (torch.from_numpy(compared.ends[compared.pairs[:, side]]) @ weights.T for side in (0, 1))
    losses = fit_gate(
        gate, torch.from_numpy(compared.gates[compared.pairs[:, 0]]), better, worse,
        steps=config.gate_steps, batch_size=config.gate_batch_size, learning_rate=config.gate_learning_rate, seed=config.run.seed,
    )  # fmt: skip
    output = Path(storage.absolute(config.run.storage_path)) / config.run.name / "export"
    report = _report(attributes, found, gate, losses, num_pairs=len(compared.pairs))
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


def _features(config: MixtureConfig, prepared: PreparedData) -> _Features:
    """Features of the train split; every row must have them."""
    from rayward.scoring.batch import ROWS_PER_CALL, feature_blocks

    columns = ["row", "prompt_key", "ranks", "attributes", "prompt_json", "completions_json"]
    tables = list(prepared.tables("train", columns, max_rows=ROWS_PER_CALL))
    blocks = feature_blocks(tables, model=str(Path(config.model).resolve()), placement=config.placement)
    rows = [row for block in blocks for row in block.to_pylist()]
    rows.sort(key=lambda row: row["row"])
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        first = failed[0]["error"]["message"]
        raise DataError(f"{len(failed)} prepared rows give no features, for example: {first}", remedy="quarantine or correct them")
    num_attributes = len(prepared.manifest.labels.attributes)
    ends, gates, ratings, pairs, held_out = [], [], [], [], []
    offset = 0
    for row in rows:
        size = len(json.loads(row["completions_json"]))
        ends.append(np.asarray(row["end_hidden"], dtype=np.float32).reshape(size, -1))
        gates.append(np.asarray(row["gate_hidden"], dtype=np.float32).reshape(size, -1))
        given = row["attributes"]
        rated = np.full((size, num_attributes), np.nan) if given is None else np.array([list(r) for r in given], dtype=np.float64)
        ratings.append(rated)
        if row["ranks"] is not None:
            ranks = np.asarray(row["ranks"])
            pairs.append(np.argwhere(ranks[:, None] < ranks[None, :]) + offset)
        # One in five prompts chooses the penalty, by their hash.
        held_out += [int(row["prompt_key"][:8], 16) % 5 == 0] * size
        offset += size
    return _Features(
        np.concatenate(ends), np.concatenate(gates), np.concatenate(ratings),
        np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64), np.array(held_out, dtype=bool),
    )  # fmt: skip


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
