"""Items to units, by the contract: everything before the forward, in any process. Needs neither torch nor Ray.

A scorer encodes with it in its own process; a server sends an `EncoderSpec` to processes beside the one that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rayward.batch.comparison import EncodedComparison, comparison_of, shared_prefix_length
from rayward.contract.contract import Contract
from rayward.contract.conversation import TakenAs
from rayward.contract.encoder import Encoder, Encoding, gate_position
from rayward.contract.rendering import Conversation
from rayward.contract.tokenizer import load_tokenizer, pick_pad
from rayward.errors import ContractMismatchError, UnsupportedMessageError
from rayward.schema import file_sha256
from rayward.scoring.isolation import each
from rayward.scoring.scored_model import ModelFacts, check_ids
from rayward.scoring.units import EncodedItem, ItemEncoder, Unit
from rayward.wire.items import Asked, ItemError, ScoreItem

ENCODING = "while it was made into tokens"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja")


@dataclass(frozen=True, slots=True)
class UnitRules:
    """What decides the units of an item besides contract and tokenizer.

    Attributes:
        facts: what the model can be asked for.
        vocabulary: ids that it has embeddings for.
        tokens_per_batch: budget of a forward; larger comparisons are split.
        gated: whether a head reads the prompt.
        alone: every completion is a unit of its own, so that its reward is bitwise the same in any company.
        num_members: models that each unit goes through.
        why_no_trace: why there is no reward at every token, or None.
    """

    facts: ModelFacts
    vocabulary: int
    tokens_per_batch: int
    gated: bool = False
    alone: bool = False
    num_members: int = 1
    why_no_trace: str | None = None


class TextEncoder:
    """The encoder of one model."""

    def __init__(self, encoder: Encoder, rules: UnitRules) -> None:
        self._encoder, self._rules = encoder, rules

    def encode(self, item: ScoreItem) -> EncodedItem:
        """Its units, or its error, whatever it does."""
        refusal = self.refusal(item)
        if refusal is not None:
            return EncodedItem(item, error=refusal)
        (found,) = each([item], self._encoded, doing=ENCODING)
        return EncodedItem(item, error=found) if isinstance(found, ItemError) else found

    def refusal(self, item: ScoreItem) -> ItemError | None:
        """Why this model has not what is asked for, or None."""
        refusal = self._rules.facts.refusal(item.asked)
        if refusal is None and item.trace and self._rules.why_no_trace is not None:
            return ItemError("no_trace", f"this model has no reward at every token: {self._rules.why_no_trace}")
        return refusal

    def _encoded(self, item: ScoreItem) -> EncodedItem:
        conversations, reading = self._conversations(item), self._encoder.contract.reading
        # What a model says step by step is in every result.
        trace = item.trace and (reading is None or reading.at == "tokens")
        units = [
            Unit(comparison, member, trace)
            for comparison in self.split(conversations, gated=self._rules.gated)
            for member in range(self._rules.num_members)
        ]
        return EncodedItem(
            item,
            tuple(units),
            taken_as=next((found.taken_as for found in conversations if found.taken_as != "templated"), "templated"),
            token_texts=tuple(self._token_texts(found) for found in conversations) if trace else (),
        )

    def _token_texts(self, conversation: Encoding) -> tuple[str, ...]:
        return self._encoder.token_texts(conversation.ids[min(conversation.text_start, len(conversation.ids) - 1) :])

    def plain_comparisons(self, item: ScoreItem, *, gated: bool) -> list[EncodedComparison]:
        """The conversations as they end, whatever the head reads; raises as `Encoder.encode_sure`."""
        if item.form != "conversation":
            return self.split(self._texts(item), gated=gated)
        found = self._encoder.encode_sure([Conversation(item.prompt, text, None, item.inputs) for text in item.completions])
        return self.split(found, gated=gated)

    def _texts(self, item: ScoreItem) -> list[Encoding]:
        reading = self._encoder.contract.reading
        separator = None if reading is None else reading.separator
        if item.form == "tokens":
            if self._rules.num_members > 1:
                raise UnsupportedMessageError(
                    "the reward is a sum over the completion, and token ids do not show where it begins", remedy="send texts"
                )
            return [self._encoder.encode_ids(item.token_ids or ())]
        texts = [text for text in item.completions if isinstance(text, str)]
        return [self._encoder.encode_text(text, prompt_text=item.prompt_text, separator=separator) for text in texts]

    def _conversations(self, item: ScoreItem) -> list[Encoding]:
        # Of each completion one conversation, or one for each of its critiques.
        if item.form != "conversation":
            return self._texts(item)
        reading, critiques = self._encoder.contract.reading, item.critiques
        given: Sequence[Sequence[str | None]] = [[None]] * len(item.completions)
        if critiques is not None and self._rules.facts.writes_critiques:
            given = critiques
        asked = [
            Conversation(item.prompt, text, each, item.inputs) for text, of in zip(item.completions, given, strict=True) for each in of
        ]
        return self._encoder.encode_sure(asked, separator=None if reading is None else reading.separator)

    def split(self, conversations: Sequence[Encoding], *, gated: bool) -> list[EncodedComparison]:
        """Conversations of one prompt as comparisons within the budget.

        Raises:
            TokenRangeError: the model has no embedding for an id.
            ContractError: the prompt has no place that the gate reads.
        """
        check_ids((conversation.ids for conversation in conversations), self._rules.vocabulary)
        found = []
        for group, prefix in self._groups(conversations):
            gates = tuple(gate_position(self._encoder.contract, encoding.ids, encoding.text_start) for encoding in group) if gated else None
            found.append(comparison_of("item", group, prefix=prefix, gate_positions=gates))
        return found

    def _groups(self, conversations: Sequence[Encoding]) -> Iterator[tuple[list[Encoding], int]]:
        if self._rules.alone:
            yield from (([conversation], len(conversation.ids) - 1) for conversation in conversations)
            return
        # Truncation is decided per completion, so prefixes are compared as ids, not as text.
        prefix = shared_prefix_length([conversation.ids for conversation in conversations])
        group: list[Encoding] = []
        used = prefix
        for conversation in conversations:
            length = len(conversation.ids) - prefix
            if group and used + length > self._rules.tokens_per_batch:
                yield group, prefix
                group, used = [], prefix
            group.append(conversation)
            used += length
        yield group, prefix


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """What makes a `TextEncoder` in another process.

    Attributes:
        directory: where the tokenizer lies.
        files: sha256 of its files, by name: a directory may be written over between two loads.
    """

    directory: str
    contract: Contract
    rules: UnitRules
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path, contract: Contract, rules: UnitRules) -> TextEncoderSpec:
        """The spec of a loaded model; golden scores are not needed to encode."""
        return cls(str(directory), contract.model_copy(update={"golden": ()}), rules, _tokenizer_files(directory))

    def load(self) -> TextEncoder:
        """Read the tokenizer.

        Raises:
            ContractMismatchError: it is another one than the model was loaded with.
            ContractError: there is none any more.
        """
        tokenizer = load_tokenizer(self.directory)
        if _tokenizer_files(Path(self.directory)) != self.files:
            raise ContractMismatchError(
                f"tokenizer: the files in {self.directory} have changed since the model was loaded",
                remedy="restore them; publish another model from a directory of its own",
            )
        # As the contract of a model without one was made: with a pad token added where there was none.
        pick_pad(tokenizer)
        return TextEncoder(Encoder(self.contract, tokenizer), self.rules)


def _tokenizer_files(directory: Path) -> dict[str, str]:
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    return {path.name: file_sha256(path) for path in sorted(found)}


class EnsembleEncoder:
    """Items to the units of every member.

    Args:
        facts: of the ensemble.
        members: name and encoder of each.
    """

    def __init__(self, facts: ModelFacts, members: Sequence[tuple[str, Callable[[ScoreItem], EncodedItem]]]) -> None:
        self._facts, self._members = facts, tuple(members)

    def encode(self, item: ScoreItem) -> EncodedItem:
        """Its units, or the error of the first member that cannot take it."""
        refusal = self._facts.refusal(item.asked)
        if refusal is None and item.form == "tokens":
            refusal = ItemError("unsupported_message", "the members of an ensemble have tokenizers of their own, so they take no token ids")
        if refusal is not None:
            return EncodedItem(item, error=refusal)
        units: list[Unit] = []
        texts: tuple[tuple[str, ...], ...] = ()
        taken_as: TakenAs = "templated"
        bare = bare_item(item)
        for number, (name, encode) in enumerate(self._members):
            found = encode(bare)
            if found.error is not None:
                return EncodedItem(item, error=replace(found.error, message=f"{name}: {found.error.message}"))
            if item.trace and (not found.token_texts or (number and found.token_texts != texts)):
                error = ItemError(
                    "no_trace", f"the members have no reward at the same tokens; {name} has others than the first one, or none"
                )
                return EncodedItem(item, error=error)
            texts, taken_as = found.token_texts, found.taken_as
            units += [replace(unit, member=number) for unit in found.units]
        return EncodedItem(item, tuple(units), taken_as=taken_as, token_texts=texts)


def bare_item(item: ScoreItem) -> ScoreItem:
    """What a member of an ensemble is given: what is asked for is the ensemble's to do."""
    return replace(item, asked=Asked(), critiques=None, seed=0)


@dataclass(frozen=True, slots=True)
class EnsembleEncoderSpec:
    """What makes an `EnsembleEncoder` in another process; raises as the specs of its members."""

    facts: ModelFacts
    members: tuple[tuple[str, TextEncoderSpec], ...]

    def load(self) -> ItemEncoder:
        """Read the tokenizers of all members."""
        return EnsembleEncoder(self.facts, [(name, spec.load().encode) for name, spec in self.members])
