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
from typing import Any, Self

from rayward.batch.layout import Layout
from rayward.config.placement import Device, HashWeights
from rayward.schema import digest, identity
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.encoding import EnsembleEncoder, EnsembleEncoderSpec, bare_item
from rayward.scoring.isolation import settled
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.scorer import Scorer
from rayward.scoring.units import EncodedItem, Unit, Values, computed
from rayward.wire.items import ItemResult, ScoreItem, TokenTrace

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
        self._encoder = EnsembleEncoder(self.facts, [(member.model_id, member.encode_item) for member in self._members])

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: Device = "auto",
        tokens_per_batch: int = 8192,
        verify: bool = True,
        hash_weights: HashWeights = "full",
        batch_invariant: bool = False,
    ) -> Self:
        """Load and verify every member.

        Raises:
            ModelLoadError: `ensemble.json` cannot be read, or a member cannot be loaded.
            ContractMismatchError: a member is not the one of its contract.
        """
        directory = Path(path)
        rule = EnsembleRule.load(directory)
        members = [
            Scorer.load(
                directory / name,
                device=device,
                tokens_per_batch=tokens_per_batch,
                verify=verify,
                hash_weights=hash_weights,
                batch_invariant=batch_invariant,
            )
            for name in rule.members
        ]
        return cls(rule, members, model_id=directory.resolve().name)

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item; an item that one member cannot score has that member's error."""
        return computed(self, [self.encode_item(item) for item in items])

    @property
    def layout(self) -> Layout:
        """Of its members' forwards; padded where one of them is."""
        return "padded" if any(member.layout == "padded" for member in self._members) else "packed"

    def encoder_spec(self) -> EnsembleEncoderSpec | None:
        """What encodes as this ensemble does; None where a member needs its model to encode."""
        specs = [(member.model_id, member.encoder_spec()) for member in self._members]
        members = tuple((name, spec) for name, spec in specs if spec is not None)
        return EnsembleEncoderSpec(self.facts, members) if len(members) == len(specs) else None

    def encode(self, items: Sequence[ScoreItem]) -> list[EncodedItem]:
        """Items as units, or their errors."""
        return [self.encode_item(item) for item in items]

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        """One item as the units of all members, or its error."""
        return self._encoder.encode(item)

    def forward(self, units: Sequence[Unit]) -> list[Values]:
        """The values of units, each through its member; raises as `Scorer.forward`."""
        found: dict[int, Values] = {}
        for number, member in enumerate(self._members):
            indices = [index for index, unit in enumerate(units) if unit.member == number]
            if indices:
                found |= zip(indices, member.forward([units[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(units))]

    def finish(self, encoded: EncodedItem, values: Sequence[Values]) -> ItemResult:
        """The rule's rewards from the values of all members."""
        if encoded.error is not None:
            return ItemResult(error=encoded.error, taken_as=encoded.taken_as)
        results = []
        for number, member in enumerate(self._members):
            own = [(unit, value) for unit, value in zip(encoded.units, values, strict=True) if unit.member == number]
            part = replace(encoded, item=bare_item(encoded.item), units=tuple(unit for unit, _ in own))
            results.append(member.finish(part, [value for _, value in own]))
        return settled(partial(self._result, encoded, results))

    def _result(self, encoded: EncodedItem, results: Sequence[ItemResult]) -> ItemResult:
        used: dict[str, Any] = {
            "taken_as": encoded.taken_as,
            "tokens": sum(result.tokens for result in results),
            "tokens_computed": sum(result.tokens_computed for result in results),
        }
        for member, result in zip(self._members, results, strict=True):
            if result.error is not None:
                return ItemResult(error=replace(result.error, message=f"{member.model_id}: {result.error.message}"), **used)
        per_completion = list(zip(*(result.rewards for result in results if result.rewards is not None), strict=True))
        traces = None
        if encoded.token_texts:
            by_completion = zip(*(result.traces for result in results if result.traces is not None), strict=True)
            traces = tuple(self._trace(members, encoded.item) for members in by_completion)
        lengths = zip(*(result.num_tokens for result in results if result.num_tokens is not None), strict=True)
        return ItemResult(
            rewards=self.facts.normalised((self._rule.combine(members) for members in per_completion), encoded.item.asked),
            outputs=tuple((*members, statistics.pstdev(members)) for members in per_completion),
            num_tokens=tuple(map(max, lengths)),
            traces=traces,
            **used,
        )

    def _trace(self, members: Sequence[TokenTrace], item: ScoreItem) -> TokenTrace:
        along = zip(*(member.rewards for member in members), strict=True)
        return TokenTrace(members[0].tokens, self.facts.normalised((self._rule.combine(rewards) for rewards in along), item.asked))
