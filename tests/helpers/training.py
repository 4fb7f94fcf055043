"""A tiny training run in one process, on the plain engine, without prepared files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.helpers.comparisons import VOCAB_SIZE
from transformers import AutoConfig

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout, pack
from rayward.batch.planner import plan_step
from rayward.config.training import TrainingConfig
from rayward.contract.reading import Place
from rayward.data.stream.shares import StepShare
from rayward.model.build import build_reward_model
from rayward.model.reward_model import RewardModel
from rayward.model.weights import RandomInit
from rayward.objectives.table import Objective
from rayward.training.checkpoints.store import CommitDraft
from rayward.training.engines.build import initialize
from rayward.training.engines.torch import TorchEngine
from rayward.training.loop import Schedule, run_steps

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "num_labels": 1,
}
SCHEDULE = Schedule(learning_rate=3e-3, total_steps=20, warmup_fraction=0.1, min_lr_fraction=0.1)


def tiny_model(dtype: torch.dtype = torch.float32, *, with_language: bool = False, **architecture: Any) -> RewardModel:
    """Modules without values, as engines take them."""
    values = {**LLAMA, **architecture}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return build_reward_model(config, max_tokens=256, dtype=dtype, with_language=with_language)


def tiny_engine(*, seed: int = 0, with_language: bool = False, **training: Any) -> TorchEngine:
    """A two-layer llama with seeded weights under the plain engine."""
    settings = TrainingConfig.model_validate({"engine": "torch", "gradient_checkpointing": False, **training})
    engine = TorchEngine(lambda dtype: tiny_model(dtype, with_language=with_language), settings)
    initialize(engine, RandomInit(engine.reward_model.model, seed=seed))
    return engine


def make_shares(
    comparisons: Sequence[EncodedComparison],
    *,
    per_step: int = 8,
    budget: int = 400,
    first_step: int = 0,
    read: Place = "end",
    layout: Layout = "packed",
) -> Iterator[StepShare]:
    """The steps of one rank that is alone."""
    for start in range(first_step * per_step, len(comparisons), per_step):
        members = comparisons[start : start + per_step]
        (plan,) = plan_step(members, world_size=1, tokens_per_microbatch=budget, layout=layout)
        yield StepShare(start // per_step, 0, 1, tuple(pack([members[i] for i in group], layout=layout, read=read) for group in plan))


def train(
    engine: TorchEngine, shares: Iterator[StepShare], objective: Objective, *, first_step: int = 0, stop_step: int = 20
) -> list[dict[str, float]]:
    """Metrics of each step."""
    history: list[dict[str, float]] = []
    run_steps(
        engine,
        shares,
        objective=objective,
        schedule=SCHEDULE,
        first_step=first_step,
        stop_step=stop_step,
        on_step=lambda _step, metrics: history.append(metrics),
    )
    return history


def draft(step: int, *, keep_last: int = 2, accuracy: float | None = None) -> CommitDraft:
    """A commit of this step."""
    return CommitDraft(step=step, total_steps=20, trajectory={"seed": 0}, keep_last=keep_last, validation_accuracy=accuracy)


def steps_in(store_root: str) -> list[int]:
    """Steps that have a directory, committed or not."""
    return sorted(int(path.name.removeprefix("step_")) for path in Path(store_root).glob("step_*"))
