"""Ranged reads from a committed checkpoint."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.fs as pafs
import torch
from safetensors.torch import load
from torch import Tensor

from rayward.errors import CheckpointError
from rayward.training.checkpoints.format import BUFFERS_FILE, CommittedCheckpoint
from rayward.training.engines.protocol import StateKind

MAX_OPEN_FILES = 32
"""Rank files held open at once: a checkpoint of 1,024 ranks would reach a process's usual limit of descriptors."""


class CheckpointReader:
    """Ranged reads from a committed checkpoint; a `WeightSource`, and a context manager that closes its files."""

    def __init__(self, filesystem: pafs.FileSystem, checkpoint: CommittedCheckpoint) -> None:
        self._filesystem = filesystem
        self._directory = checkpoint.directory
        self.commit = checkpoint.commit
        self._open: OrderedDict[int, pa.NativeFile] = OrderedDict()
        self._headers: dict[int, tuple[int, dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; a later read opens what it needs again."""
        while self._open:
            self._open.popitem()[1].close()

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int, kind: StateKind = "weight") -> Tensor:
        """Elements [start, stop) of a parameter or of one of its moments, whatever ranks hold them."""
        entry = self.commit.parameters.get(name)
        if entry is None or entry.shape != shape:
            raise CheckpointError(
                f"checkpoint {self._directory} has {name} with shape {entry and entry.shape}; the model needs {shape}",
                remedy="resume with the configuration that the run was started with, or use another run.name",
            )
        size = entry.partition_size
        pieces = []
        for rank in range(start // size, -(-stop // size)) if stop > start else ():
            first, last = max(start, rank * size), min(stop, (rank + 1) * size)
            pieces.append(self._elements(rank, f"{kind}/{name}", first - rank * size, last - rank * size))
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of the model; none in a checkpoint of a model without any."""
        if BUFFERS_FILE not in self.commit.files:
            return {}
        with self._filesystem.open_input_stream(f"{self._directory}/{BUFFERS_FILE}") as stream:
            return load(stream.read())

    def _elements(self, rank: int, key: str, first: int, last: int) -> Tensor:
        file = self._file(rank)
        if rank not in self._headers:
            (length,) = struct.unpack("<Q", file.read_at(8, 0))
            self._headers[rank] = 8 + length, json.loads(bytes(file.read_at(length, 8)))
        base, header = self._headers[rank]
        offset = base + header[key]["data_offsets"][0] + 4 * first
        return torch.frombuffer(bytearray(file.read_at(4 * (last - first), offset)), dtype=torch.float32)

    def _file(self, rank: int) -> pa.NativeFile:
        # The one that was not used for longest makes room.
        if rank in self._open:
            self._open.move_to_end(rank)
            return self._open[rank]
        if len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[rank] = self._filesystem.open_input_file(f"{self._directory}/rank_{rank:05d}.safetensors")
        return self._open[rank]
