"""The pieces in which a queue scores: an item becomes units, each unit goes through one model in one forward, their values its result.

    item --encode--> units --forward (with units of other items)--> values --finish--> result

`Scorer.score` does the three in order for items that are all there; a server does the first beside the compute thread, in other processes,
and the second at every forward boundary for whatever waits. It is the same code, so a reward is the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout
from rayward.contract.conversation import TakenAs
from rayward.scoring.scored_model import ScoredModel
from rayward.wire.items import ItemError, ItemResult, ScoreItem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class UnitValues:
    """What a model gave for one unit.

    Attributes:
        outputs: float32 [readings, outputs] on the CPU, completion by completion.
        num_tokens_computed: the unit's part of what went through the model; over the units of a call the parts add up.
    """

    outputs: torch.Tensor
    num_tokens_computed: int


Values: TypeAlias = "UnitValues | ItemError"
"""What a model gave for one unit, or why there is nothing."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What goes through one model in one forward, whole.

    Attributes:
        member: which model of an ensemble; 0 where there is one.
        comparison: conversations with a common beginning, within the token budget where the item's own texts allow it.
        trace: whether the head is read at every token of the completions.
    """

    comparison: EncodedComparison
    member: int = 0
    trace: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens computed when it shares nothing with others."""
        return self.comparison.num_tokens


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """An item on its way: the units it became, or why it became none.

    Attributes:
        item: as it is scored, with the critiques that were written for it.
        taken_as: what became of its texts.
        token_texts: of each completion the texts of its tokens, where a trace was asked for.
    """

    item: ScoreItem
    units: tuple[Unit, ...] = ()
    error: ItemError | None = None
    taken_as: TakenAs = "templated"
    token_texts: tuple[tuple[str, ...], ...] = ()

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

    @property
    def layout(self) -> Layout:
        """Of its forwards; padded ones are as wide as their longest conversation."""
        ...

    def encoder_spec(self) -> EncoderSpec | None:
        """None where units need the model, which writes critiques first: then `encode` makes them, in the compute thread."""
        ...

    def encode(self, items: Sequence[ScoreItem]) -> list[EncodedItem]:
        """As the encoder of `encoder_spec`, here; what several of them need of the model is computed together.

        Raises:
            Exception: the device is broken, or out of memory.
        """
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


def usage(encoded: EncodedItem, values: Sequence[UnitValues]) -> dict[str, Any]:
    """What a result says of its item besides rewards: fields of `ItemResult`.

    A completion that goes through several models, or is scored after several critiques, has as many tokens as its longest conversation.
    """
    lengths: dict[int, list[int]] = {}
    for unit in encoded.units:
        prefix = len(unit.comparison.prefix_ids)
        lengths.setdefault(unit.member, []).extend(prefix + len(branch) for branch in unit.comparison.branch_ids)
    number = len(encoded.item.completions)
    parts = [found[k * (len(found) // number) : (k + 1) * (len(found) // number)] for found in lengths.values() for k in range(number)]
    return {
        "taken_as": encoded.taken_as,
        "num_tokens": tuple(max(max(part) for part in parts[k::number]) for k in range(number)),
        "tokens": sum(unit.comparison.num_tokens_unshared for unit in encoded.units),
        "tokens_computed": sum(value.num_tokens_computed for value in values),
    }


def computed(model: UnitModel, encoded: Sequence[EncodedItem]) -> list[ItemResult]:
    """The results of items, in order: one forward over the units of all of them.

    Raises: as `UnitModel.forward`.
    """
    values = iter(model.forward([unit for item in encoded for unit in item.units]))
    return [model.finish(item, [next(values) for _ in item.units]) for item in encoded]
