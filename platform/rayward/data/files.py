"""Source files: find them (paths, globs, directories, URIs, hub names), sample them, read them row by row.

Numbers of rows are 1-based: the line of a JSON-lines file, the element of a JSON list, the row of a Parquet file.
Blank lines are not rows. No Ray here: `prepare` runs `read_unit` inside its tasks.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from rayward import storage
from rayward.data.comparison import BadRow
from rayward.errors import DataError

Role = Literal["train", "validation"]
HUB_PREFIX = "hf:"
UNIT_BYTES = 64 * 1024 * 1024
WHOLE_HASH_BYTES = 256 * 1024 * 1024
BATCH_ROWS = 1000
SAMPLE_ROWS = 100
SAMPLE_SCAN = 2000
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_WILDCARDS = re.compile(r"[*?\[]")
_SHARD = re.compile(r"[-_.]?\d{3,}([-_]of[-_]\d+)?$")
_GENERIC = {"", "part", "shard", "train", "test", "validation", "data"}
_READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the input.

    Attributes:
        uri: absolute local path, or URI of a pyarrow filesystem.
        kind: how it is read.
        gzip: whether it is compressed (JSON only).
        source: name of the data set it belongs to: the file's name without shard number and suffix.
        role: which config key named it.
        size: bytes.
    """

    uri: str
    kind: Literal["json", "parquet"]
    gzip: bool
    source: str
    role: Role
    size: int


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """The part of a file that one task reads: a whole JSON file, or some row groups of a Parquet file."""

    file: SourceFile
    row_groups: tuple[int, ...] = ()
    first_number: int = 1


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as JSON text, or what is wrong with it."""

    number: int
    raw: str
    reason: BadRow | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HubName:
    """`hf:owner/name[/config][@split]`, taken apart."""

    name: str
    config: str | None
    split: str


def find_files(locations: Sequence[str], role: Role) -> tuple[list[SourceFile], list[str]]:
    """Expand paths, globs, directories and URIs (hub names are handled by `parse_hub_name`).

    Returns:
        The files in sorted order without repetition, and files of directories that were passed over because of their suffix.

    Raises:
        DataError: a location does not exist, matches nothing, or names a file of an unknown kind.
    """
    found: dict[str, SourceFile] = {}
    ignored: list[str] = []
    for location in locations:
        filesystem, path = storage.resolve(location)
        prefix = location[: len(location) - len(path)] if "://" in location and location.endswith(path) else ""
        explicit, infos = _look_up(filesystem, path, location)
        usable = 0
        for info in infos:
            uri = prefix + info.path
            kind = _kind_of(info.path)
            if kind is None and explicit:
                raise DataError(
                    f"{location}: the suffix is not one that can be read",
                    remedy=f"use {', '.join(_JSON_SUFFIXES)} (also with .gz) or {', '.join(_PARQUET_SUFFIXES)}",
                )
            if kind is None:
                ignored.append(uri)
                continue
            usable += 1
            found[uri] = SourceFile(uri, kind[0], kind[1], source_name(info.path), role, info.size)
        if not usable:
            raise DataError(
                f"{location}: no data file is there ({len(infos)} files looked at)",
                remedy=f"point data.{role} at files with {', '.join(_JSON_SUFFIXES)} (also with .gz) or {', '.join(_PARQUET_SUFFIXES)}",
            )
    return [found[uri] for uri in sorted(found)], sorted(ignored)


def _look_up(filesystem: pafs.FileSystem, path: str, location: str) -> tuple[bool, list[pafs.FileInfo]]:
    """Whether the location names one file, and the files it stands for."""
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return True, [info]
        if info.type == pafs.FileType.Directory:
            return False, _walk(filesystem, path)
        wildcard = _WILDCARDS.search(path)
        if wildcard:
            base = path[: wildcard.start()].rpartition("/")[0] or "/"
            pattern = _glob_pattern(path)
            if filesystem.get_file_info(base).type == pafs.FileType.Directory:
                return False, [entry for entry in _walk(filesystem, base) if pattern.fullmatch(entry.path)]
            return False, []
    except _READ_ERRORS as exc:
        raise DataError(f"{location} cannot be read ({exc})", remedy="check the path and the access rights") from exc
    raise DataError(f"{location} does not exist", remedy="check data.train and data.validation")


def _walk(filesystem: pafs.FileSystem, base: str) -> list[pafs.FileInfo]:
    entries = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    depth = len(PurePosixPath(base).parts)
    # Files and folders that begin with . or _ are bookkeeping (_SUCCESS, .cache), by the custom of data directories.
    return sorted(
        (
            entry
            for entry in entries
            if entry.type == pafs.FileType.File and not any(p[0] in "._" for p in PurePosixPath(entry.path).parts[depth:])
        ),
        key=lambda entry: entry.path,
    )


def _glob_pattern(path: str) -> re.Pattern[str]:
    pattern, index = "", 0
    while index < len(path):
        bracket = re.compile(r"\[(!?)([^\]/]+)\]").match(path, index)
        if path.startswith("**/", index):
            pattern, index = pattern + "(?:.*/)?", index + 3
        elif bracket:
            pattern, index = pattern + f"[{'^' if bracket[1] else ''}{bracket[2]}]", bracket.end()
        else:
            pattern, index = pattern + {"*": "[^/]*", "?": "[^/]"}.get(path[index], re.escape(path[index])), index + 1
    return re.compile(pattern)


def _kind_of(path: str) -> tuple[Literal["json", "parquet"], bool] | None:
    name = path.lower()
    compressed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    if name.endswith(_JSON_SUFFIXES):
        return "json", compressed
    return ("parquet", False) if name.endswith(_PARQUET_SUFFIXES) and not compressed else None


def source_name(path: str) -> str:
    """`…/set-a/train-00003-of-00010.parquet` -> `set-a`; `…/pairs.jsonl.gz` -> `pairs`."""
    parts = PurePosixPath(path)
    stem = parts.name.removesuffix(".gz").rpartition(".")[0]
    stem = _SHARD.sub("", stem)
    return parts.parent.name or stem or "data" if stem.lower() in _GENERIC else stem


def parse_hub_name(location: str, role: Role) -> HubName:
    """Take `hf:owner/name[/config][@split]` apart; the split defaults to `train` or `validation`, by role.

    Raises:
        DataError: the name does not have that form.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([^@/]+))?(?:@(.+))?", location)
    if match is None:
        raise DataError(f"{location!r} is not a hub name", remedy="write hf:owner/name, hf:owner/name/config or hf:owner/name/config@split")
    return HubName(match[1], match[2], match[3] or role)


def download(hub: HubName, directory: str, role: Role) -> SourceFile:
    """Load a hub data set and store it once as Parquet under `directory`, where every node can read it.

    Raises:
        DataError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    import datasets

    label = f"{HUB_PREFIX}{hub.name}{'/' + hub.config if hub.config else ''}@{hub.split}"
    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise DataError(f"{label} cannot be loaded: {exc}", remedy="check the name, the configuration, the split and the network") from exc
    name = re.sub(r"[^\w.-]+", "--", label.removeprefix(HUB_PREFIX))
    uri = f"{directory.rstrip('/')}/{name}-{loaded._fingerprint}.parquet"
    filesystem, path = storage.resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        partial = f"{path}.partial-{os.getpid()}"
        with filesystem.open_output_stream(partial) as stream:
            loaded.to_parquet(stream)
        filesystem.move(partial, path)
    uri = uri if "://" in uri else path
    return SourceFile(uri, "parquet", False, hub.name.partition("/")[2], role, filesystem.get_file_info(path).size)


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
    except _READ_ERRORS as exc:
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
    except _READ_ERRORS as exc:
        raise _damaged(file, exc) from exc


def read_unit(unit: ReadUnit) -> Iterator[RawRow]:
    """The rows of one unit, in order, in bounded memory (a JSON list is the exception: it is parsed as a whole).

    Raises:
        DataError: the file is truncated or damaged; the rows before the damage may have been yielded.
    """
    try:
        with _open(unit.file) as stream:
            yield from _parquet_rows(stream, unit) if unit.file.kind == "parquet" else _json_rows(stream, unit.file)
    except _READ_ERRORS as exc:
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
