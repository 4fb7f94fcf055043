"""Source files: find them (paths, globs, directories, URIs, hub names), sample them, read them row by row.

Numbers of rows are 1-based: the line of a JSON-lines file, the element of a JSON list, the row of a Parquet file.
Blank lines are not rows. No Ray here: `prepare` runs `read_unit` inside its tasks.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayward import storage
from rayward.data.record import BadRow
from rayward.data.sources.find import READ_ERRORS, SourceFile
from rayward.errors import DataError

UNIT_BYTES = 64 * 1024 * 1024
WHOLE_HASH_BYTES = 256 * 1024 * 1024
BATCH_ROWS = 1000
SAMPLE_ROWS = 100
SAMPLE_SCAN = 2000


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """The part of a file that one task reads: a whole JSON file, or some row groups of a Parquet file; no row after `last_number`."""

    file: SourceFile
    row_groups: tuple[int, ...] = ()
    first_number: int = 1
    last_number: int | None = None


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as JSON text, or what is wrong with it."""

    number: int
    raw: str
    reason: BadRow | None = None
    detail: str = ""


def content_hash(file: SourceFile) -> str:
    """Hash of a file's bytes; beyond 256 MiB of its size, modification time and first and last MiB.

    Raises:
        DataError: the file cannot be read.
    """
    filesystem, path = storage.resolve(file.uri)
    state = hashlib.blake2b(str(file.size).encode(), digest_size=16)
    edge = 1024 * 1024
    try:
        with filesystem.open_input_file(path) as stream:
            if file.size <= WHOLE_HASH_BYTES:
                while chunk := stream.read(8 * edge):
                    state.update(chunk)
            else:
                state.update(str(filesystem.get_file_info(path).mtime_ns).encode())
                state.update(stream.read(edge))
                stream.seek(file.size - edge)
                state.update(stream.read(edge))
    except READ_ERRORS as exc:
        raise _damaged(file, exc) from exc
    return state.hexdigest()


def plan_units(file: SourceFile) -> list[ReadUnit]:
    """Split a file into parts that tasks read in parallel.

    Raises:
        DataError: a Parquet file has no readable footer.
    """
    if file.kind == "json":
        return [ReadUnit(file)]
    try:
        with _open(file) as stream:
            metadata = pq.ParquetFile(stream).metadata
            units: list[ReadUnit] = []
            groups: list[int] = []
            number, size, first = 1, 0, 1
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                groups.append(index)
                number, size = number + group.num_rows, size + group.total_byte_size
                if size >= UNIT_BYTES or index == metadata.num_row_groups - 1:
                    units.append(ReadUnit(file, tuple(groups), first))
                    groups, size, first = [], 0, number
            return units
    except READ_ERRORS as exc:
        raise _damaged(file, exc) from exc


def read_unit(unit: ReadUnit) -> Iterator[RawRow]:
    """The rows of one unit, in order, in bounded memory (a JSON list is the exception: it is parsed as a whole).

    Raises:
        DataError: the file is truncated or damaged; the rows before the damage may have been yielded.
    """
    try:
        with _open(unit.file) as stream:
            yield from _parquet_rows(stream, unit) if unit.file.kind == "parquet" else _json_rows(stream, unit.file)
    except READ_ERRORS as exc:
        raise _damaged(unit.file, exc) from exc


def sample_rows(file: SourceFile) -> tuple[list[dict[str, Any]], int]:
    """The first rows that are JSON objects, for format detection, and how many rows were looked at.

    Raises:
        DataError: the file is truncated or damaged.
    """
    rows: list[dict[str, Any]] = []
    seen = 0
    for unit in plan_units(file):
        for raw in read_unit(unit):
            seen += 1
            try:
                value = json.loads(raw.raw) if raw.reason is None else None
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                rows.append(value)
            if len(rows) >= SAMPLE_ROWS or seen >= SAMPLE_SCAN:
                return rows, seen
    return rows, seen


def _open(file: SourceFile) -> IO[bytes]:
    filesystem, path = storage.resolve(file.uri)
    # pyarrow's file is a readable raw stream in all but its declared type.
    plain: Any = filesystem.open_input_file(path)
    if file.kind == "parquet":
        return plain  # type: ignore[no-any-return]
    return gzip.open(plain) if file.gzip else io.BufferedReader(plain)  # type: ignore[return-value]


def _damaged(file: SourceFile, exc: BaseException) -> DataError:
    return DataError(f"{file.uri} is damaged or cannot be read: {exc}", remedy="restore the file or remove it from the configuration")


def _json_rows(stream: IO[bytes], file: SourceFile) -> Iterator[RawRow]:
    may_be_list = file.uri.lower().removesuffix(".gz").endswith(".json")
    for number, line in enumerate(stream, 1):
        text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
        if not text:
            continue
        if may_be_list and text.startswith(b"["):
            yield from _json_list(text + b"\n" + stream.read(), file)
            return
        may_be_list = False
        try:
            yield RawRow(number, text.decode("utf-8"))
        except UnicodeDecodeError as exc:
            yield RawRow(number, text.decode("utf-8", "backslashreplace"), BadRow.UNPARSABLE, f"the line is not UTF-8: {exc.reason}")


def _json_list(text: bytes, file: SourceFile) -> Iterator[RawRow]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _damaged(file, exc) from exc
    for number, value in enumerate(values, 1):
        yield RawRow(number, json.dumps(value))


def _parquet_rows(stream: IO[bytes], unit: ReadUnit) -> Iterator[RawRow]:
    number = unit.first_number
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS, row_groups=list(unit.row_groups)):
        try:
            texts: list[str | Exception] = [json.dumps(row, default=_foreign) for row in batch.to_pylist()]
        except ValueError:
            texts = [_parquet_row(batch, index) for index in range(batch.num_rows)]
        for text in texts:
            if isinstance(text, str):
                yield RawRow(number, text)
            else:
                yield RawRow(number, "", BadRow.UNPARSABLE, f"a value of the row cannot be read: {text}")
            number += 1


def _parquet_row(batch: pa.RecordBatch, index: int) -> str | Exception:
    try:
        return json.dumps(batch.slice(index, 1).to_pylist()[0], default=_foreign)
    except ValueError as exc:  # text that is not UTF-8, a date out of range
        return exc


def _foreign(value: object) -> dict[str, str]:
    # Bytes, dates and decimals of columns that nobody uses; a column that is used reports a wrong type.
    return {"unsupported": type(value).__name__}
