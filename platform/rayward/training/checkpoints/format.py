"""Checkpoints: one safetensors file per rank, committed by one small file, readable at any world size by ranged reads.

    <run>/checkpoints/step_00000100/rank_00000.safetensors   this rank's flat fp32 weights and moments
                                    …
                                    buffers.safetensors      persistent buffers of the model, where it has any
                                    commit.json              written last; without it the directory does not count

`commit.json` holds size and sha256 of every file, the partition layout, the step, the configuration and the golden
scores. Nothing is pickled: loading a checkpoint runs no code from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from rayward.contract.contract import GoldenScore
from rayward.schema import Frozen, Versioned

COMMIT_FILE = "commit.json"
DAMAGED_FILE = "damaged.json"
BUFFERS_FILE = "buffers.safetensors"
COMMIT_VERSION = 1


class FileEntry(Frozen):
    """Size in bytes and sha256 of one file."""

    num_bytes: int
    sha256: str


class ParameterEntry(Frozen):
    """Shape of a parameter and how many elements each rank holds (the last ranks may hold fewer)."""

    shape: tuple[int, ...]
    partition_size: int


class Commit(Versioned):
    """Content of `commit.json`.

    Attributes:
        step: optimizer steps done; the next one to run has this 0-based number.
        world_size: number of rank files.
        trajectory: the settings that decide the trajectory; a resumed run must have the same.
        validation_accuracy: measured at this step, or None.
    """

    kind: ClassVar[str] = "commit file"
    remedy: ClassVar[str] = "continue the run with the Rayward that started it, or choose another run.name"
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
    metrics: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommittedCheckpoint:
    """A directory whose commit file and file sizes are in order."""

    directory: str
    commit: Commit
