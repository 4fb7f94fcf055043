"""Several ranks of a training engine as threads of one process, for what has nothing to compute: checkpoints and resharding."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayward.training.engines.protocol import Partition, StateKind

State = dict[tuple[str, StateKind], Tensor]
T = TypeVar("T")


class Group:
    """The collectives of `world_size` threads."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._slots: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size)

    def all_gather_object(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait(timeout=30)
        gathered = list(self._slots)
        self._barrier.wait(timeout=30)
        return gathered

    def run(self, call: Callable[[int], T]) -> list[T]:
        """`call(rank)` on every rank at once."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(call, range(self.world_size)))


class PartitionedEngine:
    """This rank's part of every parameter, without a model: cut as ZeRO-3 cuts, equal ceilings, the last ranks shorter or empty.

    Args:
        shapes: of the whole parameters.
        state: flat whole tensors to cut from; None until `load_state`.
        full_disk: reading the state fails as writing to a full disk does.
    """

    def __init__(
        self, group: Group, rank: int, shapes: Mapping[str, tuple[int, ...]], state: State | None, *, full_disk: bool = False
    ) -> None:
        self.rank, self.world_size = rank, group.world_size
        self.data_parallel_rank, self.data_parallel_size = rank, group.world_size
        self._group, self._shapes, self._full_disk = group, shapes, full_disk
        self.local: State = {}
        self.optimizer_steps: int | None = None
        for (name, kind), values in (state or {}).items():
            part = next(p for p in self.partitions() if p.name == name)
            self.local[name, kind] = values[part.start : part.stop].clone()

    def all_reduce(self, values: Tensor) -> Tensor:
        gathered: Tensor = torch.stack(self.all_gather_object(values)).sum(0)
        return gathered

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._group.all_gather_object(self.rank, value)

    def partitions(self) -> list[Partition]:
        result = []
        for name, shape in self._shapes.items():
            numel = math.prod(shape)
            size = -(-numel // self.world_size)
            result.append(Partition(name, shape, min(self.rank * size, numel), min((self.rank + 1) * size, numel)))
        return result

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def read_state(self, partition: Partition, kind: StateKind) -> Tensor:
        if self._full_disk:
            raise OSError(28, "No space left on device")
        return self.local[partition.name, kind]

    def load_state(self, read: Callable[[Partition, StateKind], Tensor], *, optimizer_steps: int) -> None:
        kinds: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
        self.optimizer_steps = optimizer_steps
        self.local = {(p.name, kind): read(p, kind) for p in self.partitions() for kind in kinds}
