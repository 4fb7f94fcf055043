"""The checkpoints of one run: which are committed, writing one with all ranks, loading one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from rayward import storage
from rayward.contract.contract import GoldenScore
from rayward.errors import CheckpointDamagedError, CheckpointError, CheckpointVersionError
from rayward.training.checkpoints.format import (
    BUFFERS_FILE,
    COMMIT_FILE,
    DAMAGED_FILE,
    Commit,
    CommittedCheckpoint,
    FileEntry,
    ParameterEntry,
)
from rayward.training.checkpoints.reader import CheckpointReader
from rayward.training.checkpoints.writer import sha256_of, write_buffers_file, write_rank_file
from rayward.training.engines.protocol import SharedState

logger = logging.getLogger(__name__)


_Problem = tuple[int | None, str]
"""Number of an OSError, and what it says of which rank."""


def _problem(rank: int, exc: OSError) -> _Problem:
    return exc.errno, f"rank {rank}: {exc.strerror or exc}"


def _merged(problems: Sequence[_Problem]) -> OSError:
    text = "; ".join(text for _, text in problems)
    number = next((number for number, _ in problems if number is not None), None)
    return OSError(text) if number is None else OSError(number, text)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: local path or URI of the `checkpoints` directory.
    """

    def __init__(self, location: str) -> None:
        self.filesystem, self.root = storage.resolve(location)

    def committed(self) -> list[CommittedCheckpoint]:
        """Usable checkpoints, newest first; what is half written or damaged is skipped with a message.

        Raises:
            CheckpointVersionError: another Rayward wrote one; going on from an older one would throw its steps away.
        """
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
        problem, file = None, f"{directory}/{COMMIT_FILE}"
        try:
            if storage.exists(self.filesystem, f"{directory}/{DAMAGED_FILE}"):
                problem = "its content was found damaged"
            else:
                text = storage.read_text(self.filesystem, file)
                commit = Commit.parse(text, where=file, error=CheckpointError, other_version=CheckpointVersionError)
                for name, entry in commit.files.items():
                    info = self.filesystem.get_file_info(f"{directory}/{name}")
                    if info.size != entry.num_bytes:
                        problem = f"{name} has {info.size} bytes instead of {entry.num_bytes}"
        except FileNotFoundError:
            problem = "it was never committed"
        except CheckpointVersionError:
            raise
        except (CheckpointError, UnicodeDecodeError) as exc:
            problem = f"its {COMMIT_FILE} is damaged ({exc})"
        if problem is not None:
            logger.warning("skipping checkpoint %s: %s", directory, problem)
            return None
        return CommittedCheckpoint(directory, commit)

    def save(self, engine: SharedState, commit: CommitDraft) -> OSError | None:
        """Write and commit a checkpoint; called by all ranks.

        Returns:
            None when committed; else why nothing was written, on every rank (the earlier checkpoints are untouched).
        """
        directory = f"{self.root}/step_{commit.step:08d}"
        name = f"rank_{engine.rank:05d}.safetensors"
        problem: _Problem | None = None
        files: dict[str, FileEntry] = {}
        try:
            if engine.rank == 0:
                storage.delete_dir(self.filesystem, directory)
                self.filesystem.create_dir(directory)
        except OSError as exc:
            problem = _problem(0, exc)
        if not any(engine.all_gather_object(problem)):
            try:
                files[name] = write_rank_file(self.filesystem, f"{directory}/{name}", engine)
                if engine.rank == 0 and (buffers := engine.buffers()):
                    files[BUFFERS_FILE] = write_buffers_file(self.filesystem, f"{directory}/{BUFFERS_FILE}", buffers)
            except OSError as exc:
                problem = _problem(engine.rank, exc)
        results = engine.all_gather_object((files, problem))
        problems = [p for _, p in results if p]
        if engine.rank == 0 and not problems:
            try:
                self._commit(directory, commit, engine, {n: e for written, _ in results for n, e in written.items()})
            except OSError as exc:
                problems = [_problem(0, exc)]
        problems = engine.all_gather_object(problems)[0]
        if problems:
            if engine.rank == 0:
                self._discard(directory)
            return _merged(problems)
        if engine.rank == 0:
            self._prune(commit.keep_last)
        return None

    def _commit(self, directory: str, draft: CommitDraft, engine: SharedState, files: dict[str, FileEntry]) -> None:
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

    def load(self, engine: SharedState, checkpoint: CommittedCheckpoint) -> None:
        """Load a checkpoint written at any world size; called by all ranks.

        Raises:
            CheckpointDamagedError: a file's content is not what was committed. The checkpoint is then marked, so that the next
                attempt takes the one before it.
        """
        commit = checkpoint.commit
        names = sorted(commit.files)[engine.rank :: engine.world_size]
        damaged = [n for n in names if sha256_of(self.filesystem, f"{checkpoint.directory}/{n}") != commit.files[n].sha256]
        damaged = [n for per_rank in engine.all_gather_object(damaged) for n in per_rank]
        if damaged:
            if engine.rank == 0:
                storage.write_text(self.filesystem, f"{checkpoint.directory}/{DAMAGED_FILE}", json.dumps(damaged))
            raise CheckpointDamagedError(
                f"checkpoint {checkpoint.directory}: the content of {', '.join(damaged)} is not what was committed",
                remedy="the run restarts from the checkpoint before it; check the storage",
            )
        with CheckpointReader(self.filesystem, checkpoint) as reader:
            engine.load_state(lambda p, kind: reader.read(p.name, p.shape, p.start, p.stop, kind=kind), optimizer_steps=commit.step)
            stored = reader.buffers()
        for name, buffer in engine.buffers().items():
            # A checkpoint of an earlier version has none; the model then keeps those that it was built with.
            if name in stored:
                buffer.copy_(stored[name])


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


def choose_checkpoint(store: CheckpointStore, which: str) -> CommittedCheckpoint:
    """`last`, `best` (validation accuracy), or a step number.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    committed = store.committed()
    chosen: CommittedCheckpoint | None = None
    if which == "last":
        chosen = committed[0] if committed else None
    elif which == "best":
        judged = [c for c in committed if c.commit.validation_accuracy is not None]
        chosen = max(judged, key=lambda c: (c.commit.validation_accuracy, c.commit.step), default=None)
    else:
        chosen = next((c for c in committed if str(c.commit.step) == which), None)
    if chosen is None:
        steps = ", ".join(str(c.commit.step) for c in committed) or "none"
        raise CheckpointError(
            f"no checkpoint {which!r} in {store.root}; committed steps: {steps}", remedy="choose last, best or one of these steps"
        )
    return chosen
