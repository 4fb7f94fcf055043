"""The plain torch engine: one worker, for comparison and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rayward.batch.layout import LanguageLossTokens, PackedBatch
from rayward.config.training import TrainingConfig
from rayward.model.reward_model import language_loss_tensors, to_tensors
from rayward.model.weights import persistent_buffers
from rayward.training.engines.optimizer import adamw, prepare_model
from rayward.training.engines.protocol import CPU, STATE_KINDS, ModelBuilder, Partition, StateKind


class TorchEngine:
    """One process, fp32 parameters, torch AdamW: the yardstick for tests and benchmarks."""

    def __init__(self, build: ModelBuilder, config: TrainingConfig, *, device: torch.device = CPU) -> None:
        self.rank, self.world_size = 0, 1
        self.data_parallel_rank, self.data_parallel_size = 0, 1
        self.device = device
        self.reward_model = build(torch.float32).to(self.device)
        prepare_model(self.reward_model, config)
        self._clip_norm = config.clip_norm
        self._parameters = dict(self.reward_model.model.named_parameters())
        self._optimizer = adamw(self.reward_model, config)

    def forward(self, batch: PackedBatch) -> Tensor:
        return cast(Tensor, self.reward_model(to_tensors(batch, self.device)))

    def forward_with_language_loss(self, batch: PackedBatch, tokens: LanguageLossTokens) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.reward_model(to_tensors(batch, self.device), language_loss_tensors(tokens, self.device)))

    def forward_with_routing(self, batch: PackedBatch, tokens: LanguageLossTokens | None) -> tuple[Tensor, Tensor, Tensor]:
        covered = None if tokens is None else language_loss_tensors(tokens, self.device)
        return cast(tuple[Tensor, Tensor, Tensor], self.reward_model(to_tensors(batch, self.device), covered, with_routing=True))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.reward_model.parameters(), self._clip_norm))
        if torch.isfinite(torch.tensor(norm)):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def partitions(self) -> list[Partition]:
        return [Partition(name, tuple(p.shape), 0, p.numel()) for name, p in self._parameters.items()]

    def buffers(self) -> dict[str, Tensor]:
        return persistent_buffers(self.reward_model.model)

    def read_state(self, partition: Partition, kind: StateKind) -> Tensor:
        parameter = self._parameters[partition.name]
        tensor = parameter.detach() if kind == "weight" else self._optimizer.state[parameter][kind]
        return tensor.float().reshape(-1)

    def load_state(self, read: Callable[[Partition, StateKind], Tensor], *, optimizer_steps: int) -> None:
        with torch.no_grad():
            for partition in self.partitions():
                parameter = self._parameters[partition.name]
                parameter.copy_(read(partition, "weight").view_as(parameter))
                if optimizer_steps:
                    moments = {kind: read(partition, kind).view_as(parameter).to(self.device) for kind in STATE_KINDS[1:]}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(optimizer_steps)), **moments}
