"""From the outputs of a head to the result of an item, by the contract. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayward.batch.comparison import EncodedComparison
from rayward.contract.contract import Contract
from rayward.contract.reading import Place
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.units import EncodedItem, UnitValues, usage
from rayward.wire.items import ItemError, ItemResult, ScoreItem, TokenTrace


def result_of(contract: Contract, facts: ModelFacts, encoded: EncodedItem, values: Sequence[UnitValues]) -> ItemResult:
    """The result of an item from the values of its units."""
    item = encoded.item
    outputs = torch.cat([value.outputs for value in values])
    used = usage(encoded, values)
    num_bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
    if num_bad:
        # NaN in one completion can reach its siblings through masked attention, so the item fails as a whole.
        error = ItemError("non_finite", f"the model gave NaN or Inf for {num_bad} of {len(outputs)} outputs")
        return ItemResult(error=error, **used)
    reading, steps, traces = contract.reading, None, None
    if encoded.token_texts:
        traces = _traces(contract, facts, encoded, outputs)
        if reading is None:
            outputs = outputs[np.cumsum(_all_reads("tokens", encoded)) - 1]
    if reading is not None:
        reads = _all_reads(reading.at, encoded)
        if reading.at == "steps":
            steps = tuple(tuple(part.tolist()) for part in torch.split(outputs[:, 0].sigmoid(), reads))
        outputs = reading.combine(outputs, reads)
    # Self-consistency: the mean over the critiques of a completion.
    outputs = outputs.reshape(len(item.completions), -1, outputs.shape[1])
    rewards = _combined(contract, item, outputs)
    several = facts.writes_critiques and rewards.shape[1] > 1
    return ItemResult(
        rewards=facts.normalised(rewards.mean(dim=1).tolist(), item.asked),
        outputs=tuple(tuple(row) for row in outputs.mean(dim=1).tolist()) if outputs.shape[2] > 1 else None,
        steps=steps,
        critiques=item.critiques if facts.writes_critiques else None,
        reward_std=tuple(rewards.std(dim=1, correction=0).tolist()) if several else None,
        traces=traces,
        **used,
    )


def _traces(contract: Contract, facts: ModelFacts, encoded: EncodedItem, outputs: torch.Tensor) -> tuple[TokenTrace, ...]:
    reading, found = contract.reading, []
    for texts, along in zip(encoded.token_texts, torch.split(outputs, _all_reads("tokens", encoded)), strict=True):
        values = along if reading is None else reading.along(along[:, 0])[:, None]
        found.append(TokenTrace(texts, facts.normalised(_combined(contract, encoded.item, values).tolist(), encoded.item.asked)))
    return tuple(found)


def _combined(contract: Contract, item: ScoreItem, outputs: torch.Tensor) -> torch.Tensor:
    # [..., outputs] -> [...]
    asked = item.asked.weights
    weights = contract.reward_weights if asked is None else contract.weight_sets[asked]
    return outputs[..., 0] if weights == (1.0,) else outputs @ torch.tensor(weights, dtype=torch.float32)


def num_reads(place: Place, comparison: EncodedComparison) -> list[int]:
    """Readings of each completion."""
    return [len(positions) for positions in comparison.read_positions(place)]


def _all_reads(place: Place, encoded: EncodedItem) -> list[int]:
    return [number for unit in encoded.units for number in num_reads(place, unit.comparison)]
