"""What the loop needs of a training engine, and the two that exist: DeepSpeed ZeRO-3 and plain torch.

An engine owns the model, the optimizer and the collectives. It exposes its state as flat partitions per parameter, which
is all that initialisation, checkpoints and resharding need.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayward.config import TrainingConfig
from rayward.data.packing import PackedBatch, TaughtTokens
from rayward.model.loading import WeightSource
from rayward.model.reward_model import RewardModel, taught_tensors, to_tensors

StateKind = Literal["weight", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
ModelBuilder = Callable[[torch.dtype], RewardModel]


@dataclass(frozen=True, slots=True)
class Partition:
    """This rank's share of one parameter: elements [start, stop) of the flattened tensor (possibly none)."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Engine(Protocol):
    """The verbs of the training loop; every method is called by all ranks in the same order."""

    rank: int
    world_size: int
    device: torch.device
    reward_model: RewardModel

    def forward(self, batch: PackedBatch) -> Tensor:
        """Outputs where the batch is read, float32 [R, outputs]."""
        ...

    def forward_taught(self, batch: PackedBatch, taught: TaughtTokens) -> tuple[Tensor, Tensor]:
        """The outputs, and the summed language-model loss of these tokens."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate gradients; the gradient of the step is the sum over micro-batches and ranks."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, apply, clear; returns the global gradient norm before clipping (inf or NaN: nothing usable was applied)."""
        ...

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; also a barrier."""
        ...

    def partitions(self) -> list[Partition]:
        """This rank's share of every parameter, in model order."""
        ...

    def read_state(self, partition: Partition, kind: StateKind) -> Tensor:
        """Flat fp32 values of one partition."""
        ...

    def load_state(self, read: Callable[[Partition, StateKind], Tensor], *, optimizer_steps: int) -> None:
        """Overwrite weights and, when optimizer_steps > 0, the moments."""
        ...


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and other vectors do not."""
    shape_of = {id(p): tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    matrices = [p for p in model.parameters() if len(shape_of[id(p)]) >= 2]
    vectors = [p for p in model.parameters() if len(shape_of[id(p)]) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(model: RewardModel, config: TrainingConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def initialize(engine: Engine, source: WeightSource) -> None:
    """Fill the weights of a fresh engine from a source."""
    engine.load_state(lambda p, _kind: source.read(p.name, p.shape, p.start, p.stop), optimizer_steps=0)


def _prepare_model(model: RewardModel, config: TrainingConfig) -> None:
    # Training mode is what gradient checkpointing looks at; every dropout probability is 0 (resolve_hf_config).
    model.train()
    if config.gradient_checkpointing:
        # Reentrant checkpointing breaks ZeRO-3 when forwards and backwards interleave.
        model.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


class TorchEngine:
    """One process, fp32 parameters, torch AdamW: the yardstick for tests and benchmarks."""

    def __init__(self, build: ModelBuilder, config: TrainingConfig) -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")
        self.reward_model = build(torch.float32).to(self.device)
        _prepare_model(self.reward_model, config)
        self._clip_norm = config.clip_norm
        self._parameters = dict(self.reward_model.model.named_parameters())
        self._optimizer = _adamw(self.reward_model, config)

    def forward(self, batch: PackedBatch) -> Tensor:
        return cast(Tensor, self.reward_model(to_tensors(batch, self.device)))

    def forward_taught(self, batch: PackedBatch, taught: TaughtTokens) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.reward_model(to_tensors(batch, self.device), taught_tensors(taught, self.device)))

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


class DeepSpeedEngine:
    """ZeRO-3: parameters, gradients and optimizer state partitioned over the ranks; gloo and fp32 on CPU, NCCL and bf16 on CUDA.

    The process group must exist (Ray Train sets it up); `init_process_group` makes one for use without Ray.
    """

    def __init__(self, build: ModelBuilder, config: TrainingConfig) -> None:
        import deepspeed
        import torch._dynamo  # imported lazily inside zero.Init it fails on the patched Tensor.__new__
        from torch import distributed

        self._distributed = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        on_cuda = config.gpus_per_worker > 0
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        settings = deepspeed_settings(config, bf16=on_cuda)
        deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
        # No dtype argument: DeepSpeed 0.19 mistakes an explicit float32 for "any 16-bit type". The settings decide.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            self.reward_model = build(torch.bfloat16 if on_cuda else torch.float32)
        _prepare_model(self.reward_model, config)
        optimizer = _adamw(self.reward_model, config)
        self._engine, self._zero, _, _ = deepspeed.initialize(model=self.reward_model, optimizer=optimizer, config=settings)
        _restore_buffers(self.reward_model, build, self.device)
        # Any: DeepSpeed hangs its own attributes (ds_tensor, ds_numel, ds_shape) on parameters.
        self._parameters: dict[str, Any] = dict(self.reward_model.model.named_parameters())

    def forward(self, batch: PackedBatch) -> Tensor:
        return cast(Tensor, self._engine(to_tensors(batch, self.device)))

    def forward_taught(self, batch: PackedBatch, taught: TaughtTokens) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self._engine(to_tensors(batch, self.device), taught_tensors(taught, self.device)))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # DeepSpeed averages over ranks; the loop's loss is already divided by the global count.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world_size)

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


def build_engine(build: ModelBuilder, config: TrainingConfig) -> Engine:
    """The engine that `training.engine` names."""
    return TorchEngine(build, config) if config.engine == "torch" else DeepSpeedEngine(build, config)


def pretrained(engine: Engine) -> PreTrainedModel:
    """The Transformers model inside an engine."""
    return engine.reward_model.model
