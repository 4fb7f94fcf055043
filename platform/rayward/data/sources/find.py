"""Files behind paths, globs, directories and URIs; what of a directory is not read, and why."""

from __future__ import annotations

import json
import logging
import lzma
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from rayward import storage
from rayward.data.sources import kinds
from rayward.data.sources.globs import WILDCARDS, base_of, compile_glob, expand_braces
from rayward.data.sources.kinds import READABLE, Compression, Kind, Role
from rayward.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 20
"""Files passed over that are printed; the report has all."""
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)
STATE_FILE, INFO_FILE = "state.json", "dataset_info.json"
BOOKKEEPING = {STATE_FILE, INFO_FILE, "dataset_infos.json", "dataset_dict.json"}
"""Files that `datasets` puts beside the data."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the input.

    Attributes:
        uri: absolute local path, or URI of a pyarrow filesystem.
        kind: how it is read.
        compression: of the whole file (text kinds only).
        source: name of the data set it belongs to: the file's name without shard number and suffix.
        role: which config key named it.
        size: bytes.
    """

    uri: str
    kind: Kind
    compression: Compression | None
    source: str
    role: Role
    size: int


class PassedOver(NamedTuple):
    """A file (or folder) below a named place that is not read."""

    uri: str
    reason: str

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


class Found(NamedTuple):
    """The files to read, in sorted order without repetition, and those that were passed over."""

    files: list[SourceFile]
    passed_over: list[PassedOver]


class _Place(NamedTuple):
    """One location after its braces are expanded.

    Attributes:
        location: as the user wrote it; path: in its filesystem; base: the folder that is walked.
        pattern: of the glob, below the base; empty for a directory.
    """

    location: str
    path: str
    base: str
    pattern: str


def find_files(locations: Sequence[str], role: Role, *, every_split: bool = False) -> Found:
    """Expand paths, globs, directories and URIs (hub names are handled by `parse_hub_name`).

    A file that was not named itself is passed over when its name begins with `.` or `_`, its suffix cannot be read, or its name says
    that it is of the other role: test data is not trained on, and train data not held out where there is test data beside it.

    Args:
        every_split: whether a name's split does not matter, as it does not where rows are only scored.

    Raises:
        DataError: a location does not exist, matches nothing that can be read, or names a file of an unknown kind.
    """
    found: dict[str, SourceFile] = {}
    passed_over: dict[str, PassedOver] = {}
    for location in locations:
        for one in _expanded(location):
            files, others = _find(one, role, every_split)
            found.update((file.uri, file) for file in files)
            passed_over.update((other.uri, other) for other in others)
    return Found([found[uri] for uri in sorted(found)], [passed_over[uri] for uri in sorted(passed_over.keys() - found.keys())])


def without(passed_over: Iterable[PassedOver], files: Iterable[SourceFile]) -> list[PassedOver]:
    """Those that no role reads."""
    read = {file.uri for file in files}
    return [other for other in passed_over if other.uri not in read]


def report_passed_over(passed_over: Sequence[PassedOver]) -> None:
    """Say it where the user looks."""
    for other in passed_over[:SHOWN]:
        logger.warning("not read: %s", other)
    if len(passed_over) > SHOWN:
        logger.warning("not read: %d more files", len(passed_over) - SHOWN)


def _expanded(location: str) -> list[str]:
    place, options = storage.split_options(location)
    expanded = expand_braces(place)
    if expanded != [place] and "://" not in location and storage.exists(*storage.resolve(location)):
        return [location]  # a file may have braces in its name
    return [one + options for one in expanded]


def _find(location: str, role: Role, every_split: bool) -> tuple[list[SourceFile], list[PassedOver]]:
    filesystem, path = storage.resolve(location)
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [_named(location, path, info, role)], []
        wildcard = WILDCARDS.search(path)
        if info.type == pafs.FileType.Directory:
            place = _Place(location, path, path.rstrip("/"), "")
        elif wildcard:
            base = base_of(path)
            place = _Place(location, path, base, path.removeprefix(base).lstrip("/"))
        else:
            raise DataError(f"{location} does not exist", remedy="check data.train and data.validation")
        entries = _entries(filesystem, place)
        saved = _saved_data_sets(filesystem, place, entries)
    except READ_ERRORS as exc:
        raise DataError(f"{location} cannot be read ({exc})", remedy="check the path and the access rights") from exc
    files, passed_over = _choose(place, entries, saved, role, every_split)
    if not files:
        looked_at = "; ".join(str(other) for other in passed_over[:3]) + (f"; {len(passed_over) - 3} more" if len(passed_over) > 3 else "")
        raise DataError(
            f"{location}: no data file is there ({len(entries)} files looked at{': ' + looked_at if looked_at else ''})",
            remedy=f"point data.{role} at data files (a file that is named itself is read whatever split its name says); {READABLE}",
        )
    return files, passed_over


def _named(location: str, path: str, info: pafs.FileInfo, role: Role) -> SourceFile:
    kind = kinds.kind_of(path)
    if kind is None:
        raise DataError(f"{location}: the suffix is not one that can be read", remedy=READABLE)
    return SourceFile(_uri(location, path, path), *kind, kinds.source_name(path), role, info.size)


def _entries(filesystem: pafs.FileSystem, place: _Place) -> list[pafs.FileInfo]:
    """The files that the place stands for."""
    if filesystem.get_file_info(place.base or "/").type != pafs.FileType.Directory:
        return []
    entries = filesystem.get_file_info(pafs.FileSelector(place.base or "/", recursive=True))
    pattern = compile_glob(place.pattern)
    return sorted(
        (
            entry
            for entry in entries
            if entry.type == pafs.FileType.File and (not place.pattern or pattern.fullmatch("/".join(_parts(place, entry))))
        ),
        key=lambda entry: entry.path,
    )


def _parts(place: _Place, entry: pafs.FileInfo) -> tuple[str, ...]:
    return PurePosixPath(entry.path).parts[len(PurePosixPath(place.base or "/").parts) :]


def _saved_data_sets(filesystem: pafs.FileSystem, place: _Place, entries: list[pafs.FileInfo]) -> dict[str, frozenset[str]]:
    """By folder, the names of its data files: folders that `datasets` wrote by `save_to_disk`."""
    folders: dict[str, set[str]] = {}
    for entry in entries:
        folder, _, name = entry.path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    saved = {}
    for folder, names in folders.items():
        state = f"{folder}/{STATE_FILE}"
        if place.pattern:
            if not any(name.endswith(".arrow") for name in names) or not storage.exists(filesystem, state):
                continue
        elif not {STATE_FILE, INFO_FILE} <= names:
            continue
        saved[folder] = _listed(filesystem, state)
        missing = sorted(name for name in saved[folder] if not storage.exists(filesystem, f"{folder}/{name}"))
        if missing:
            raise DataError(f"{folder}: {missing[0]}, which {STATE_FILE} lists, is missing", remedy="restore the file")
    return saved


def _listed(filesystem: pafs.FileSystem, state: str) -> frozenset[str]:
    remedy = "write the data set again by save_to_disk of a current version of datasets"
    try:
        content = json.loads(storage.read_text(filesystem, state))
        listed = frozenset(str(file["filename"]) for file in content["_data_files"])
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{state} is not the state of a saved data set ({exc})", remedy=remedy) from exc
    if content.get("_indices_data_files"):
        raise DataError(f"{state}: the data set was saved with an index over its rows", remedy=remedy)
    return listed


def _choose(
    place: _Place, entries: list[pafs.FileInfo], saved: dict[str, frozenset[str]], role: Role, every_split: bool
) -> tuple[list[SourceFile], list[PassedOver]]:
    usable: list[tuple[SourceFile, tuple[str, frozenset[str]] | None]] = []
    passed_over: dict[str, PassedOver] = {}

    def skip(path: str, reason: str) -> None:
        uri = _uri(place.location, place.path, path)
        passed_over.setdefault(uri, PassedOver(uri, reason))

    for entry in entries:
        parts = _parts(place, entry)
        folder, _, name = entry.path.rpartition("/")
        kind = kinds.kind_of(entry.path)
        hidden = _first_hidden(place, parts)
        if hidden is not None:
            # Bookkeeping by the custom of data directories (_SUCCESS, .cache); said only where it might be data.
            if kind is not None:
                skip("/".join([place.base, *parts[: hidden + 1]]), f"its name begins with {parts[hidden][0]}")
        elif name in BOOKKEEPING and not place.pattern.endswith(name):
            if folder not in saved and not any(PurePosixPath(one).parent == PurePosixPath(folder) for one in saved):
                skip(entry.path, "it describes a data set and holds no rows")
        elif folder in saved and name not in saved[folder]:
            skip(entry.path, f"it is not among the data files that {STATE_FILE} lists")
        elif kind is None:
            skip(entry.path, "its suffix is not one that can be read")
        else:
            file = SourceFile(_uri(place.location, place.path, entry.path), *kind, kinds.source_name(entry.path), role, entry.size)
            usable.append((file, kinds.split_of(parts)))
    if every_split:
        return [file for file, _ in usable], list(passed_over.values())
    other = kinds.HELD_OUT if role == "train" else kinds.TRAIN
    there = any(split is not None and split[0] == kinds.HELD_OUT for _, split in usable)
    files = []
    for file, split in usable:
        if split is None or split[0] != other or split[1] <= kinds.split_words(place.pattern) or not there:
            files.append(file)
        else:
            which = f"its name says {', '.join(sorted(split[1])).replace('_', ' ')}"
            passed_over[file.uri] = PassedOver(file.uri, f"{which}; it was not named itself in data.{role}")
    return files, list(passed_over.values())


def _first_hidden(place: _Place, parts: tuple[str, ...]) -> int | None:
    asked = {part[0] for part in place.pattern.split("/") if part[:1] in {".", "_"}}
    return next((index for index, part in enumerate(parts) if part[0] in "._" and part[0] not in asked), None)


def _uri(location: str, path: str, file: str) -> str:
    """The absolute path or URI of `file`, found at `location`, which is `path` in its filesystem."""
    if "://" not in location:
        return file
    if file == path:
        return location
    place, options = storage.split_options(location)
    return storage.join(base_of(place), file.removeprefix(base_of(path)).lstrip("/")) + options
