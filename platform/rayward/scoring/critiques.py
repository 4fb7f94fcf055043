"""Writes the critiques after which a critique-out-loud model gives its reward (arXiv 2408.11791). No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from rayward.contract.conversation import Completion
from rayward.contract.encoder import Encoder
from rayward.errors import TooLongError
from rayward.model.generation import Opening, generate
from rayward.model.reward_model import RewardModel
from rayward.schema import digest
from rayward.scoring.isolation import each, together
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
        """The items with `n_critiques` critiques for every completion, or why there are none (`too_long`, `template`, `failed`)."""
        openings = each(items, self._openings, doing="while its critique was begun")
        written: dict[int, list[str] | ItemError] = {}
        for temperature in sorted({item.asked.temperature for item in items}):
            members = [i for i, item in enumerate(items) if item.asked.temperature == temperature and isinstance(openings[i], list)]
            begun = [cast(list[Opening], openings[i]) for i in members]
            texts = together(begun, partial(self._write, temperature), device=next(self._model.parameters()).device)
            written |= zip(members, texts, strict=True)
        results: list[ScoreItem | ItemError] = []
        for index, (item, opening) in enumerate(zip(items, openings, strict=True)):
            found = opening if isinstance(opening, ItemError) else written[index]
            if isinstance(found, ItemError):
                results.append(found)
                continue
            count = item.asked.n_critiques
            results.append(replace(item, critiques=tuple(tuple(found[k * count : (k + 1) * count]) for k in range(len(item.completions)))))
        return results

    def _write(self, temperature: float, begun: Sequence[list[Opening]]) -> list[list[str]]:
        contract = self._encoder.contract
        ids = generate(
            self._model,
            [opening for openings in begun for opening in openings],
            end_id=contract.end_token_id,
            banned_id=contract.pad_token_id,
            temperature=temperature,
            tokens_per_batch=self._tokens_per_batch,
        )
        texts = iter([self._encoder.decode(found) for found in ids])
        return [[next(texts) for _ in openings] for openings in begun]

    def _openings(self, item: ScoreItem) -> list[Opening]:
        return [opening for text in item.completions for opening in self._of_completion(item, text)]

    def _of_completion(self, item: ScoreItem, text: Completion) -> list[Opening]:
        ids = self._encoder.open_critique(item.prompt, text, inputs=item.inputs)
        room = min(MAX_CRITIQUE_TOKENS, self._encoder.contract.max_tokens - len(ids) - CLOSING_TOKENS)
        if room < 1:
            raise TooLongError(
                f"the conversation takes {len(ids)} tokens of {self._encoder.contract.max_tokens} and leaves no room for a critique",
                remedy="shorten it",
            )
        seeds = [int(digest([self._version, item.seed, item.prompt, text, number])[:15], 16) for number in range(item.asked.n_critiques)]
        return [Opening(ids, room, seed) for seed in seeds]
