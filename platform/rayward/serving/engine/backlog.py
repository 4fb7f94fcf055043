"""What waits for the compute thread of a replica, measured in tokens. Pure: it is told the time, and knows neither threads nor models."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from rayward.errors import OverloadedError
from rayward.scoring.units import Unit
from rayward.serving.engine.fair import FairQueue

SHARED_TOKENS = 16
"""Prompts shorter than these are not looked for in other requests."""

PADDED_WINDOW = 4
"""Among how many forwards' worth of waiting units those of a similar length are found, where a forward is as wide as its longest."""

SHADOW_SHARE = 0.25
"""Uncharged work may wait up to this share of the bound, and goes as soon as the rest of the bound is needed."""

GONE_KEPT = 1000
"""Discarded units beyond the number of those that wait, after which all discarded ones are let go."""

SPEED_FORWARDS = 64
"""Forwards over which the speed is measured."""

State: TypeAlias = Literal["waiting", "taken", "gone"]
PromptKey: TypeAlias = tuple[int, bytes]


@dataclass(eq=False, slots=True)
class Entry:
    """One unit that waits.

    Attributes:
        owner: whoever is told of it; the backlog does not look.
        caller: whose turn it takes.
        deadline: on the backlog's clock; not computed after it.
        charged: False for shadow work.
        alone: nothing else is in its forward.
        arrived: when it began to wait.
    """

    owner: Any
    unit: Unit
    caller: str
    deadline: float = math.inf
    charged: bool = True
    alone: bool = False
    arrived: float = 0.0
    state: State = "waiting"
    prompt: PromptKey | None = field(init=False)
    num_tokens: int = field(init=False)
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.unit.num_tokens
        self.prompt, self.num_prompt_tokens = _prompt_of(self.unit)

    @property
    def width(self) -> int:
        """Tokens of its longest conversation."""
        comparison = self.unit.comparison
        return len(comparison.prefix_ids) + max(map(len, comparison.branch_ids))


def _waits(entry: Entry) -> bool:
    return entry.state == "waiting"


def _prompt_of(unit: Unit) -> tuple[PromptKey | None, int]:
    # By its ids up to where the first completion begins, where all its completions have these in common.
    comparison = unit.comparison
    start = min(comparison.text_starts or (0,))
    if start < SHARED_TOKENS:
        return None, 0
    ids = comparison.prefix_ids
    if len(ids) < start:
        if comparison.num_completions > 1:
            return None, 0
        ids = np.concatenate([ids, comparison.branch_ids[0]])
    return (unit.member, ids[:start].tobytes()), start


class Speed:
    """Tokens a second while something is computed: what half of the tokens of the last forwards were computed at, or faster.

    A median, because a first forward, or one that a kernel is compiled for, may take a thousand times as long; by tokens, because small
    forwards say little about what a full one does.
    """

    def __init__(self) -> None:
        self._forwards: deque[tuple[float, int]] = deque(maxlen=SPEED_FORWARDS)
        self.tokens_per_s = 0.0
        """0 until it is known."""

    def add(self, num_tokens: int, seconds: float) -> None:
        """One forward."""
        self._forwards.append((num_tokens / max(seconds, 1e-9), num_tokens))
        half = sum(tokens for _, tokens in self._forwards) / 2
        for speed, tokens in sorted(self._forwards, reverse=True):
            self.tokens_per_s = speed
            half -= tokens
            if half <= 0:
                return


@dataclass(frozen=True, slots=True)
class Taken:
    """What one forward computes, and what was found too late for any."""

    entries: list[Entry]
    expired: list[Entry]

    @property
    def num_tokens(self) -> int:
        """Tokens of the units, each for itself."""
        return sum(entry.num_tokens for entry in self.entries)


class Backlog:
    """The waiting units of one replica.

    Whose turn it is goes by tokens, so that ten thousand items of one caller do not stand before one of another. A unit whose prompt waits
    in other units takes them along, for that prompt is computed once. Shadow work is taken when nothing else waits.

    Args:
        max_tokens: bound on what may wait, for as long as the speed is not known, and at most.
        max_s: the same bound in seconds of work at the measured speed.
        padded: forwards are as wide as their longest conversation and share no prompts.
    """

    def __init__(self, *, max_tokens: int, max_s: float, padded: bool = False) -> None:
        self.speed = Speed()
        self._max_tokens = max_tokens
        self._max_s = max_s
        self._padded = padded
        self._charged: FairQueue[Entry] = FairQueue(_waits)
        self._uncharged: FairQueue[Entry] = FairQueue(_waits)
        self._by_prompt: dict[PromptKey, dict[Entry, None]] = {}
        self._tokens = {True: 0, False: 0}
        self._held = {True: 0, False: 0}
        self._num_entries = 0
        self._num_gone = 0

    def __len__(self) -> int:
        return self._num_entries

    @property
    def num_callers(self) -> int:
        """Callers whose charged units wait."""
        return self._charged.num_callers

    @property
    def queued_tokens(self) -> int:
        """Charged tokens that wait, are on their way to the queue, or are computed."""
        return self._tokens[True] + self._held[True]

    @property
    def shadow_tokens(self) -> int:
        """The same of shadow work."""
        return self._tokens[False] + self._held[False]

    @property
    def bound(self) -> float:
        """Tokens that may wait, at the speed measured now."""
        speed = self.speed.tokens_per_s
        return min(float(self._max_tokens), self._max_s * speed) if speed else float(self._max_tokens)

    def hold(self, num_tokens: int, *, charged: bool = True) -> None:
        """Room for work that is on its way; a call that is larger than the bound has room when nothing else is there.

        Raises:
            OverloadedError: there is no room; nothing was held.
        """
        bound = self.bound if charged else self.bound * SHADOW_SHARE
        held = self.queued_tokens if charged else self.shadow_tokens
        crowded = not charged and self.queued_tokens > self.bound * (1 - SHADOW_SHARE)
        if (held and held + num_tokens > bound) or crowded:
            speed = self.speed.tokens_per_s
            wait_s = (self.queued_tokens + num_tokens - bound) / speed if speed else 1.0
            raise OverloadedError(
                f"{held} tokens wait on this replica, and {num_tokens} more are over its bound of {round(bound)}"
                + (f" ({self._max_s:g} s of its work)" if bound < self._max_tokens else ""),
                remedy="send less at once and retry after the given delay, or add replicas",
                retry_after_s=min(max(wait_s, 0.1), self._max_s),
            )
        self._held[charged] += num_tokens

    def release(self, num_tokens: int, *, charged: bool = True) -> None:
        """Held or taken work is computed, gone, or has been put as entries."""
        self._held[charged] -= num_tokens

    def put(self, entries: Sequence[Entry]) -> None:
        """Entries at the end of their caller's."""
        for entry in entries:
            self._queue(entry).push(entry.caller, entry, entry.num_tokens)
            self._tokens[entry.charged] += entry.num_tokens
            self._num_entries += 1
            if entry.prompt is not None and not self._padded and not entry.alone and entry.charged:
                self._by_prompt.setdefault(entry.prompt, {})[entry] = None

    def discard(self, entry: Entry) -> bool:
        """Nobody waits for it any more; whether it had been waiting."""
        if entry.state != "waiting":
            return False
        self._remove(entry, "gone")
        self._num_gone += 1
        if self._num_gone > GONE_KEPT + self._num_entries:
            for queue in (self._charged, self._uncharged):
                queue.tidy()
            self._num_gone = 0
        return True

    def drain(self) -> list[Entry]:
        """Everything that waits, which waits no longer."""
        found: list[Entry] = []
        for queue in (self._charged, self._uncharged):
            while (entry := queue.pop()) is not None:
                self._remove(entry, "gone")
                found.append(entry)
        return found

    def take(self, budget: int, now: float) -> Taken:
        """The next forward: at least one unit where any waits, more as long as they fit.

        What was taken stays counted until it is released.

        Args:
            budget: tokens; only a unit that is larger itself exceeds it.
            now: units whose deadline has passed are `expired`.
        """
        taken = Taken([], [])
        queue = self._charged
        first = self._next(queue, now, taken)
        if first is None:
            queue = self._uncharged
            first = self._next(queue, now, taken)
        if first is None:
            return taken
        if first.alone:
            self._take(first, taken)
            return taken
        if self._padded:
            self._fill_padded(queue, first, budget, now, taken)
        else:
            self._fill_packed(queue, first, budget, now, taken)
        return taken

    def _fill_packed(self, queue: FairQueue[Entry], first: Entry, budget: int, now: float, taken: Taken) -> None:
        used, entry = 0, first
        while True:
            self._take(entry, taken)
            used += entry.num_tokens
            used = self._take_mates(queue, entry, budget, used, now, taken)
            if used >= budget:
                return
            following = self._next(queue, now, taken)
            if following is None:
                return
            if following.alone or used + following.num_tokens > budget:
                # It is the first of the next forward.
                queue.push(following.caller, following, following.num_tokens, first=True)
                return
            entry = following

    def _take_mates(self, queue: FairQueue[Entry], entry: Entry, budget: int, used: int, now: float, taken: Taken) -> int:
        # Units with the prompt of one that is computed cost their completions only, whoever asks for them.
        mates = self._by_prompt.get(entry.prompt, ()) if entry.prompt is not None else ()
        for mate in list(mates):
            cost = mate.num_tokens - mate.num_prompt_tokens
            if used + cost > budget:
                break
            if mate.deadline <= now:
                self._remove(mate, "gone")
                taken.expired.append(mate)
                continue
            self._take(mate, taken)
            queue.charge(mate.caller, cost)
            used += cost
        return used

    def _fill_padded(self, queue: FairQueue[Entry], first: Entry, budget: int, now: float, taken: Taken) -> None:
        waiting: list[Entry] = []
        seen = first.num_tokens
        while seen < budget * PADDED_WINDOW and (entry := self._next(queue, now, taken)) is not None:
            waiting.append(entry)
            seen += entry.num_tokens
            if entry.alone:
                break
        self._take(first, taken)
        width, rows = first.width, first.unit.comparison.num_completions
        chosen: set[int] = set()
        for index in sorted(range(len(waiting)), key=lambda i: (abs(waiting[i].width - first.width), i)):
            entry = waiting[index]
            wider = max(width, entry.width)
            more = rows + entry.unit.comparison.num_completions
            if entry.alone or wider * more > budget:
                break
            width, rows = wider, more
            chosen.add(index)
            self._take(entry, taken)
        for index in reversed(range(len(waiting))):
            if index not in chosen:
                queue.push(waiting[index].caller, waiting[index], waiting[index].num_tokens, first=True)

    def _queue(self, entry: Entry) -> FairQueue[Entry]:
        return self._charged if entry.charged else self._uncharged

    def _next(self, queue: FairQueue[Entry], now: float, taken: Taken) -> Entry | None:
        while (entry := queue.pop()) is not None:
            if entry.deadline > now:
                return entry
            queue.charge(entry.caller, -entry.num_tokens)
            self._remove(entry, "gone")
            taken.expired.append(entry)
        return None

    def _take(self, entry: Entry, taken: Taken) -> None:
        self._remove(entry, "taken")
        self._held[entry.charged] += entry.num_tokens
        taken.entries.append(entry)

    def _remove(self, entry: Entry, state: State) -> None:
        entry.state = state
        self._tokens[entry.charged] -= entry.num_tokens
        self._num_entries -= 1
        mates = self._by_prompt.get(entry.prompt) if entry.prompt is not None else None
        if mates is not None and entry.prompt is not None:
            mates.pop(entry, None)
            if not mates:
                del self._by_prompt[entry.prompt]
