"""The driver's view of a run: follows `metrics.jsonl` and shows it on the terminal."""

from __future__ import annotations

import json
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rayward import storage

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
            except FileNotFoundError:
                continue
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
