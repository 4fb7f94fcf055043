"""Several reward models served as one: mean, minimum, a lower bound, or Llama 2's safety gate (`rayward.scoring.combining`). No Ray.

Each member is scored by its own contract and verified like a model of its own. The rewards are the rule's; the outputs of a completion
are the members' rewards and their spread (population standard deviation).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from rayward.config.placement import Device, HashWeights
from rayward.schema import digest, identity
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.isolation import each, settled
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.scorer import Scorer
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem

SPREAD = "spread"


class Ensemble:
    """Loaded members under one rule; scores like a `Scorer`."""

    def __init__(self, rule: EnsembleRule, members: Sequence[Scorer], *, model_id: str) -> None:
        self._rule = rule
        self._members = tuple(members)
        self.model_id = model_id
        self.version = digest([identity(rule, exclude={"normaliser", "members"}), *(member.version for member in members)])[:12]
        names = (f"{index}_{member.model_id}" for index, member in enumerate(members))
        self.facts = ModelFacts(
            outputs=(*names, SPREAD),
            max_tokens=min(member.contract.max_tokens for member in members),
            weight_sets=(),
            normaliser=rule.normaliser,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: Device = "auto",
        tokens_per_batch: int = 8192,
        verify: bool = True,
        hash_weights: HashWeights = "sampled",
    ) -> Self:
        """Load and verify every member.

        Raises:
            ModelLoadError: `ensemble.json` cannot be read, or a member cannot be loaded.
            ContractMismatchError: a member is not the one of its contract.
        """
        directory = Path(path)
        rule = EnsembleRule.load(directory)
        members = [
            Scorer.load(directory / name, device=device, tokens_per_batch=tokens_per_batch, verify=verify, hash_weights=hash_weights)
            for name in rule.members
        ]
        return cls(rule, members, model_id=directory.resolve().name)

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item; an item that one member cannot score has that member's error."""
        bare = each(
            items,
            lambda item: self.facts.refusal(item.asked) or replace(item, asked=Asked(), critiques=None, seed=0),
            doing="while it was checked",
        )
        asked = [item for item in bare if not isinstance(item, ItemError)]
        scored = zip(*(member.score(asked) for member in self._members), strict=True)
        return [
            ItemResult(error=found) if isinstance(found, ItemError) else settled(partial(self._result, item, next(scored)))
            for item, found in zip(items, bare, strict=True)
        ]

    def _result(self, item: ScoreItem, results: Sequence[ItemResult]) -> ItemResult:
        for member, result in zip(self._members, results, strict=True):
            if result.error is not None:
                return ItemResult(error=ItemError(result.error.code, f"{member.model_id}: {result.error.message}"))
        per_completion = list(zip(*(result.rewards for result in results if result.rewards is not None), strict=True))
        return ItemResult(
            rewards=self.facts.normalised((self._rule.combine(members) for members in per_completion), item.asked),
            outputs=tuple((*members, statistics.pstdev(members)) for members in per_completion),
            tokens=sum(result.tokens for result in results),
            tokens_computed=sum(result.tokens_computed for result in results),
        )
