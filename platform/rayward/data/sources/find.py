"""Files behind paths, globs, directories and URIs."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
from pyarrow import fs as pafs

from rayward import storage
from rayward.errors import DataError

Role = Literal["train", "validation", "contamination"]
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
_WILDCARDS = re.compile(r"[*?\[]")
_SHARD = re.compile(r"[-_.]?\d{3,}([-_]of[-_]\d+)?$")
_GENERIC = {"", "part", "shard", "train", "test", "validation", "data"}
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)


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
        explicit, infos = _look_up(filesystem, path, location)
        usable = 0
        for info in infos:
            uri = _uri(location, path, info.path)
            kind = _kind_of(info.path)
            if kind is None and explicit:
                raise DataError(
                    f"{location}: the suffix is not one that can be read",
                    remedy=f"use {', '.join(JSON_SUFFIXES)} (also with .gz) or {', '.join(PARQUET_SUFFIXES)}",
                )
            if kind is None:
                ignored.append(uri)
                continue
            usable += 1
            found[uri] = SourceFile(uri, kind[0], kind[1], source_name(info.path), role, info.size)
        if not usable:
            raise DataError(
                f"{location}: no data file is there ({len(infos)} files looked at)",
                remedy=f"point data.{role} at files with {', '.join(JSON_SUFFIXES)} (also with .gz) or {', '.join(PARQUET_SUFFIXES)}",
            )
    return [found[uri] for uri in sorted(found)], sorted(ignored)


def _uri(location: str, path: str, file: str) -> str:
    """The absolute path or URI of `file`, found at `location`, which is `path` in its filesystem."""
    if "://" not in location:
        return file
    if file == path:
        return location
    place, options = storage.split_options(location)
    return storage.join(_folder(place), file.removeprefix(_folder(path)).lstrip("/")) + options


def _folder(path: str) -> str:
    wildcard = _WILDCARDS.search(path)
    return path.rstrip("/") if wildcard is None else path[: wildcard.start()].rpartition("/")[0]


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
    except READ_ERRORS as exc:
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
    if name.endswith(JSON_SUFFIXES):
        return "json", compressed
    return ("parquet", False) if name.endswith(PARQUET_SUFFIXES) and not compressed else None


def source_name(path: str) -> str:
    """`…/set-a/train-00003-of-00010.parquet` -> `set-a`; `…/pairs.jsonl.gz` -> `pairs`."""
    parts = PurePosixPath(path)
    stem = parts.name.removesuffix(".gz").rpartition(".")[0]
    stem = _SHARD.sub("", stem)
    return parts.parent.name or stem or "data" if stem.lower() in _GENERIC else stem
