"""Scoring a data set: Ray Data batch inference with the scorer that serving uses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data

from rayward.cluster import Deferred, actor_options
from rayward.errors import DataError, marking

if TYPE_CHECKING:
    from rayward.scoring.scorer import Device, ScoreItem


ROWS_PER_CALL = 256
"""Rows given to one scorer call; it cuts them into micro-batches by tokens."""

REWARDS_TYPE = pa.list_(pa.float32())


class _ScoreRows:
    # One per actor of the pool: loads the model once.

    def __init__(self, model: str, device: Device, tokens_per_batch: int, verify: bool, options: dict[str, Any]) -> None:
        from rayward.scoring.load import load_scored_model

        self._options = options
        self._scorer = Deferred(lambda: load_scored_model(model, device=device, tokens_per_batch=tokens_per_batch, verify=verify))

    @marking
    def __call__(self, table: pa.Table) -> pa.Table:
        results = self._scorer.get().score(_items(table, self._options))
        rewards = pa.array([r.rewards for r in results], REWARDS_TYPE)
        errors = pa.array([None if r.error is None else f"{r.error.code}: {r.error.message}" for r in results], pa.string())
        return table.append_column("rewards", rewards).append_column("error", errors)


class _FeatureRows:
    # As _ScoreRows; gives the hidden states instead of rewards.

    def __init__(self, model: str, device: Device, tokens_per_batch: int, verify: bool) -> None:
        from rayward.scoring.scorer import Scorer

        self._scorer = Deferred(lambda: Scorer.load(model, device=device, tokens_per_batch=tokens_per_batch, verify=verify))

    @marking
    def __call__(self, table: pa.Table) -> pa.Table:
        from rayward.wire.items import ItemError

        ends: list[Any] = []
        gates: list[Any] = []
        errors: list[str | None] = []
        for found in self._scorer.get().features(_items(table, {})):
            if isinstance(found, ItemError):
                ends.append(None)
                gates.append(None)
                errors.append(f"{found.code}: {found.message}")
            else:
                ends.append(found[:, 0].flatten().numpy())
                gates.append(found[:, 1].flatten().numpy())
                errors.append(None)
        for name, values in (("end_hidden", ends), ("gate_hidden", gates)):
            table = table.append_column(name, pa.array(values, pa.large_list(pa.float32())))
        return table.append_column("error", pa.array(errors, pa.string()))


def _items(table: pa.Table, options: dict[str, Any]) -> list[ScoreItem]:
    from rayward.scoring.scorer import ScoreItem

    items = []
    for prompt, completions in zip(table["prompt_json"].to_pylist(), table["completions_json"].to_pylist(), strict=True):
        turns, texts = _loads(prompt, "prompt_json"), _loads(completions, "completions_json")
        items.append(ScoreItem(prompt=tuple(turns), completions=tuple(texts), **options))
    return items


def feature_dataset(
    dataset: ray.data.Dataset,
    *,
    model: str,
    device: Device = "auto",
    concurrency: int = 1,
    tokens_per_batch: int = 8192,
    gpus_per_actor: float = 0.0,
) -> ray.data.Dataset:
    """Add what a head reads: `end_hidden` and `gate_hidden` (flattened float32 [K, hidden], null with an `error`).

    Args: as `score_dataset`.
    """
    return dataset.map_batches(
        _FeatureRows,
        fn_constructor_args=(model, device, tokens_per_batch, True),
        batch_size=ROWS_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        **actor_options(gpus_per_actor),
    )


def score_dataset(
    dataset: ray.data.Dataset,
    *,
    model: str,
    device: Device = "auto",
    concurrency: int = 1,
    tokens_per_batch: int = 8192,
    gpus_per_actor: float = 0.0,
    verify: bool = True,
    weights: str | None = None,
    n_critiques: int = 1,
    temperature: float = 0.0,
) -> ray.data.Dataset:
    """Add a `rewards` column (list of K finite float32, null where there is none) and an `error` column (`code: message`, or null).

    Args:
        dataset: with columns `prompt_json` (JSON list of turns) and `completions_json` (JSON list of K texts).
        model: directory of an export, or of any Hugging Face sequence-classification model.
        device: of each scorer; `auto` takes CUDA when the actors reserve GPUs.
        concurrency: actors, each holding one scorer.
        tokens_per_batch: token budget of one forward.
        gpus_per_actor: GPUs that each actor reserves.
        verify: check the export against its contract when an actor starts.
        weights: weight set for a model with several outputs; None: the model's own.
        n_critiques, temperature: of a model that writes critiques: the reward is the mean over so many.

    Returns:
        A lazy dataset; row order follows the input when the caller sets `preserve_order`.
    """
    options = {"weights": weights, "n_critiques": n_critiques, "temperature": temperature}
    return dataset.map_batches(
        _ScoreRows,
        fn_constructor_args=(model, device, tokens_per_batch, verify, options),
        batch_size=ROWS_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        **actor_options(gpus_per_actor),
    )


def _loads(text: str, column: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as exc:
        raise DataError(f"column {column} holds {text!r:.80}, which is not JSON", remedy="score prepared rows, or write JSON") from exc
    if not isinstance(value, list):
        raise DataError(f"column {column} holds a {type(value).__name__}; the rule is a list", remedy="write the column as a JSON list")
    return value
