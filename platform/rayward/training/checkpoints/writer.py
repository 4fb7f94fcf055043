"""The file of one rank, written tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs
from safetensors.torch import save
from torch import Tensor

from rayward.training.checkpoints.format import FileEntry
from rayward.training.engines.protocol import STATE_KINDS, Partition, State, StateKind


def _state_tensors(engine: State) -> Iterator[tuple[str, Partition, StateKind]]:
    for kind in STATE_KINDS:
        for partition in engine.partitions():
            if partition.stop > partition.start:
                yield f"{kind}/{partition.name}", partition, kind


def write_rank_file(filesystem: pafs.FileSystem, path: str, engine: State) -> FileEntry:
    # A safetensors file, tensor by tensor: the host never holds more than one of them.
    header: dict[str, Any] = {}
    offset = 0
    for key, partition, _ in _state_tensors(engine):
        size = 4 * (partition.stop - partition.start)
        header[key] = {"dtype": "F32", "shape": [partition.stop - partition.start], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = hashlib.sha256()
    with filesystem.open_output_stream(path) as stream:
        for piece in (struct.pack("<Q", len(text)), text):
            stream.write(piece)
            state.update(piece)
        for _, partition, kind in _state_tensors(engine):
            data = engine.read_state(partition, kind).float().contiguous().cpu().numpy().data.cast("B")
            stream.write(data)
            state.update(data)
    return FileEntry(num_bytes=8 + len(text) + offset, sha256=state.hexdigest())


def write_buffers_file(filesystem: pafs.FileSystem, path: str, buffers: dict[str, Tensor]) -> FileEntry:
    data = save({name: buffer.detach().cpu().contiguous().clone() for name, buffer in buffers.items()})
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    return FileEntry(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def sha256_of(filesystem: pafs.FileSystem, path: str) -> str:
    state = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 24):
            state.update(chunk)
    return state.hexdigest()
