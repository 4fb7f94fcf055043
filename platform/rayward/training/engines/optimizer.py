"""The model and AdamW as both engines set them up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayward.config.training import TrainingConfig
from rayward.model.reward_model import RewardModel


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and other vectors do not."""
    shape_of = {id(p): tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    matrices = [p for p in model.parameters() if len(shape_of[id(p)]) >= 2]
    vectors = [p for p in model.parameters() if len(shape_of[id(p)]) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(model: RewardModel, config: TrainingConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def prepare_model(model: RewardModel, config: TrainingConfig) -> None:
    # Training mode is what gradient checkpointing looks at; every dropout probability is 0 (resolve_hf_config).
    model.train()
    if config.gradient_checkpointing:
        # Reentrant checkpointing breaks ZeRO-3 when forwards and backwards interleave.
        model.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
