"""What callers may know of something that scores, and what it refuses. Needs neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayward.contract.contract import Normaliser
from rayward.errors import (
    AlreadyTemplatedError,
    ChangedTextError,
    ContractError,
    TemplateFailedError,
    TokenRangeError,
    TooLongError,
    UnsupportedMessageError,
)
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem


def encoding_error(exc: ContractError) -> ItemError:
    """What the caller is told of a conversation that cannot become token ids."""
    codes = {
        TooLongError: "too_long",
        TemplateFailedError: "failed",
        TokenRangeError: "token_out_of_range",
        UnsupportedMessageError: "unsupported_message",
        AlreadyTemplatedError: "already_templated",
        ChangedTextError: "changed_by_template",
    }
    return ItemError(codes.get(type(exc), "template"), exc.problem)


def check_ids(conversations: Iterable[Sequence[int]], vocabulary: int) -> None:
    """Check that a model has an embedding for every id; tokenizers of other people's models may know more.

    Raises:
        TokenRangeError: it has not.
    """
    highest = max(max(ids) for ids in conversations)
    if highest >= vocabulary:
        raise TokenRangeError(
            f"the text has the token id {highest}, and the model has embeddings for {vocabulary} ids",
            remedy="leave that text out, or use the tokenizer that the model was trained with",
        )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a caller may know of something that scores; `GET /v1/models` shows it.

    Attributes:
        outputs: names of the outputs of a completion.
        max_tokens: longest conversation.
        weight_sets: names that a request may give as `weights`.
        normaliser: statistics for centred and standardised rewards, or None.
        writes_critiques: every completion is criticised in words before it is scored.
    """

    outputs: tuple[str, ...]
    max_tokens: int
    weight_sets: tuple[str, ...]
    normaliser: Normaliser | None
    writes_critiques: bool = False

    def refusal(self, asked: Asked) -> ItemError | None:
        """Why this model has not what is asked for (`unknown_weights`, `no_normaliser`, `no_critiques`), or None."""
        if asked.weights is not None and asked.weights not in self.weight_sets:
            known = ", ".join(self.weight_sets) or "none"
            return ItemError("unknown_weights", f"weight set {asked.weights[:80]!r} is not known; known: {known}")
        if asked.normalise != "raw" and self.normaliser is None:
            return ItemError("no_normaliser", f"{asked.normalise} rewards need the statistics of a reference set; the model has none")
        if (asked.n_critiques > 1 or asked.temperature > 0) and not self.writes_critiques:
            return ItemError("no_critiques", "n_critiques and temperature are for models that write critiques; this one writes none")
        return None

    def normalised(self, rewards: Iterable[float], asked: Asked) -> tuple[float, ...]:
        """The rewards on the scale that is asked for."""
        if asked.normalise == "raw":
            return tuple(rewards)
        assert self.normaliser is not None
        return tuple(self.normaliser.apply(reward, asked.normalise) for reward in rewards)


class ScoredModel(Protocol):
    """What serving, evaluation and the command line need of something that scores."""

    facts: ModelFacts
    model_id: str
    version: str

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item, in order."""
        ...
