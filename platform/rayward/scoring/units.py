"""The pieces in which a queue scores: an item becomes units, each unit goes through one model in one forward, their values its result.

    item --encode--> units --forward (with units of other items)--> values --finish--> result

`Scorer.score` does the three in order for items that are all there; a server does the first beside the compute thread, in other processes,
and the second at every forward boundary for whatever waits. It is the same code, so a reward is the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from rayward.batch.comparison import EncodedComparison
from rayward.scoring.scored_model import ScoredModel
from rayward.wire.items import ItemError, ItemResult, ScoreItem

if TYPE_CHECKING:
    import torch

Values: TypeAlias = "torch.Tensor | ItemError"
"""float32 [readings, outputs] of one unit on the CPU, or why there are none."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What goes through one model in one forward, whole.

    Attributes:
        member: which model of an ensemble; 0 where there is one.
        comparison: conversations with a common beginning, within the token budget where the item's own texts allow it.
    """

    comparison: EncodedComparison
    member: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed when it shares nothing with others."""
        return self.comparison.num_tokens


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """An item on its way: the units it became, or why it became none."""

    item: ScoreItem
    units: tuple[Unit, ...] = ()
    error: ItemError | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that it adds to a backlog."""
        return sum(unit.num_tokens for unit in self.units)


class ItemEncoder(Protocol):
    """Texts to units, by the contract; loads without torch, in a process of its own."""

    def encode(self, item: ScoreItem) -> EncodedItem:
        """Whatever the item does ends in its own error."""
        ...


class EncoderSpec(Protocol):
    """A small picklable record that makes the encoder in another process."""

    def load(self) -> ItemEncoder:
        """Reads tokenizer and contract."""
        ...


class UnitModel(ScoredModel, Protocol):
    """What a server needs of something that scores, besides `score`."""

    def encoder_spec(self) -> EncoderSpec | None:
        """None where units need the model, which writes critiques first: then `encode_item` makes them, in the compute thread."""
        ...

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        """As the encoder of `encoder_spec`, here."""
        ...

    def forward(self, units: Sequence[Unit]) -> list[Values]:
        """The values of every unit, in order; whatever one of them does ends in its own value. Prefixes are shared across units.

        Raises:
            Exception: the device is broken, or out of memory for a single unit.
        """
        ...

    def finish(self, encoded: EncodedItem, values: Sequence[Values]) -> ItemResult:
        """The result of an item from the values of its units."""
        ...
