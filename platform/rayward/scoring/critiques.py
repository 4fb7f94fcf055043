"""Writes the critiques after which a critique-out-loud model gives its reward (arXiv 2408.11791). No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.errors import ContractError, TooLongError
from rayward.model.generation import Opening, generate
from rayward.model.reward_model import RewardModel
from rayward.schema import digest
from rayward.wire.items import ItemError, ScoreItem

MAX_CRITIQUE_TOKENS = 1024
CLOSING_TOKENS = 8
"""Room for what the template prints after the critique."""


class CritiqueWriter:
    """Critiques of the model's own for items that bring none.

    Args:
        model: in eval mode, with its language-model head.
        version: of the model; the same text is criticised in the same words until it changes.
    """

    def __init__(self, model: RewardModel, encoder: Encoder, *, version: str, tokens_per_batch: int) -> None:
        self._model, self._encoder, self._version = model, encoder, version
        self._tokens_per_batch = tokens_per_batch

    def write(self, items: Sequence[ScoreItem]) -> list[ScoreItem | ItemError]:
        """The items with `n_critiques` critiques for every completion, or why there are none (`too_long`, `template`)."""
        openings: list[list[Opening] | ItemError] = []
        for item in items:
            try:
                openings.append([opening for text in item.completions for opening in self._openings(item, text)])
            except TooLongError as exc:
                openings.append(ItemError("too_long", exc.problem))
            except ContractError as exc:
                openings.append(ItemError("template", exc.problem))
        written: dict[int, list[str]] = {}
        for temperature in sorted({item.asked.temperature for item in items}):
            members = [i for i, item in enumerate(items) if item.asked.temperature == temperature and isinstance(openings[i], list)]
            flat = [(i, opening) for i in members for opening in cast(list[Opening], openings[i])]
            contract = self._encoder.contract
            texts = generate(
                self._model,
                [opening for _, opening in flat],
                end_id=contract.end_token_id,
                banned_id=contract.pad_token_id,
                temperature=temperature,
                tokens_per_batch=self._tokens_per_batch,
            )
            for (i, _), ids in zip(flat, texts, strict=True):
                written.setdefault(i, []).append(self._encoder.decode(ids))
        results: list[ScoreItem | ItemError] = []
        for index, (item, given) in enumerate(zip(items, openings, strict=True)):
            if isinstance(given, ItemError):
                results.append(given)
                continue
            texts_of, count = written.get(index, []), item.asked.n_critiques
            groups = tuple(tuple(texts_of[k * count : (k + 1) * count]) for k in range(len(item.completions)))
            results.append(replace(item, critiques=groups))
        return results

    def _openings(self, item: ScoreItem, text: str) -> list[Opening]:
        ids = self._encoder.open_critique(cast(Sequence[Message], item.prompt), text)
        room = min(MAX_CRITIQUE_TOKENS, self._encoder.contract.max_tokens - len(ids) - CLOSING_TOKENS)
        if room < 1:
            raise TooLongError(
                f"the conversation takes {len(ids)} tokens of {self._encoder.contract.max_tokens} and leaves no room for a critique",
                remedy="shorten it",
            )
        seeds = [int(digest([self._version, item.seed, item.prompt, text, number])[:15], 16) for number in range(item.asked.n_critiques)]
        return [Opening(ids, room, seed) for seed in seeds]
