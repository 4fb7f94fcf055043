"""Text from the language-model head of a reward model: greedy or sampled, with a key-value cache.

A sampled text depends on its own seed, not on its company: every row draws from its own generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rayward.model.heads import LanguageHead
from rayward.model.reward_model import RewardModel

REPETITION_PENALTY = 1.01
"""Divides positive and multiplies negative logits of ids that occurred before (arXiv 1909.05858, 2408.11791)."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A text to go on with.

    Attributes:
        ids: at least one.
        max_new_tokens: at most so many are added.
        seed: of the sampling.
    """

    ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@torch.inference_mode()
def generate(
    model: RewardModel, openings: Sequence[Opening], *, end_id: int, banned_id: int, temperature: float, tokens_per_batch: int
) -> list[list[int]]:
    """The ids that follow each opening, up to and without the end id.

    Args:
        model: in eval mode, with a language-model head.
        banned_id: never generated (the pad token, which may have no trained embedding).
        temperature: 0 takes the likeliest id.
        tokens_per_batch: openings and texts that are generated side by side, in tokens.
    """
    found: list[list[int]] = [[] for _ in openings]
    with _plain_attention(model):
        for group in _groups(openings, tokens_per_batch):
            texts = _generate(model, [openings[i] for i in group], end_id=end_id, banned_id=banned_id, temperature=temperature)
            for index, ids in zip(group, texts, strict=True):
                found[index] = ids
    return found


def _groups(openings: Sequence[Opening], budget: int) -> Iterator[list[int]]:
    # Of similar length, so that little is padding.
    group: list[int] = []
    for index in sorted(range(len(openings)), key=lambda i: (len(openings[i].ids), i)):
        width = max(len(openings[i].ids) + openings[i].max_new_tokens for i in [*group, index])
        if group and width * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@contextmanager
def _plain_attention(model: RewardModel) -> Iterator[None]:
    # Packed attention knows no cache.
    if model.layout == "padded":
        yield
        return
    model.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.use_packed_attention()


def _generate(model: RewardModel, openings: Sequence[Opening], *, end_id: int, banned_id: int, temperature: float) -> list[list[int]]:
    head = cast(LanguageHead, model.model.lm_head)
    device = head.weight.device
    width = max(len(opening.ids) for opening in openings)
    ids = torch.tensor([[end_id] * (width - len(o.ids)) + list(o.ids) for o in openings], device=device)
    mask = torch.tensor([[0] * (width - len(o.ids)) + [1] * len(o.ids) for o in openings], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen = torch.zeros(len(openings), head.out_features, dtype=torch.bool, device=device)
    for row, opening in enumerate(openings):
        seen[row, torch.tensor(list(opening.ids), device=device)] = True
    generators = [torch.Generator().manual_seed(opening.seed) for opening in openings]
    cache = {_cache_argument(model.backbone): DynamicCache(config=model.backbone.config)}
    texts: list[list[int]] = [[] for _ in openings]
    alive = {row for row, opening in enumerate(openings) if opening.max_new_tokens > 0}
    while alive:
        output = model.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        hidden = output.last_hidden_state[:, -1]
        logits = head(hidden)
        logits = torch.where(seen, torch.where(logits > 0, logits / REPETITION_PENALTY, logits * REPETITION_PENALTY), logits)
        logits[:, banned_id] = -torch.inf
        chosen = _choose(logits, temperature, generators)
        for row in sorted(alive):
            token = int(chosen[row])
            if token != end_id:
                texts[row].append(token)
            if token == end_id or len(texts[row]) == openings[row].max_new_tokens:
                alive.discard(row)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        seen.scatter_(1, ids, True)
    return texts


def _cache_argument(backbone: PreTrainedModel) -> str:
    # Transformers 5.24 renames it.
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


def _choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    # One uniform number a row, through the inverse of the distribution function.
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]).to(logits.device)
    return torch.searchsorted(cumulative, (drawn * cumulative[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
