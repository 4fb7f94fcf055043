"""Lines of a stream, however they come: bounded in size, and as many together as are there. No Ray and no torch."""

from __future__ import annotations

import gzip
import io
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from rayward.errors import DataError
from rayward.wire.lines import BOM

T = TypeVar("T")

CHUNK_ROWS = 256
"""Lines that are scored together at most."""

CHUNK_BYTES = 8 * 1024 * 1024
"""The same, in bytes; a longer line stands alone."""

GZIP_MAGIC = b"\x1f\x8b"
OTHER_FORMS = {
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x28\xb5\x2f\xfd": "compressed with zstd", b"\xfd7zXZ": "compressed with xz",
    b"BZh9": "compressed with bzip2", b"PAR1": "Parquet",
}  # fmt: skip
"""How a stream begins that holds no lines."""


def read_lines(stream: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    """The lines of a stream without their ends, blank ones too; what is compressed with gzip is unpacked.

    Of a line with more than `max_bytes`, the beginning is given (longer than `max_bytes`) and the rest is passed over.

    Raises:
        DataError: the stream cannot be read, or holds no lines.
    """
    # Not wrapped otherwise: a buffer around a pipe would wait for more than one line.
    head = stream.readline(max_bytes + 2)
    for magic, form in OTHER_FORMS.items():
        # Two bytes alone may be one damaged line.
        if head.startswith(magic) and (form != "UTF-16" or b"\x00" in head):
            raise DataError(f"the input is {form}; the rule is JSON lines in UTF-8, also with gzip", remedy="give the name of the file")
    if head.startswith(GZIP_MAGIC):
        stream, head = gzip.GzipFile(fileobj=_Continued(head, stream)), b""  # type: ignore[assignment]
    try:
        line = head or stream.readline(max_bytes + 2)
        while line:
            whole = line
            while line and not line.endswith(b"\n"):
                line = stream.readline(1024 * 1024)
                if len(whole) <= max_bytes:
                    whole += line
            yield whole.rstrip(b"\r\n")
            line = stream.readline(max_bytes + 2)
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"the input cannot be read: {exc}", remedy="check that it is whole") from exc


class _Continued(io.RawIOBase):
    """Bytes, and then what a stream has after them."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._stream.read(size)
        found = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(found) :]
        return found


def numbered(lines: Iterable[str | bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(lines, 1):
        # Whatever a text holds stays an error of its own line.
        content = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
        content = content.removeprefix(BOM).strip()
        if content:
            yield number, content


def together(entries: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The entries in order, as many together as one call of a model takes."""
    chunk: list[T] = []
    total = 0
    for entry in entries:
        if chunk and (len(chunk) == CHUNK_ROWS or total + size(entry) > CHUNK_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append(entry)
        total += size(entry)
    if chunk:
        yield chunk


def chunks(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines in order, many together."""
    return together(lines, lambda line: len(line[1]))


def ready_chunks(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """The same without waiting for company: what has come while the last chunk was worked on. Who writes a line and waits is answered.

    Raises:
        Exception: what reading the lines raised, after the lines before it.
    """
    waiting: queue.Queue[tuple[int, bytes] | BaseException | None] = queue.Queue(2 * CHUNK_ROWS)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
        # Whatever it is, it is raised where the lines are wanted.
        except BaseException as exc:
            waiting.put(exc)
        else:
            waiting.put(None)

    threading.Thread(target=read, name="lines", daemon=True).start()
    end: tuple[int, bytes] | BaseException | None = (0, b"")
    while isinstance(end, tuple):
        end = waiting.get()
        chunk: list[tuple[int, bytes]] = []
        size = 0
        while isinstance(end, tuple):
            chunk.append(end)
            size += len(end[1])
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
                break
            try:
                end = waiting.get_nowait()
            except queue.Empty:
                break
        if chunk:
            yield chunk
    if end is not None:
        raise end
