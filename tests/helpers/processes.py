"""Waiting for conditions, and processes of others: any of them may be gone between the look and the next."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import psutil

T = TypeVar("T")


def until(holds: Callable[[], T], timeout_s: float = 120.0, *, otherwise: Callable[[], str] = lambda: "it never held") -> T:
    """Look again and again, until there is something true to see.

    Args:
        holds: What must become true; it may raise to end the wait.
        timeout_s: How long to look.
        otherwise: What to say when it never did.

    Returns:
        What was seen.

    Raises:
        AssertionError: It did not become true in time.
    """
    end = time.monotonic() + timeout_s
    while not (seen := holds()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.02)
    return seen


def descendants(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> list[psutil.Process]:
    """What it started and what those started; nothing when it has ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        return []


def named(words: str, among: Sequence[psutil.Process] | None = None) -> list[psutil.Process]:
    """Processes whose command line, or title, holds these words: of the machine, or among some."""
    found = []
    for process in psutil.process_iter() if among is None else among:
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue
    return found


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. One that ended and waits for its parent to look does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to those that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end(processes: Sequence[psutil.Process], patience_s: float = 30.0) -> None:
    """Kill those that have not ended by themselves in time."""
    kill(psutil.wait_procs(processes, timeout=patience_s)[1])
