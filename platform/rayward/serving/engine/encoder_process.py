"""What an encoder process does: read items, make them units, write them back, one at a time. Loads no torch and no Ray.

parent -> child   pickled EncoderSpec, then lists of (ticket, ScoreItem)
child -> parent   Ready or Unready, then (ticket, EncodedItem without the item, or with it where the encoder changed it)
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from rayward.errors import RaywardError
from rayward.scoring.units import EncodedItem, ItemEncoder
from rayward.wire.items import ItemError, ScoreItem

PR_SET_PDEATHSIG = 1
STAND_IN = ScoreItem((), ())
"""Stands for the item in what is sent back: its sender has it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The encoder is loaded."""


@dataclass(frozen=True, slots=True)
class Unready:
    """The encoder cannot be loaded.

    Attributes:
        error: `RaywardError.to_json`, or the type and words of another exception.
        typed: it is the former.
    """

    error: str
    typed: bool


class _WithoutTexts(logging.Formatter):
    # Exceptions of templates and tokenizers quote what they were given.
    def formatException(self, ei: Any) -> str:  # noqa: N802
        return f"  {ei[0].__name__ if ei[0] else 'exception'} (its words may quote the text and are left out)"


def encode(encoder: ItemEncoder, item: ScoreItem) -> EncodedItem:
    """The encoded item without its item, where it is the one given."""
    try:
        found = encoder.encode(item)
    # Broad on purpose: the process is for the items of everybody. Interrupts and exits of a template are nobody's but its own either.
    except BaseException as exc:
        if isinstance(exc, KeyboardInterrupt):
            raise
        found = EncodedItem(item, error=ItemError.of("failed", f"{type(exc).__name__} while it was made into tokens"))
    return replace(found, item=STAND_IN) if found.item is item else found


def _bound_memory(headroom_bytes: int) -> None:
    # Data, not address space: threads of the tokenizer reserve much of that and use none of it.
    used = 0
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                used = int(line.split()[1]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + headroom_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _die_with_parent(parent: int) -> None:
    # It may be in the middle of a loop that never reads the pipe's end.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Where memory runs out, it goes before the process that holds the model; a container may not let it say so.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("1000")


def main() -> None:
    """Serve a pipe until it is closed.

    Arguments of the command line: its file descriptor, the process id of the parent, bytes of memory beside what the tokenizer takes.
    """
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    if sys.platform == "linux":
        _die_with_parent(parent)
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutTexts("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Transformers imports torch wherever there is one: seconds and hundreds of megabytes that no tokenizer needs.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        encoder = pickle.loads(pipe.recv_bytes()).load()
    # Broad on purpose: whatever it is, the parent says it.
    except Exception as exc:
        typed = isinstance(exc, RaywardError)
        pipe.send(Unready(exc.to_json() if isinstance(exc, RaywardError) else f"{type(exc).__name__}: {exc}", typed))
        return
    if sys.platform == "linux":
        _bound_memory(int(sys.argv[3]))
    pipe.send(Ready())
    while True:
        try:
            jobs: list[tuple[int, ScoreItem]] = pipe.recv()
        except EOFError:
            return
        for ticket, item in jobs:
            pipe.send((ticket, encode(encoder, item)))
