"""What a run tells while it goes: metrics as JSON lines and TensorBoard events, and lines on the driver's terminal."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pyarrow.fs as pafs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rayward import storage

logger = logging.getLogger(__name__)

GAP_WARNING_NATS = 0.1
"""Validation loss above the training loss since the last validation by more than this, and by more than then: the gap has opened."""


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run, written by rank 0.

    Lines of steps that will be trained again after a resume are dropped, so the file tells one trajectory. Locally a line is on
    disk when `write` returns; on remote storage the file is written when a checkpoint is. A full disk never stops training:
    lines wait until they can be written.
    """

    def __init__(self, location: str, *, first_step: int, tensorboard: bool) -> None:
        self._filesystem, root = storage.resolve(location)
        self._path = f"{root}/metrics.jsonl"
        self._local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._filesystem.create_dir(root)
        self._lines = self._kept(first_step)  # written as a whole: all of them remotely, those still waiting locally
        self._rewrite()
        self._events = None
        if tensorboard and self._local:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(f"{root}/tensorboard", purge_step=first_step)

    def _kept(self, first_step: int) -> list[str]:
        if not storage.exists(self._filesystem, self._path):
            return []
        kept = []
        for line in storage.read_text(self._filesystem, self._path).splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line that a killed writer left half written
        return kept

    def _rewrite(self) -> None:
        storage.write_text(self._filesystem, self._path, "".join(line + "\n" for line in self._lines))
        if self._local:
            self._lines.clear()

    def note(self, step: int, message: str) -> None:
        """A line for people, shown by the driver."""
        self._append({"step": step, "kind": "note", "message": message})

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        self._append({"step": step, "kind": kind, **metrics})
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        if not self._local:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in self._lines))
            self._lines.clear()
        except OSError as exc:
            logger.warning("%s cannot be written (%s); %d lines wait", self._path, exc, len(self._lines))

    def flush(self) -> None:
        """Bring remote storage up to date."""
        if self._local:
            return
        try:
            self._rewrite()
        except OSError as exc:
            logger.warning("%s cannot be written (%s); the next checkpoint tries again", self._path, exc)

    def close(self) -> None:
        self.flush()
        if self._events is not None:
            self._events.close()


def over_fitting(step: int, validation_loss: float, train_loss: float) -> str:
    """The warning that the gap between training and validation loss has opened."""
    return (
        f"warning: at step {step} the validation loss {validation_loss:.4f} is {validation_loss - train_loss:.4f} above the training loss "
        f"since the last validation, {train_loss:.4f}: the model begins to over-fit; take the checkpoint before "
        "(rayward export --checkpoint best), or train less (training.num_epochs, training.max_steps)"
    )


POLL_S = 0.5
NUM_PLAIN_LINES = 20


def follow(location: str, total_steps: int, stop: threading.Event) -> None:
    """Show a progress bar on a terminal, about twenty lines elsewhere (job logs), until `stop` is set and all is shown."""
    filesystem, root = storage.resolve(location)
    path = f"{root}/metrics.jsonl"
    console = Console(stderr=False, soft_wrap=True)
    shown = 0
    due = every = max(1, total_steps // NUM_PLAIN_LINES)
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting workers", total=total_steps)
        finished = False
        while not finished:
            finished = stop.wait(POLL_S)
            try:
                lines = storage.read_text(filesystem, path).splitlines()
            except OSError:
                continue  # not there yet, or the storage does not answer: at the next look
            if len(lines) < shown:
                shown = 0  # a restarted worker dropped the lines that it trains again
            for line in lines[shown:]:
                record = _parse(line)
                if record is None:
                    break  # half written: complete at the next look
                shown += 1
                if record["kind"] == "train":
                    progress.update(task, completed=record["step"], description=_describe(record))
                    if not console.is_terminal and record["step"] >= due:
                        due = min(total_steps, (record["step"] // every + 1) * every)
                        console.print(f"step {record['step']}/{total_steps}  {_describe(record)}")
                elif record["kind"] == "note":
                    console.print(record["message"])
                elif record["kind"] == "validation":
                    console.print(f"validation at step {record['step']}: accuracy {record['accuracy']:.3f}  loss {record['loss']:.4f}")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record


def _describe(record: dict[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}  margin {record['margin']:.3f}  "
        f"gradient {record['gradient_norm']:.2f}  {record['tokens_per_s']:.0f} tokens/s  {record['comparisons_per_s']:.1f} comparisons/s"
    )
