"""What a file holds, as a hash: the content as far as that is cheap, else what changes when the content does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rayward import storage
from rayward.data.sources.find import READ_ERRORS, SourceFile
from rayward.data.sources.streams import damaged, open_plain

WHOLE_BYTES = 256 * 1024 * 1024
"""Files of so many bytes together are hashed whole, so that copies of them are the same data; the driver alone reads them."""
SAMPLE_BYTES = 64 * 1024
SAMPLES = 16
_THREADS = 8


def content_hashes(files: Sequence[SourceFile]) -> list[str]:
    """A hash for each file: of all bytes while the files together are small.

    Beyond that, of its size, 16 pieces of 64 KiB (first, last and evenly between) and the version that its filesystem gives it (time of
    the last change, or an object's tag): a change that the pieces miss is not missed, and a copy with another time is other data.

    Raises:
        DataError: a file cannot be read.
    """
    whole = sum(file.size for file in files) <= WHOLE_BYTES
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda file: content_hash(file, whole=whole), files))


def content_hash(file: SourceFile, *, whole: bool = True) -> str:
    """Hash of a file's bytes, or of pieces of them and its version.

    Raises:
        DataError: the file cannot be read.
    """
    state = hashlib.blake2b(str(file.size).encode(), digest_size=16)
    try:
        with open_plain(file) as stream:
            if whole or file.size <= SAMPLES * SAMPLE_BYTES:
                while chunk := stream.read(16 * SAMPLE_BYTES):
                    state.update(chunk)
            else:
                state.update(storage.version(*storage.resolve(file.uri)).encode())
                for index in range(SAMPLES):
                    stream.seek(index * (file.size - SAMPLE_BYTES) // (SAMPLES - 1))
                    state.update(stream.read(SAMPLE_BYTES))
    except READ_ERRORS as exc:
        raise damaged(file, exc) from exc
    return state.hexdigest()
