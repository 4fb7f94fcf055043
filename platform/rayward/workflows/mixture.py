"""Mixture of objectives in two stages on a frozen reward model (ArmoRM, arXiv 2406.12845): fit, export, import of published checkpoints.

rated rows ──features (Ray Data)──> ridge regression to the attributes ──> verbosity taken out ─┐
pairs ─────features (Ray Data)──────────────────────────────────────────> gate on the prompt ──┴─> export with contract
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from rayward import storage
from rayward.config.load import dump_config, parse_config
from rayward.config.mixture import MixtureConfig
from rayward.config.run import Config
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ConfigError, DataError
from rayward.schema import file_sha256

if TYPE_CHECKING:
    import torch

    from rayward.data.prepared import PreparedData
    from rayward.model.gate import Gating
    from rayward.workflows.mixture_fit import RidgeFit


SCORE = "score"
HEAD_FILE = "model-head.safetensors"
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
    contract = write_mixture(
        Path(config.model), output, weights, gate, base, attributes, gate_ids=(), report=report, settings=dump_config(config)
    )
    described = {"objective": {"type": "mixture"}, "model": {"path": config.model}, "run": {"seed": config.run.seed}}
    write_model_card(output, contract=contract, config_json=json.dumps(described), manifest=None, evaluation=None, plots=[])
    return output


def _prepare(config: MixtureConfig, which: str) -> PreparedData:
    from rayward.data.prepare.job import prepare

    base = Contract.load(Path(config.model))
    values = {
        "run": config.run.model_dump(),
        "data": getattr(config, which).model_dump(),
        "model": {"path": config.model, "max_tokens": base.max_tokens, "template_kwargs": base.template_kwargs},
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
) -> Contract:
    """Backbone of `source`, regression layer, gate and contract as one export, with golden scores of its own, verified.

    Args:
        weights: float32 [A, H], the regression layer.
        base: the contract whose rules of text stay.
        gate_ids: see `Contract.gate`.

    Raises:
        ConfigError: `output` exists and is not an export.
    """
    from rayward.scoring.scorer import Scorer

    if output.exists() and not (output / CONTRACT_FILE).is_file() and any(output.iterdir()):
        raise ConfigError(f"{output} exists and is not an exported model", remedy="choose another run.name")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    head = _copy_backbone(source, partial, weights, attributes)
    gate.save(partial)
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (partial / "training_config.json").write_text(settings + "\n", encoding="utf-8")
    outputs = (*attributes, SCORE)
    contract = base.for_head(outputs, (*(0.0,) * len(attributes), 1.0)).model_copy(
        update={
            "gate": gate_ids,
            "normaliser": None,
            "golden": (),
            "files": {path.name: file_sha256(path) for path in sorted(partial.iterdir()) if path.is_file()},
            "head_sha256": head,
        }
    )
    contract.save(partial)
    golden = Scorer.load(partial, verify=False).golden_scores(base.golden)
    contract = contract.model_copy(update={"golden": golden})
    contract.save(partial)
    Scorer.load(partial, verify=True)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return contract


def _copy_backbone(source: Path, target: Path, weights: torch.Tensor, attributes: tuple[str, ...]) -> str:
    """Copy a model shard by shard with another head; returns the head's hash."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from rayward.model.weights import HEAD_PREFIX, INDEX_FILE, head_sha256, weight_map

    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (
            CONTRACT_FILE, INDEX_FILE, "training_config.json", "data_manifest.json", "merge.json", REPORT_FILE,
        ):  # fmt: skip
            shutil.copyfile(path, target / path.name)
    files: dict[str, list[str]] = {}
    for name, file in weight_map(source).items():
        if not name.startswith((HEAD_PREFIX, *OTHER_HEADS)):
            files.setdefault(file, []).append(name)
    placed: dict[str, str] = {}
    for index, (file, names) in enumerate(sorted(files.items()), 1):
        # Never `model.safetensors`: Transformers would take it for the whole model and miss the head.
        renamed = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        with safe_open(source / file, framework="pt") as stream:
            save_file({name: stream.get_tensor(name) for name in names}, target / renamed, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, renamed)
    head = {f"{HEAD_PREFIX}weight": weights.float().contiguous()}
    save_file(head, target / HEAD_FILE, metadata={"format": "pt"})
    placed |= dict.fromkeys(head, HEAD_FILE)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    (target / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": placed}, indent=2) + "\n", encoding="utf-8"
    )
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {
        "num_labels": len(attributes),
        "id2label": {str(index): name for index, name in enumerate(attributes)},
        "label2id": {name: index for index, name in enumerate(attributes)},
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return head_sha256(head)
