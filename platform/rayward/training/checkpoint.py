"""Checkpoints: one safetensors file per rank, committed by one small file, readable at any world size by ranged reads.

    <run>/checkpoints/step_00000100/rank_00000.safetensors   this rank's flat fp32 weights and moments
                                    …
                                    commit.json              written last; without it the directory does not count

`commit.json` holds size and sha256 of every file, the partition layout, the step, the configuration and the golden
scores. Nothing is pickled: loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from rayward import storage
from rayward.contract import GoldenScore
from rayward.errors import CheckpointError
from rayward.training.engine import STATE_KINDS, Engine, Partition, StateKind

logger = logging.getLogger(__name__)

COMMIT_FILE = "commit.json"
DAMAGED_FILE = "damaged.json"
COMMIT_VERSION = 1


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    num_bytes: int
    sha256: str


class ParameterEntry(BaseModel):
    """Shape of a parameter and how many elements each rank holds (the last ranks may hold fewer)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: tuple[int, ...]
    partition_size: int


class Commit(BaseModel):
    """Content of `commit.json`.

    Attributes:
        step: optimizer steps done; the next one to run has this 0-based number.
        world_size: number of rank files.
        trajectory: the settings that decide the trajectory; a resumed run must have the same.
        validation_accuracy: measured at this step, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = COMMIT_VERSION
    step: int
    total_steps: int
    world_size: int
    files: dict[str, FileEntry]
    parameters: dict[str, ParameterEntry]
    trajectory: dict[str, Any]
    golden: tuple[GoldenScore, ...] = ()
    dtype: str = "float32"
    validation_accuracy: float | None = None
    metrics: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class CommittedCheckpoint:
    """A directory whose commit file and file sizes are in order."""

    directory: str
    commit: Commit


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: local path or URI of the `checkpoints` directory.
    """

    def __init__(self, location: str) -> None:
        self.filesystem, self.root = storage.resolve(location)

    def committed(self) -> list[CommittedCheckpoint]:
        """Usable checkpoints, newest first; what is half written or damaged is skipped with a message."""
        if not storage.exists(self.filesystem, self.root):
            return []
        directories = [
            info.path
            for info in self.filesystem.get_file_info(pafs.FileSelector(self.root))
            if info.type == pafs.FileType.Directory and info.base_name.startswith("step_")
        ]
        checkpoints = (self._read(directory) for directory in sorted(directories, reverse=True))
        return [checkpoint for checkpoint in checkpoints if checkpoint is not None]

    def latest(self) -> CommittedCheckpoint | None:
        """The newest usable checkpoint."""
        found = self.committed()
        return found[0] if found else None

    def _read(self, directory: str) -> CommittedCheckpoint | None:
        problem = None
        try:
            if storage.exists(self.filesystem, f"{directory}/{DAMAGED_FILE}"):
                problem = "its content was found damaged"
            else:
                commit = Commit.model_validate_json(storage.read_text(self.filesystem, f"{directory}/{COMMIT_FILE}"))
                for name, entry in commit.files.items():
                    info = self.filesystem.get_file_info(f"{directory}/{name}")
                    if info.size != entry.num_bytes:
                        problem = f"{name} has {info.size} bytes instead of {entry.num_bytes}"
        except FileNotFoundError:
            problem = "it was never committed"
        except (ValidationError, UnicodeDecodeError) as exc:
            problem = f"its {COMMIT_FILE} is damaged ({type(exc).__name__})"
        if problem is not None:
            logger.warning("skipping checkpoint %s: %s", directory, problem)
            return None
        return CommittedCheckpoint(directory, commit)

    def save(self, engine: Engine, commit: CommitDraft) -> str | None:
        """Write and commit a checkpoint; called by all ranks.

        Returns:
            None when committed; else the reason why nothing was written (the earlier checkpoints are untouched).
        """
        directory = f"{self.root}/step_{commit.step:08d}"
        name = f"rank_{engine.rank:05d}.safetensors"
        problem: str | None = None
        entry: FileEntry | None = None
        try:
            if engine.rank == 0:
                storage.delete_dir(self.filesystem, directory)
                self.filesystem.create_dir(directory)
        except OSError as exc:
            problem = f"rank 0: {exc}"
        if not any(engine.all_gather_object(problem)):
            try:
                entry = _write_rank_file(self.filesystem, f"{directory}/{name}", engine)
            except OSError as exc:
                problem = f"rank {engine.rank}: {exc}"
        results = engine.all_gather_object((name, entry, problem))
        problems = [p for _, _, p in results if p]
        if engine.rank == 0 and not problems:
            try:
                self._commit(directory, commit, engine, {n: e for n, e, _ in results})
            except OSError as exc:
                problems = [f"rank 0: {exc}"]
        problems = engine.all_gather_object(problems)[0]
        if problems:
            if engine.rank == 0:
                self._discard(directory)
            return "; ".join(problems)
        if engine.rank == 0:
            self._prune(commit.keep_last)
        return None

    def _commit(self, directory: str, draft: CommitDraft, engine: Engine, files: dict[str, FileEntry]) -> None:
        parameters = {
            p.name: ParameterEntry(shape=p.shape, partition_size=-(-math.prod(p.shape) // engine.world_size)) for p in engine.partitions()
        }
        commit = Commit(
            step=draft.step,
            total_steps=draft.total_steps,
            world_size=engine.world_size,
            files=files,
            parameters=parameters,
            trajectory=draft.trajectory,
            golden=draft.golden,
            dtype=draft.dtype,
            validation_accuracy=draft.validation_accuracy,
            metrics=draft.metrics,
        )
        storage.write_text(self.filesystem, f"{directory}/{COMMIT_FILE}", commit.model_dump_json())

    def _discard(self, directory: str) -> None:
        try:
            storage.delete_dir(self.filesystem, directory)
        except OSError as exc:
            logger.warning("the unfinished checkpoint %s could not be removed: %s", directory, exc)

    def _prune(self, keep_last: int) -> None:
        # The newest, and the one with the best validation accuracy. Uncommitted directories are left for their writers.
        checkpoints = self.committed()
        judged = [c for c in checkpoints if c.commit.validation_accuracy is not None]
        best = max(judged, key=lambda c: (c.commit.validation_accuracy, c.commit.step), default=None)
        for checkpoint in checkpoints[keep_last:]:
            if best is None or checkpoint.directory != best.directory:
                self._discard(checkpoint.directory)

    def load(self, engine: Engine, checkpoint: CommittedCheckpoint) -> None:
        """Load a checkpoint written at any world size; called by all ranks.

        Raises:
            CheckpointError: a file's content is not what was committed. The checkpoint is then marked, so that the next
                attempt takes the one before it.
        """
        commit = checkpoint.commit
        names = sorted(commit.files)[engine.rank :: engine.world_size]
        damaged = [n for n in names if _sha256(self.filesystem, f"{checkpoint.directory}/{n}") != commit.files[n].sha256]
        damaged = [n for per_rank in engine.all_gather_object(damaged) for n in per_rank]
        if damaged:
            if engine.rank == 0:
                storage.write_text(self.filesystem, f"{checkpoint.directory}/{DAMAGED_FILE}", json.dumps(damaged))
            raise CheckpointError(
                f"checkpoint {checkpoint.directory}: the content of {', '.join(damaged)} is not what was committed",
                remedy="the run restarts from the checkpoint before it; check the storage",
            )
        reader = CheckpointReader(self.filesystem, checkpoint)
        engine.load_state(lambda p, kind: reader.read(p.name, p.shape, p.start, p.stop, kind=kind), optimizer_steps=commit.step)


@dataclass(frozen=True, slots=True)
class CommitDraft:
    """What the caller knows about a checkpoint to be written."""

    step: int
    total_steps: int
    trajectory: dict[str, Any]
    keep_last: int
    dtype: str = "float32"
    golden: tuple[GoldenScore, ...] = ()
    validation_accuracy: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class CheckpointReader:
    """Ranged reads from a committed checkpoint; a `WeightSource`."""

    def __init__(self, filesystem: pafs.FileSystem, checkpoint: CommittedCheckpoint) -> None:
        self._filesystem = filesystem
        self._directory = checkpoint.directory
        self.commit = checkpoint.commit
        self._files: dict[int, tuple[pa.NativeFile, int, dict[str, Any]]] = {}

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int, kind: StateKind = "weight") -> Tensor:
        """Elements [start, stop) of a parameter or of one of its moments, whatever ranks hold them."""
        entry = self.commit.parameters.get(name)
        if entry is None or entry.shape != shape:
            raise CheckpointError(
                f"checkpoint {self._directory} has {name} with shape {entry and entry.shape}; the model needs {shape}",
                remedy="resume with the configuration that the run was started with, or use another run.name",
            )
        size = entry.partition_size
        pieces = []
        for rank in range(start // size, -(-stop // size)) if stop > start else ():
            first, last = max(start, rank * size), min(stop, (rank + 1) * size)
            pieces.append(self._elements(rank, f"{kind}/{name}", first - rank * size, last - rank * size))
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def _elements(self, rank: int, key: str, first: int, last: int) -> Tensor:
        if rank not in self._files:
            file = self._filesystem.open_input_file(f"{self._directory}/rank_{rank:05d}.safetensors")
            (length,) = struct.unpack("<Q", file.read_at(8, 0))
            self._files[rank] = (file, 8 + length, json.loads(bytes(file.read_at(length, 8))))
        file, base, header = self._files[rank]
        offset = base + header[key]["data_offsets"][0] + 4 * first
        return torch.frombuffer(bytearray(file.read_at(4 * (last - first), offset)), dtype=torch.float32)


def _state_tensors(engine: Engine) -> Iterator[tuple[str, Partition, StateKind]]:
    for kind in STATE_KINDS:
        for partition in engine.partitions():
            if partition.stop > partition.start:
                yield f"{kind}/{partition.name}", partition, kind


def _write_rank_file(filesystem: pafs.FileSystem, path: str, engine: Engine) -> FileEntry:
    # A safetensors file, tensor by tensor: the host never holds more than one of them.
    header: dict[str, Any] = {}
    offset = 0
    for key, partition, _ in _state_tensors(engine):
        size = 4 * (partition.stop - partition.start)
        header[key] = {"dtype": "F32", "shape": [partition.stop - partition.start], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = hashlib.sha256()
    with filesystem.open_output_stream(path) as stream:
        for piece in (struct.pack("<Q", len(text)), text):
            stream.write(piece)
            state.update(piece)
        for _, partition, kind in _state_tensors(engine):
            data = engine.read_state(partition, kind).float().contiguous().cpu().numpy().data.cast("B")
            stream.write(data)
            state.update(data)
    return FileEntry(num_bytes=8 + len(text) + offset, sha256=state.hexdigest())


def _sha256(filesystem: pafs.FileSystem, path: str) -> str:
    state = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 24):
            state.update(chunk)
    return state.hexdigest()
