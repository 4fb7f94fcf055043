"""Parquet and Arrow files: rows of typed columns as plain JSON values."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from rayward import storage
from rayward.data.record import BadRow
from rayward.data.sources.find import SourceFile
from rayward.data.sources.rows import RawRow
from rayward.data.sources.streams import open_plain

BATCH_ROWS = 1000
_JSON: Mapping[str, Any] = {"_type": "Json"}
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)

Convert = Callable[[Any], Any]


def parquet_groups(file: SourceFile) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group."""
    with open_plain(file) as stream:
        metadata = pq.ParquetFile(stream).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_rows(file: SourceFile, groups: Sequence[int], number: int) -> Iterator[RawRow]:
    """The rows of these row groups, numbered from `number` on."""
    with open_plain(file) as stream:
        parquet = pq.ParquetFile(stream)
        columns = (parquet.schema.column(index) for index in range(len(parquet.schema)))
        # Older versions of pyarrow show a column of JSON as text; this is the file's own word.
        decoded = {column.path: _JSON for column in columns if column.logical_type.type == "JSON"}
        convert = _converter_of(parquet.schema_arrow, decoded)
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups)):
            yield from _rows(batch, convert, number)
            number += batch.num_rows


def arrow_batches(file: SourceFile) -> list[tuple[int, int]] | None:
    """Rows and bytes of each record batch of a local file; None: to know them costs as much as to read the file."""
    if not isinstance(storage.resolve(file.uri)[0], pafs.LocalFileSystem):
        return None
    with _arrow(file) as batches:
        sizes = [(batch.num_rows, batch.get_total_buffer_size()) for batch in batches]
    # Compressed, every batch before one's own has to be decompressed.
    return sizes if sum(size for _, size in sizes) <= 1.2 * file.size else None


def arrow_rows(file: SourceFile, chosen: Sequence[int], number: int) -> Iterator[RawRow]:
    """The rows of these record batches (none: of all), numbered from `number` on."""
    wanted = frozenset(chosen)
    with _arrow(file) as batches:
        convert: Convert | None = None
        for index, batch in enumerate(batches):
            if wanted and index > chosen[-1]:
                return
            if wanted and index not in wanted:
                continue
            convert = convert or _converter_of(batch.schema, {})
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield from _rows(part, convert, number)
                number += part.num_rows


@contextmanager
def _arrow(file: SourceFile) -> Iterator[Iterator[pa.RecordBatch]]:
    """The record batches of a file in Arrow's file or stream format."""
    filesystem, path = storage.resolve(file.uri)
    local = isinstance(filesystem, pafs.LocalFileSystem) and file.size > 0
    with pa.memory_map(path) if local else filesystem.open_input_file(path) as stream:
        head = stream.read(8)
        if head.startswith(_FILE_MAGIC):
            stream.seek(0)
            reader = pa.ipc.open_file(stream)
            yield (reader.get_batch(index) for index in range(reader.num_record_batches))
            return
        if file.size < len(_STREAM_END):
            raise pa.ArrowInvalid("the file is too short to be one of Arrow")
        stream.seek(file.size - len(_STREAM_END))
        # Cut off between two batches, the rest of a stream looks whole.
        if stream.read(len(_STREAM_END)) != _STREAM_END:
            raise pa.ArrowInvalid("neither an Arrow file nor a stream with its end mark: it is cut off, or of another kind")
        stream.seek(0)
        yield iter(pa.ipc.open_stream(stream))


def _rows(batch: pa.RecordBatch, convert: Convert, number: int) -> Iterator[RawRow]:
    try:
        # Arrow files carry no checksums, and an offset that points outside would end the process.
        batch.validate(full=True)
        texts: list[str | Exception] = [_dump(row, convert) for row in batch.to_pylist()]
    except _UNREADABLE:
        texts = [_one_row(batch, index, convert) for index in range(batch.num_rows)]
    for offset, text in enumerate(texts):
        if isinstance(text, str):
            yield RawRow(number + offset, text)
        else:
            yield RawRow(number + offset, "", BadRow.UNPARSABLE, f"a value of the row cannot be read: {text}")


def _one_row(batch: pa.RecordBatch, index: int, convert: Convert) -> str | Exception:
    try:
        row = batch.slice(index, 1)
        row.validate(full=True)
        return _dump(row.to_pylist()[0], convert)
    except _UNREADABLE as exc:  # text that is not UTF-8, a date out of range
        return exc


def _dump(row: dict[str, Any], convert: Convert) -> str:
    return json.dumps(convert(row), default=_plain)


def _plain(value: object) -> Any:
    """What JSON has no word for: decimals are numbers, dates and ids text, seconds numbers; bytes are not read."""
    if isinstance(value, decimal.Decimal):
        exponent = value.as_tuple().exponent
        return int(value) if isinstance(exponent, int) and exponent >= 0 else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    # A column that is used reports a wrong type.
    return {"unsupported": type(value).__name__}


def _converter_of(schema: pa.Schema, decoded: Mapping[str, Any]) -> Convert:
    """What makes a row of plain values of one of `to_pylist`: columns of JSON are parsed, maps become objects."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise pa.ArrowInvalid(f"the column {twice[0]} stands twice")
    columns: dict[str, Convert] = {}
    features = {**_features(schema), **decoded}
    for field in schema:
        convert = _converter(field.type, features.get(field.name))
        if convert is not None:
            columns[field.name] = convert
    return _in_fields(columns)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Types by column as `datasets` notes them in its files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _converter(kind: pa.DataType, feature: Any) -> Convert | None:
    """What a column of this type (and feature of `datasets`) needs; None: nothing."""
    if isinstance(kind, pa.ExtensionType | pa.BaseExtensionType):
        return _parse if kind.extension_name == "arrow.json" else None
    if feature == _JSON or (isinstance(feature, dict) and feature.get("_type") == "Json"):
        return _parse
    if pa.types.is_struct(kind):
        inner = {field.name: _converter(field.type, feature.get(field.name) if isinstance(feature, dict) else None) for field in kind}
        needed = {name: convert for name, convert in inner.items() if convert is not None}
        return _in_fields(needed) if needed else None
    if pa.types.is_map(kind):
        return _in_map(_converter(kind.item_type, None)) if _is_text(kind.key_type) else None
    if isinstance(value := getattr(kind, "value_type", None), pa.DataType):
        element = feature.get("feature") if isinstance(feature, dict) else feature[0] if isinstance(feature, list) and feature else None
        convert = _converter(value, element)
        if convert is None or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            return convert
        return _in_list(convert)
    return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _parse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # Arrow does not check it; an adapter that needs the column will say what it is


def _in_fields(columns: Mapping[str, Convert]) -> Convert:
    def convert(row: dict[str, Any] | None) -> dict[str, Any] | None:
        if row is not None:
            for name, of in columns.items():
                row[name] = of(row[name])
        return row

    return convert


def _in_list(of: Convert) -> Convert:
    return lambda values: None if values is None else [of(value) for value in values]


def _in_map(of: Convert | None) -> Convert:
    def convert(pairs: list[tuple[str, Any]] | None) -> Any:
        if pairs is None:
            return None
        values = {key: value if of is None else of(value) for key, value in pairs}
        return values if len(values) == len(pairs) else pairs

    return convert
