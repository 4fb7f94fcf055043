"""The engine of a run, its initial weights, and what both engines share."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rayward.config.training import TrainingConfig
from rayward.model.weights import WeightSource
from rayward.training.engines.deepspeed import DeepSpeedEngine
from rayward.training.engines.protocol import CPU, Engine, ModelBuilder
from rayward.training.engines.torch import TorchEngine


def initialize(engine: Engine, source: WeightSource) -> None:
    """Fill the weights and persistent buffers of a fresh engine from a source."""
    engine.load_state(lambda p, _kind: source.read(p.name, p.shape, p.start, p.stop), optimizer_steps=0)
    for name, buffer in engine.buffers().items():
        buffer.copy_(source.read(name, tuple(buffer.shape), 0, buffer.numel()).view(buffer.shape))


def build_engine(build: ModelBuilder, config: TrainingConfig, *, device: torch.device | None = None) -> Engine:
    """The engine that `training.engine` names.

    Args:
        device: where this rank computes; None: the first GPU it sees if the configuration gives it one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda", 0) if config.gpus_per_worker > 0 else CPU
    return (TorchEngine if config.engine == "torch" else DeepSpeedEngine)(build, config, device=device)


def pretrained(engine: Engine) -> PreTrainedModel:
    """The Transformers model inside an engine."""
    return engine.reward_model.model
