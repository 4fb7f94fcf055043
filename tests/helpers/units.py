"""A model of units without torch: a reward is the number of words, and single words say what should go wrong."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import Layout
from rayward.contract.conversation import text_of
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.units import EncodedItem, EncoderSpec, Unit
from rayward.wire.items import ItemError, ItemResult, ScoreItem


def words_item(prompt: str, *completions: str) -> ScoreItem:
    return ScoreItem(({"role": "user", "content": prompt},), completions or ("yes",))


def ids_of(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) >> 1 for word in text.split()]


def comparison(prompt: Sequence[int], *completions: Sequence[int]) -> EncodedComparison:
    shared = len(prompt) if len(completions) > 1 else len(prompt) + len(completions[0]) - 1
    whole = [[*prompt, *completion] for completion in completions]
    return EncodedComparison(
        id="item",
        prefix_ids=np.array(whole[0][:shared], dtype=np.int32),
        branch_ids=tuple(np.array(ids[shared:], dtype=np.int32) for ids in whole),
        labels=Labels(),
        text_starts=tuple(len(prompt) for _ in completions),
    )


@dataclass(frozen=True)
class WordsSpec:
    """`dies_at_start`, `raises_at_start`: what happens when it is loaded."""

    at_start: str = ""

    def load(self) -> WordsEncoder:
        if self.at_start == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at_start:
            raise ValueError(self.at_start)
        return WordsEncoder()


class WordsEncoder:
    """One unit an item. Acts on the first word of a prompt."""

    def encode(self, item: ScoreItem) -> EncodedItem:
        prompt = item.prompt[0]["content"]
        first, _, rest = prompt.partition(" ")
        if first == "loop":
            while True:
                pass
        elif first == "backtrack":
            re.match(r"(a+)+$", "a" * 64 + "b")
        elif first == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif first == "kill-once":
            # Only the first process that meets it dies.
            if not os.path.exists(rest):
                open(rest, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        elif first == "recurse":
            return self.encode(item)
        elif first == "memory":
            return EncodedItem(item, error=ItemError("failed", str(len(bytearray(1 << 50)))))
        elif first == "fill":
            hoard: list[Any] = []
            while True:
                hoard.append(bytearray(1 << 26))
        elif first == "raise":
            raise TypeError(f"quotes {rest}")
        elif first == "sleep":
            time.sleep(float(rest.split()[0]))
        elif first == "refuse":
            return EncodedItem(item, error=ItemError("too_long", "refused"))
        return EncodedItem(item, (Unit(comparison(ids_of(prompt), *(ids_of(text_of(c)) for c in item.completions))),))


FACTS = ModelFacts(("reward",), 1000, (), None)


@dataclass
class WordsModel:
    """Counts words. Forwards are recorded; `gate` holds them until it is set, `fault` may raise.

    Attributes:
        in_process: items are encoded by the model itself.
    """

    fault: Callable[[Sequence[Unit]], None] = lambda units: None
    in_process: bool = False
    spec: WordsSpec = WordsSpec()
    gate: threading.Event = field(default_factory=threading.Event)
    forwards: list[list[Unit]] = field(default_factory=list)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    facts: ModelFacts = FACTS
    model_id: str = "words"
    version: str = "words-1"
    layout: Layout = "packed"

    def __post_init__(self) -> None:
        self.gate.set()

    def encoder_spec(self) -> EncoderSpec | None:
        return None if self.in_process else self.spec

    def encode(self, items: Sequence[ScoreItem]) -> list[EncodedItem]:
        return [self.encode_item(item) for item in items]

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        return WordsEncoder().encode(item)

    def forward(self, units: Sequence[Unit]) -> list[Any]:
        self.forwards.append(list(units))
        self.started.release()
        assert self.gate.wait(30)
        self.fault(units)
        return [[len(ids) + len(unit.comparison.prefix_ids) for ids in unit.comparison.branch_ids] for unit in units]

    def finish(self, encoded: EncodedItem, values: Sequence[Any]) -> ItemResult:
        if isinstance(values[0], ItemError):
            return ItemResult(error=values[0])
        lengths = [length for value in values for length in value]
        return ItemResult(rewards=tuple(map(float, lengths)), num_tokens=tuple(lengths), tokens=sum(lengths), tokens_computed=sum(lengths))

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        encoded = [self.encode_item(item) for item in items]
        return [self.finish(found, self.forward(found.units)) for found in encoded]
