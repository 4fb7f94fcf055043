"""What the parts of the engine hand each other: a call, its items, and an item's way through the encoders."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any

from rayward.contract.conversation import strings_in, turns_of
from rayward.scoring.units import EncodedItem, Values
from rayward.serving.calls import ScoreCall
from rayward.serving.engine.backlog import Entry
from rayward.wire.items import ItemResult, ScoreItem

CHARS_PER_TOKEN = 4.0
"""Before the first items are encoded."""

TEXT_CHARS = 32
"""What a text costs besides its characters, on its way to a process."""

ITEM_CHARS = 200
"""What an item costs besides its characters, in a fair queue."""


@dataclass(eq=False, slots=True)
class Job:
    """One item on its way through the encoders.

    Attributes:
        owner: whoever is told of it.
        num_chars: of its texts, and some for every one of them.
        charged: False for shadow work, which waits until nothing else does.
        deaths: processes that died of it, or at the same time.
        gone: nobody waits for it any more.
    """

    owner: Any
    item: ScoreItem
    caller: str
    num_chars: int
    charged: bool = True
    deaths: int = 0
    gone: bool = False

    @property
    def cost(self) -> int:
        """Its part of a turn."""
        return self.num_chars + ITEM_CHARS


@dataclass(eq=False, slots=True)
class Work:
    """One item of a call, from its arrival to its result.

    Attributes:
        index: in the call.
        held: tokens that the backlog keeps room for until its units are there.
        num_left: units without values.
        gone: answered, or nobody waits for it any more.
        encoded_at, started_at, ended_at: when its units were there, its first forward began, its last one ended; NaN: not yet.
    """

    pending: Pending
    index: int
    item: ScoreItem
    held: int
    job: Job | None = None
    encoded: EncodedItem | None = None
    entries: list[Entry] = field(default_factory=list)
    values: list[Values | None] = field(default_factory=list)
    num_left: int = 0
    gone: bool = False
    encoded_at: float = math.nan
    started_at: float = math.nan
    ended_at: float = math.nan


@dataclass(eq=False, slots=True)
class Pending:
    """One call. Its results are set in its event loop only.

    Attributes:
        done: set when every item has a result.
        arrived, deadline: on the engine's clock.
        num_left: items without a result.
    """

    call: ScoreCall
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    arrived: float
    deadline: float
    results: list[ItemResult | None]
    works: list[Work] = field(default_factory=list)
    num_left: int = 0


def count_chars(item: ScoreItem) -> int:
    """Characters of an item's texts, and some for every text; of token ids, what as many tokens have on average."""
    turns = [turn for part in (item.prompt, *map(turns_of, item.completions)) for turn in part]
    given = [value for turn in turns for name, value in turn.items() if name != "role"]
    texts = strings_in((given, item.tools, item.chat_template_kwargs, item.critiques))
    return sum(len(text) + TEXT_CHARS for text in texts) + round(CHARS_PER_TOKEN) * len(item.token_ids or ())
