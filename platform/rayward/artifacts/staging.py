"""Directories that appear whole or not at all: filled beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayward.contract.contract import CONTRACT_FILE
from rayward.errors import ConfigError


@contextmanager
def staged(output: Path, *, replace: bool) -> Iterator[Path]:
    """A directory to fill; it becomes `output` when the block ends, and vanishes when the block fails.

    Args:
        replace: an exported model at `output` makes way, as a whole and only at the end.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """
    _refuse(output, replace=replace)
    _remove_abandoned(output)
    # The process is in the name, so that what a killed one left is known and removed by the next.
    partial = output.with_name(f"{output.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        _refuse(output, replace=replace)
        _publish(partial, output)
    finally:
        # After a swap this is the old directory; whoever has its files open keeps them.
        shutil.rmtree(partial, ignore_errors=True)


def _refuse(output: Path, *, replace: bool) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output} exists and is no directory of its own", remedy="choose another directory")
    if not output.exists():
        return
    if not replace:
        raise ConfigError(f"{output} exists already", remedy="choose another directory")
    if not (output / CONTRACT_FILE).is_file() and any(output.iterdir()):
        raise ConfigError(f"{output} exists and is not an exported model", remedy="choose another directory")


def _publish(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
    elif not _swap(partial, output):
        old = output.with_name(f"{output.name}.replaced-{uuid.uuid4().hex[:8]}")
        output.rename(old)
        try:
            partial.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swap(first: Path, second: Path) -> bool:
    # renameat2 with RENAME_EXCHANGE: at no moment is there no directory of the name. False where system or filesystem has it not.
    at_fdcwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), exchange) == 0


def _remove_abandoned(output: Path) -> None:
    host = socket.gethostname()
    for path in output.parent.glob(f"{glob.escape(output.name)}.partial-{glob.escape(host)}-*"):
        process = path.name.rsplit("-", 2)[1]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
