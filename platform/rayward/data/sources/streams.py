"""Bytes of a source file, decompressed where its name says so."""

from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from rayward import storage
from rayward.data.sources.find import READ_ERRORS, SourceFile
from rayward.errors import DataError

BUFFER_BYTES = 1024 * 1024
BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2", b"\x04\x22\x4d\x18": ".lz4"}
_COLUMNAR = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}


def damaged(file: SourceFile, problem: object) -> DataError:
    """The error of a file that cannot be read to its end."""
    return DataError(f"{file.uri} is damaged or cannot be read: {problem}", remedy="restore the file or remove it from the configuration")


@contextmanager
def open_text(file: SourceFile, start: int = 0) -> Iterator[io.BufferedReader]:
    """The bytes of a file of lines; from `start` on where it is not compressed.

    Raises:
        DataError: it cannot be read, is in an encoding other than UTF-8, or is compressed where its name does not say so.
    """
    try:
        # pyarrow's file is a readable raw stream in all but its declared type.
        with open_plain(file) as plain, io.BufferedReader(_decompressed(plain, file), BUFFER_BYTES) as stream:
            if start:
                plain.seek(start)
            else:
                _refuse_foreign(stream.peek(8)[:8], file)
            yield stream
    except READ_ERRORS as exc:
        raise damaged(file, exc) from exc


def open_plain(file: SourceFile) -> Any:
    """The file's own bytes, which can be sought in."""
    filesystem, path = storage.resolve(file.uri)
    return filesystem.open_input_file(path)


def _decompressed(plain: Any, file: SourceFile) -> Any:
    if file.compression is None:
        return plain
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=io.BufferedReader(plain, BUFFER_BYTES), mode="rb")
    if file.compression == "xz":
        return _XzReader(plain)
    return pa.CompressedInputStream(plain, file.compression) if file.size else io.BytesIO()


class _XzReader(io.RawIOBase):
    """All streams of an .xz or .lzma file; what follows them and is none is damage, and not the end as for `lzma.open`."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder is None:
                self._rest = self._rest.lstrip(b"\0")  # streams may be padded with zeros
                self._rest = self._rest or self._plain.read(BUFFER_BYTES)
                if not self._rest:
                    return 0
                if not self._rest.strip(b"\0"):
                    continue
                self._rest = self._rest.lstrip(b"\0")
                self._decoder = lzma.LZMADecompressor()
            if self._decoder.needs_input and not self._rest:
                self._rest = self._plain.read(BUFFER_BYTES)
                if not self._rest:
                    raise EOFError("the compressed data ends before its end mark")
            data = self._decoder.decompress(self._rest, len(buffer))
            self._rest = b""
            if self._decoder.eof:
                self._rest = self._decoder.unused_data
                self._decoder = None
            if data:
                buffer[: len(data)] = data
                return len(data)


def _refuse_foreign(head: bytes, file: SourceFile) -> None:
    for mark, encoding in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise DataError(f"{file.uri} is {encoding} text", remedy=f"convert it: iconv -f {encoding} -t UTF-8")
    for marks, what in ((_COMPRESSED, "compressed"), (_COLUMNAR, "no text")):
        for mark, suffix in marks.items():
            if head.startswith(mark):
                raise DataError(f"{file.uri} is {what}, which its name does not say", remedy=f"let its name end with {suffix}")
