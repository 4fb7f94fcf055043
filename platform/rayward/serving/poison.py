"""Which items were there when replicas died.

One death makes suspects of all that were there; a second one, of an item that was computed alone, names the cause.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from rayward.schema import digest
from rayward.wire.items import ScoreItem

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
        self._suspects.pop(name, None)
        self._remember(self._convicts, name)

    def clear(self, item: ScoreItem) -> None:
        """It was answered alone: it was no cause."""
        self._suspects.pop(content_hash(item), None)

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
