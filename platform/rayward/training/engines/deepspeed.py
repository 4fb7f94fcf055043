"""DeepSpeed ZeRO-3."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rayward.batch.layout import LanguageLossTokens, PackedBatch
from rayward.config.training import TrainingConfig
from rayward.model.reward_model import RewardModel, language_loss_tensors, to_tensors
from rayward.model.weights import persistent_buffers
from rayward.training.engines.operator import load_operator
from rayward.training.engines.optimizer import adamw, prepare_model
from rayward.training.engines.protocol import CPU, STATE_KINDS, ModelBuilder, Partition, StateKind


class DeepSpeedEngine:
    """ZeRO-3: parameters, gradients and optimizer state partitioned over the ranks; gloo and fp32 on CPU, NCCL and bf16 on CUDA.

    The process group must exist (Ray Train sets it up); `init_process_group` makes one for use without Ray.
    """

    def __init__(self, build: ModelBuilder, config: TrainingConfig, *, device: torch.device = CPU) -> None:
        import deepspeed
        import torch._dynamo  # imported lazily inside zero.Init it fails on the patched Tensor.__new__
        from torch import distributed

        self._distributed = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        # Every rank computes comparisons of its own: nothing but the data is divided.
        self.data_parallel_rank, self.data_parallel_size = self.rank, self.world_size
        self.device, on_cuda = device, device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        settings = deepspeed_settings(config, bf16=on_cuda)
        if not on_cuda:
            load_operator()
        deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
        # No dtype argument: DeepSpeed 0.19 mistakes an explicit float32 for "any 16-bit type". The settings decide.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            self.reward_model = build(torch.bfloat16 if on_cuda else torch.float32)
        prepare_model(self.reward_model, config)
        optimizer = adamw(self.reward_model, config)
        self._engine, self._zero, _, _ = deepspeed.initialize(model=self.reward_model, optimizer=optimizer, config=settings)
        _restore_buffers(self.reward_model, build, self.device)
        # Any: DeepSpeed hangs its own attributes (ds_tensor, ds_numel, ds_shape) on parameters.
        self._parameters: dict[str, Any] = dict(self.reward_model.model.named_parameters())

    def forward(self, batch: PackedBatch) -> Tensor:
        return cast(Tensor, self._engine(to_tensors(batch, self.device)))

    def forward_with_language_loss(self, batch: PackedBatch, tokens: LanguageLossTokens) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self._engine(to_tensors(batch, self.device), language_loss_tensors(tokens, self.device)))

    def forward_with_routing(self, batch: PackedBatch, tokens: LanguageLossTokens | None) -> tuple[Tensor, Tensor, Tensor]:
        covered = None if tokens is None else language_loss_tensors(tokens, self.device)
        return cast(tuple[Tensor, Tensor, Tensor], self._engine(to_tensors(batch, self.device), covered, with_routing=True))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # DeepSpeed averages over the data-parallel ranks; the loop's loss is already divided by the global count.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.data_parallel_size)

    def step(self, learning_rate: float) -> float:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def all_reduce(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        self._distributed.all_reduce(values)
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        self._distributed.all_gather_object(gathered, value)
        return gathered

    def partitions(self) -> list[Partition]:
        result = []
        for name, parameter in self._parameters.items():
            size, numel = parameter.ds_tensor.numel(), parameter.ds_numel
            start = min(self.rank * size, numel)
            result.append(Partition(name, tuple(parameter.ds_shape), start, min(start + size, numel)))
        return result

    def buffers(self) -> dict[str, Tensor]:
        return persistent_buffers(self.reward_model.model)

    def read_state(self, partition: Partition, kind: StateKind) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._parameters[partition.name]
        values = safe_get_local_fp32_param(parameter) if kind == "weight" else safe_get_local_optimizer_state(parameter, kind)
        return cast(Tensor, values)[: partition.stop - partition.start].detach()

    def load_state(self, read: Callable[[Partition, StateKind], Tensor], *, optimizer_steps: int) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self._zero.checkpoint_event_prologue()
        if optimizer_steps:
            for flat in self._zero.fp32_partitioned_groups_flat:
                self._zero.optimizer.state[flat] = {
                    "step": torch.tensor(float(optimizer_steps), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                }
        with torch.no_grad():
            for partition in self.partitions():
                parameter = self._parameters[partition.name]
                padded = torch.zeros(parameter.ds_tensor.numel())
                padded[: partition.stop - partition.start] = read(partition, "weight")
                safe_set_local_fp32_param(parameter, padded.to(self.device))
                parameter.ds_tensor.data.copy_(padded)
                if optimizer_steps:
                    for kind in STATE_KINDS[1:]:
                        padded = torch.zeros(parameter.ds_tensor.numel())
                        padded[: partition.stop - partition.start] = read(partition, kind)
                        safe_set_local_optimizer_state(parameter, padded.to(self.device), kind)
        self._zero.checkpoint_event_epilogue()


def _restore_buffers(model: RewardModel, build: ModelBuilder, device: torch.device) -> None:
    # In bf16 mode DeepSpeed casts buffers too: rotary frequencies would be off by 1e-3, and the trained score would not be the
    # served one. A twin without parameter storage computes them in fp32.
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        twin = build(torch.float32)
    modules = dict(model.named_modules())
    for path, module in twin.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                modules[path]._buffers[name] = buffer.to(device)


def deepspeed_settings(config: TrainingConfig, *, bf16: bool) -> dict[str, Any]:
    """The DeepSpeed configuration: ZeRO-3, fp32 gradient accumulation and reduction, the step boundary set by the loop."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 3, "contiguous_gradients": True, "overlap_comm": bf16},
    }
    if bf16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def init_process_group(*, rank: int, world_size: int, master_port: int, timeout_s: float = 300.0) -> None:
    """Set up gloo on this machine without Ray, for tests, benchmarks and debugging."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port)
    )
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s))
