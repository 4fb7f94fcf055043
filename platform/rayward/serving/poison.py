"""Which items were there when replicas died.

One death makes suspects of all that were there; a second one, of an item that was computed alone, names the cause.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from rayward.schema import digest
from rayward.storage import resolve, write_text
from rayward.wire.items import ScoreItem

logger = logging.getLogger("ray.serve")

HOLD_S = 600.0
"""How long an item is suspected, or refused, after the last death that it was there at."""

MAX_KNOWN = 100_000
"""Items that are remembered; the oldest are forgotten first."""


def content_hash(item: ScoreItem) -> str:
    """Names what is computed of an item: its texts and what its template is given, not what is asked of the rewards."""
    texts = (item.form, item.prompt, item.completions, item.tools, item.chat_template_kwargs, item.critiques)
    return digest((*texts, item.prompt_text, item.token_ids))


class Quarantine:
    """Suspects and convicts by content, for a while.

    Args:
        clock: monotonic seconds.
        hold_s: how long each is remembered.
    """

    def __init__(self, clock: Callable[[], float], *, hold_s: float = HOLD_S, max_known: int = MAX_KNOWN) -> None:
        self._clock = clock
        self._hold_s = hold_s
        self._max_known = max_known
        # Content hash -> when it is forgotten, in that order.
        self._suspects: OrderedDict[str, float] = OrderedDict()
        self._convicts: OrderedDict[str, float] = OrderedDict()
        self._untold: list[str] = []

    @property
    def num_convicts(self) -> int:
        """Contents that are refused now."""
        self._forget()
        return len(self._convicts)

    def split(self, items: Sequence[ScoreItem]) -> tuple[list[int], list[int], list[int]]:
        """Indices of the items that may be computed in company, of those that must be alone, and of those that are refused."""
        self._forget()
        if not self._suspects and not self._convicts:
            return list(range(len(items))), [], []
        company: list[int] = []
        alone: list[int] = []
        refused: list[int] = []
        for index, item in enumerate(items):
            name = content_hash(item)
            (refused if name in self._convicts else alone if name in self._suspects else company).append(index)
        return company, alone, refused

    def suspect(self, items: Sequence[ScoreItem]) -> None:
        """They were in company when a replica died: each will be alone from now on."""
        for item in items:
            name = content_hash(item)
            if name not in self._convicts:
                self._remember(self._suspects, name)

    def convict(self, item: ScoreItem) -> None:
        """It was alone when a replica died, after another had died of its company."""
        name = content_hash(item)
        self._untold.append(name)
        self._convict(name)

    def untold(self) -> list[str]:
        """Hashes that were convicted here since the last call."""
        told, self._untold = self._untold, []
        return told

    def hear(self, names: Collection[str]) -> None:
        """Hashes that were convicted elsewhere."""
        for name in names:
            if name not in self._convicts:
                self._convict(name)

    def clear(self, item: ScoreItem) -> None:
        """It was answered alone: it was no cause."""
        self._suspects.pop(content_hash(item), None)

    def _convict(self, name: str) -> None:
        self._suspects.pop(name, None)
        self._remember(self._convicts, name)

    def _remember(self, book: OrderedDict[str, float], name: str) -> None:
        book[name] = self._clock() + self._hold_s
        book.move_to_end(name)
        while len(book) > self._max_known:
            book.popitem(last=False)

    def _forget(self) -> None:
        now = self._clock()
        for book in (self._suspects, self._convicts):
            while book and next(iter(book.values())) <= now:
                book.popitem(last=False)


class Convictions:
    """What the ingresses of one application tell each other: an empty file for each content, named by its hash and when it is forgotten.

    Args:
        location: directory or URI.
        now: seconds since 1970; of several machines, whose clocks may differ by little of `HOLD_S`.
    """

    def __init__(self, location: str, *, now: Callable[[], float] = time.time) -> None:
        self._filesystem, self._root = resolve(location)
        self._now = now

    def exchange(self, names: Collection[str]) -> set[str]:
        """Add hashes; all that are there. Storage that does not answer is logged: this process goes on by what it knows."""
        try:
            for name in names:
                write_text(self._filesystem, f"{self._root}/{name}-{self._now() + HOLD_S:.0f}", "")
            return self._read()
        except (OSError, pa.ArrowException) as exc:
            logger.warning("what other ingresses know of poisonous items cannot be read or told (%s)", exc)
            return set(names)

    def _read(self) -> set[str]:
        found = set()
        for info in self._filesystem.get_file_info(pafs.FileSelector(self._root, allow_not_found=True)):
            name, _, until = info.base_name.rpartition("-")
            if not name or not until.isdecimal():
                continue
            if int(until) > self._now():
                found.add(name)
            else:
                self._forget(info.path)
        return found

    def _forget(self, path: str) -> None:
        try:
            self._filesystem.delete_file(path)
        except FileNotFoundError:
            # Another ingress was faster.
            return
