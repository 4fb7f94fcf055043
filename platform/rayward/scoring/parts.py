"""What a scoring job has done, on storage: parts of results, a record of each that says it is whole, and what the job is. No Ray.

<output>/<file>-<unit>-<part>.jsonl    results of some rows of one unit of the input, in their order (or .parquet)
         _job.json                     the model, the options and the form of the output: another job is refused
         _commits/<unit>/<part>.json   written after the part: what is in it
         _commits/<unit>/end.json      how many parts and rows the unit has
         _manifest.json                written last: everything is there

A unit is named after its file's content and its place in it: an input that changed, or came later, is scored; the rest is not again.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import pyarrow.fs as pafs
from pydantic import Field

from rayward import storage
from rayward.data.sources.find import SourceFile
from rayward.data.sources.fingerprint import content_hash
from rayward.data.sources.read import ReadUnit, plan_units
from rayward.errors import ConfigError, DataError
from rayward.schema import Frozen, Versioned, digest, identity, write_atomically
from rayward.scoring.moments import Moments

JOB_FILE, MANIFEST_FILE, COMMITS, END = "_job.json", "_manifest.json", "_commits", "end.json"
PARALLEL_READS = 32
EXAMPLE_CHARS = 500

PART_NAME = re.compile(r"-[0-9a-f]{8}-\d{5,}\.(jsonl|parquet)$")

OutputFormat = Literal["jsonl", "parquet"]


class JobFacts(Versioned):
    """`_job.json`: what must be the same for results to belong together.

    Attributes:
        model: identity of what scores.
        options: of everything that changes a result or how rows become items.
        described: the options, to say what differs.
    """

    kind: ClassVar[str] = "scoring job"
    remedy: ClassVar[str] = "write to another directory"
    model: str
    output_format: OutputFormat
    rows_per_part: int
    keep_columns: bool
    options: str
    described: str = ""


class Part(Frozen):
    """Record of a part that is written.

    Attributes:
        file: its name in the output.
        rows: in it; errors: those without rewards, by code; examples: one of each.
        unused: rows by column that was not read.
        rewards: of all completions.
        version: of the model.
        started, finished: seconds since the epoch; cpu_seconds: of the processor, in between.
    """

    file: str
    rows: int
    errors: dict[str, int] = Field(default_factory=dict)
    examples: dict[str, str] = Field(default_factory=dict)
    unused: dict[str, int] = Field(default_factory=dict)
    rewards: Moments = Moments()
    version: str
    started: float = 0.0
    finished: float = 0.0
    cpu_seconds: float = 0.0


class End(Frozen):
    """Record of a unit that was read to its end."""

    parts: int
    rows: int


class Done(Versioned):
    """`_manifest.json`: the whole job.

    Attributes:
        files: parts in the order of the input; empty when they were joined into one file.
    """

    kind: ClassVar[str] = "manifest of scores"
    remedy: ClassVar[str] = "delete it and score again"
    rows: int
    errors: dict[str, int]
    examples: dict[str, str]
    unused: dict[str, int]
    rewards: Moments
    model_version: str
    inputs: tuple[str, ...]
    units: str
    files: tuple[str, ...]
    seconds: float
    cpu_seconds: float = 0.0


@dataclass
class Progress:
    """What is committed, added up: nothing here grows with the rows.

    Attributes:
        parts: indices of committed parts, by unit.
        ends: of the units that were read to their end.
        files: names of parts, by unit and index.
    """

    parts: dict[str, set[int]] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)
    files: dict[tuple[str, int], str] = field(default_factory=dict)
    rows: int = 0
    rows_by_unit: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    rewards: Moments = field(default_factory=Moments)
    versions: set[str] = field(default_factory=set)
    started: float = float("inf")
    finished: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, unit: str, index: int, part: Part) -> None:
        """A part more; one that is known already does not count again."""
        known = self.parts.setdefault(unit, set())
        if index in known:
            return
        known.add(index)
        self.files[unit, index] = part.file
        self.rows += part.rows
        self.rows_by_unit[unit] += part.rows
        self.errors.update(part.errors)
        self.unused.update(part.unused)
        for code, example in part.examples.items():
            self.examples.setdefault(code, example)
        self.rewards = self.rewards.plus(part.rewards)
        self.versions.add(part.version)
        self.cpu_seconds += part.cpu_seconds
        self.started, self.finished = min(self.started, part.started), max(self.finished, part.finished)

    def is_whole(self, unit: str) -> bool:
        """Whether every row of a unit is in a committed part."""
        end = self.ends.get(unit)
        return end is not None and self.parts.get(unit, set()) == set(range(end.parts)) and self.rows_by_unit[unit] == end.rows

    def names(self, units: Iterable[str]) -> list[str]:
        """The parts of units, in order."""
        return [self.files[unit, index] for unit in units for index in range(self.ends[unit].parts)]


def name_units(files: Sequence[SourceFile]) -> dict[str, ReadUnit]:
    """The units of files in order, under names that change with the file's content and place.

    Raises:
        DataError: a file cannot be read.
    """
    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        # Not by all bytes while they are few: what a file is called must not change when others come.
        contents = list(zip(files, threads.map(partial(content_hash, whole=False), files), strict=True))
    return {digest([content, identity(unit)])[:16]: unit for file, content in contents for unit in plan_units(file)}


def part_name(unit: str, file: str, index: int, output_format: OutputFormat) -> str:
    """Name of a part's file."""
    stem = PurePosixPath(file.partition("?")[0]).name.partition(".")[0][:80] or "part"
    return f"{stem}-{unit[:8]}-{index:05d}.{output_format}"


def publish(location: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever dies."""
    filesystem, path = storage.resolve(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), data)
        return
    folder, _, name = path.rpartition("/")
    filesystem.create_dir(folder, recursive=True)
    partial = f"{folder}/.{name}.{uuid.uuid4().hex[:12]}"
    with filesystem.open_output_stream(partial, compression=None) as stream:
        stream.write(data)
    filesystem.move(partial, path)


def commit(place: str, unit: str, name: str, record: Part | End) -> None:
    """Say that a part, or the end of a unit, is there."""
    publish(storage.join(place, COMMITS, unit, name), record.model_dump_json().encode())


def read_progress(place: str, units: Mapping[str, ReadUnit]) -> Progress:
    """What is committed of these units, and still there; records of others are left alone."""
    filesystem, root = storage.resolve(place)
    folder = f"{root}/{COMMITS}"
    progress = Progress()
    if not storage.exists(filesystem, folder):
        return progress
    names = [info.path for info in filesystem.get_file_info(pafs.FileSelector(folder, recursive=True)) if info.type == pafs.FileType.File]
    wanted = [path for path in sorted(names) if PurePosixPath(path).parent.name in units and not PurePosixPath(path).name.startswith(".")]
    there = files_in(place)
    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        for path, text in zip(wanted, threads.map(lambda path: storage.read_text(filesystem, path), wanted), strict=True):
            unit, name = PurePosixPath(path).parent.name, PurePosixPath(path).name
            if name == END:
                progress.ends[unit] = End.model_validate_json(text)
            elif (part := Part.model_validate_json(text)).file in there:
                progress.add(unit, int(name.removesuffix(".json")), part)
    return progress


def files_in(place: str) -> set[str]:
    """Names of the files that lie in a directory itself."""
    filesystem, root = storage.resolve(place)
    infos = filesystem.get_file_info(pafs.FileSelector(root))
    return {info.base_name for info in infos if info.type == pafs.FileType.File}


def open_job(place: str, facts: JobFacts) -> None:
    """Begin a job in a directory, or go on with the same one.

    Raises:
        ConfigError: the directory holds something else.
        DataError: its record cannot be read.
    """
    filesystem, root = storage.resolve(place)
    file = f"{root}/{JOB_FILE}"
    if storage.exists(filesystem, file):
        found = JobFacts.parse(storage.read_text(filesystem, file), where=f"{place}/{JOB_FILE}", error=DataError)
        names = ("model", "output_format", "rows_per_part", "keep_columns", "options")
        differing = ", ".join(name for name in names if getattr(found, name) != getattr(facts, name))
        if differing:
            raise ConfigError(
                f"{place} holds the scores of another job, which differs in {differing} ({found.described}; now: {facts.described})",
                remedy="write to another directory, or delete this one",
            )
        return
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File or (info.type == pafs.FileType.Directory and filesystem.get_file_info(pafs.FileSelector(root))):
        raise ConfigError(f"{place} exists and holds no scoring job", remedy="write to another directory, or delete this one")
    publish(storage.join(place, JOB_FILE), facts.model_dump_json(indent=2).encode() + b"\n")


def read_done(place: str) -> Done | None:
    """The manifest of a job that is over, or None."""
    filesystem, root = storage.resolve(place)
    file = f"{root}/{MANIFEST_FILE}"
    if not storage.exists(filesystem, file):
        return None
    return Done.parse(storage.read_text(filesystem, file), where=f"{place}/{MANIFEST_FILE}", error=DataError)


def finish(place: str, progress: Progress, units: Mapping[str, ReadUnit], *, joined: bool) -> Done:
    """Write the manifest, and delete parts that are not of it.

    Args:
        joined: whether the parts were joined into one file.
    """
    names = progress.names(units)
    done = Done(
        rows=progress.rows,
        errors=dict(progress.errors),
        examples=progress.examples,
        unused=dict(progress.unused),
        rewards=progress.rewards,
        model_version=next(iter(progress.versions), ""),
        inputs=tuple(sorted({unit.file.uri for unit in units.values()})),
        units=digest(list(units)),
        files=() if joined else tuple(names),
        seconds=max(0.0, progress.finished - progress.started),
        cpu_seconds=progress.cpu_seconds,
    )
    publish(storage.join(place, MANIFEST_FILE), done.model_dump_json(indent=2).encode() + b"\n")
    clean(place, done)
    return done


def clean(place: str, done: Done) -> None:
    """Delete parts that are not of the manifest: joined ones, and those of inputs that are no longer named."""
    filesystem, root = storage.resolve(place)
    for name in files_in(place) - set(done.files):
        if PART_NAME.search(name):
            filesystem.delete_file(f"{root}/{name}")
