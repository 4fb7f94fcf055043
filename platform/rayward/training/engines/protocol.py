"""What the loop needs of a training engine, and the two that exist: DeepSpeed ZeRO-3 and plain torch.

An engine is three things, each a protocol of its own: it computes (`Compute`), its ranks talk (`Collectives`), and it shows
its state as flat partitions per parameter (`State`), which is all that initialisation, checkpoints and resharding need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rayward.batch.layout import LanguageLossTokens, PackedBatch
from rayward.model.reward_model import RewardModel

StateKind = Literal["weight", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
CPU = torch.device("cpu")
ModelBuilder = Callable[[torch.dtype], RewardModel]


@dataclass(frozen=True, slots=True)
class Partition:
    """This rank's share of one parameter: elements [start, stop) of the flattened tensor (possibly none)."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Compute(Protocol):
    """The model and its optimizer; every method is called by all ranks in the same order."""

    device: torch.device
    reward_model: RewardModel

    def forward(self, batch: PackedBatch) -> Tensor:
        """Outputs where the batch is read, float32 [R, outputs]."""
        ...

    def forward_with_language_loss(self, batch: PackedBatch, tokens: LanguageLossTokens) -> tuple[Tensor, Tensor]:
        """The outputs, and the summed language-model loss of these tokens."""
        ...

    def forward_with_routing(self, batch: PackedBatch, tokens: LanguageLossTokens | None) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, the language-model loss (0 without tokens), and what the routers did, float32 [2, experts]."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate gradients; the gradient of the step is the sum over micro-batches and data-parallel ranks."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, apply, clear; returns the global gradient norm before clipping (inf or NaN: nothing usable was applied)."""
        ...


class Collectives(Protocol):
    """Who this process is, and what the ranks tell each other.

    Attributes:
        rank, world_size: of all processes; the files of a checkpoint go by them.
        data_parallel_rank, data_parallel_size: of those processes that compute different comparisons; whatever divides work
            asks for them.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; also a barrier."""
        ...


class State(Protocol):
    """Weights and moments as flat partitions per parameter."""

    def partitions(self) -> list[Partition]:
        """This rank's share of every parameter, in model order."""
        ...

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of the model, whole on every rank; they are no parameters, and state all the same."""
        ...

    def read_state(self, partition: Partition, kind: StateKind) -> Tensor:
        """Flat fp32 values of one partition."""
        ...

    def load_state(self, read: Callable[[Partition, StateKind], Tensor], *, optimizer_steps: int) -> None:
        """Overwrite weights and, when optimizer_steps > 0, the moments."""
        ...


class SharedState(Collectives, State, Protocol):
    """What a checkpoint is written from and read into: the state of all ranks, without anything that computes."""


class Engine(Compute, SharedState, Protocol):
    """What a training session needs: all three."""
