"""The model and AdamW as both engines set them up."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from rayward.config.training import TrainingConfig
from rayward.model.reward_model import RewardModel

logger = logging.getLogger(__name__)


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
    if config.gradient_checkpointing and not model.model.supports_gradient_checkpointing:
        logger.warning("%s has no gradient checkpointing: activations are kept in memory", type(model.model).__name__)
    elif config.gradient_checkpointing:
        # Reentrant checkpointing breaks ZeRO-3 when forwards and backwards interleave.
        model.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    set_training_mode(model)


def set_training_mode(model: RewardModel) -> None:
    """Evaluation mode, but for gradient checkpointing, which looks at `training`: the trained forward is the served one.

    Some modules compute something else in training mode (routers that sample their experts), and dropout is not all of it.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
