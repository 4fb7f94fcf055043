"""What identifies weights that came without a contract: a hash of their files, read in part or in whole. Light."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

WEIGHT_FILES = ("*.safetensors",)
"""What is read; weights in other formats are not."""
TENSOR_BYTES = 4096
"""Read from the middle of each tensor of a safetensors file."""
NUM_BLOCKS, BLOCK_BYTES = 64, 64 * 1024
"""Evenly spaced blocks that are read of a file without a header."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def weights_identity(directory: Path, *, full: bool = False) -> str:
    """Hex hash of the weight files of a directory; their names in it count, its place does not.

    Full, it covers every byte, as loading reads every byte. Sampled, it covers size and header of every file and a piece of every tensor:
    another training run changes every tensor that it trains, so this tells models apart at the cost of a few MB per file. It can miss a
    change of a few values.

    Raises:
        OSError: a file cannot be read.
    """
    state = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHT_FILES for path in directory.glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as stream:
            if full:
                content = hashlib.file_digest(stream, "sha256").digest()
            else:
                sample = hashlib.sha256()
                for start, length in _places(stream, size):
                    stream.seek(start)
                    sample.update(stream.read(length))
                content = sample.digest()
        state.update(json.dumps([path.name, size, content.hex()]).encode())
    return state.hexdigest()


def _places(stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    # Start and length of what is read: the header and the middle of every tensor; evenly spaced blocks where there is no header.
    begin, tensors = _header(stream, size)
    if tensors:
        yield 0, begin
        for start, stop in tensors:
            length = min(TENSOR_BYTES, stop - start)
            yield begin + start + (stop - start - length) // 2, length
    elif size <= NUM_BLOCKS * BLOCK_BYTES:
        yield 0, size
    else:
        for index in range(NUM_BLOCKS):
            yield index * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1), BLOCK_BYTES


def _header(stream: BinaryIO, size: int) -> tuple[int, list[tuple[int, int]]]:
    # Where the data of a safetensors file begins, and each tensor's range in it; no tensors where the file has no such header.
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        return 0, []
    try:
        entries = json.loads(stream.read(length))
        ranges = [tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"]
        tensors = sorted((int(start), int(stop)) for start, stop in ranges)
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0, []
    fits = all(0 <= start <= stop <= size - 8 - length for start, stop in tensors)
    return 8 + length, tensors if fits else []
