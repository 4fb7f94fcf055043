"""The implicit reward of a DPO policy: beta (log policy - log reference) of the completion (arXiv 2305.18290, eq. 6). No Ray.

A directory with `implicit.json` (`rayward.scoring.combining`) is scored, evaluated and served like a reward model. Like a Bradley-Terry
reward it compares completions of one prompt only. There are no golden scores: such a pair of policies was not exported with a contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self, cast

import torch

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import pack
from rayward.config.placement import Device, HashWeights
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer, tokenizer_fingerprint
from rayward.errors import ModelLoadError
from rayward.model.language_model import LanguageModel
from rayward.model.weights_identity import weights_identity
from rayward.schema import digest, identity
from rayward.scoring.combining import ImplicitRule
from rayward.scoring.encoding import TextEncoder, TextEncoderSpec, UnitRules
from rayward.scoring.forward import Forward
from rayward.scoring.isolation import settled
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.units import EncodedItem, Unit, UnitValues, Values, computed, usage
from rayward.scoring.verify import pick_device, read_config
from rayward.wire.items import ItemError, ItemResult, ScoreItem

OUTPUTS = ("policy_log_prob", "reference_log_prob")


class ImplicitScorer:
    """Policy and reference, loaded; scores like a `Scorer`."""

    def __init__(
        self,
        rule: ImplicitRule,
        encoder: Encoder,
        models: tuple[LanguageModel, LanguageModel],
        *,
        model_id: str,
        version: str,
        tokens_per_batch: int,
        directory: Path | None = None,
        alone: bool = False,
    ) -> None:
        self._rule, self._contract, self._models, self._directory = rule, encoder.contract, models, directory
        self.model_id, self.version = model_id, version
        self.facts = ModelFacts(OUTPUTS, encoder.contract.max_tokens, (), rule.normaliser)
        vocabulary = min(model.num_embeddings for model in models)
        self._rules = UnitRules(self.facts, vocabulary, tokens_per_batch, alone=alone, num_members=len(models))
        self._texts = TextEncoder(encoder, self._rules)
        self._forwards = [Forward(model.layout, next(model.parameters()).device, tokens_per_batch, alone) for model in models]

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: Device = "auto",
        tokens_per_batch: int = 8192,
        verify: bool = True,
        hash_weights: HashWeights = "sampled",
        batch_invariant: bool = False,
    ) -> Self:
        """Load both models; the text rules are those of the policy's tokenizer and template. The version covers what both directories
        hold, not where they lie.

        Raises:
            ModelLoadError: `implicit.json` or a model cannot be read, or the two tokenizers differ.
            ContractError: there is no usable tokenizer.
        """
        directory = Path(path)
        rule = ImplicitRule.load(directory)
        where, target = (directory / rule.policy, directory / rule.reference), pick_device(device)
        tokenizers = [load_tokenizer(str(folder)) for folder in where]
        if tokenizer_fingerprint(tokenizers[0]) != tokenizer_fingerprint(tokenizers[1]):
            raise ModelLoadError(
                f"{where[0]} and {where[1]} have different tokenizers", remedy="use the reference that the policy began as"
            )
        contract = Contract.from_tokenizer(tokenizers[0], max_tokens=rule.max_tokens)
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        policy, reference = (LanguageModel.load(folder, device=target, dtype=dtype, max_tokens=rule.max_tokens) for folder in where)
        content = [
            identity(rule, exclude={"normaliser", "policy", "reference"}),
            contract.fingerprint(),
            tokenizer_fingerprint(tokenizers[0]),
            *((read_config(folder), weights_identity(folder, full=hash_weights == "full")) for folder in where),
        ]
        return cls(
            rule,
            Encoder(contract, tokenizers[0]),
            (policy, reference),
            model_id=directory.resolve().name,
            version=f"unverified-{digest(content)[:12]}",
            tokens_per_batch=tokens_per_batch,
            directory=where[0],
            alone=batch_invariant,
        )

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item, in order; errors and what is raised as `Scorer.score`."""
        return computed(self, [self.encode_item(item) for item in items])

    def encoder_spec(self) -> TextEncoderSpec | None:
        """What encodes as this scorer does; None where nobody said where the policy's tokenizer lies."""
        return None if self._directory is None else TextEncoderSpec.of(self._directory, self._contract, self._rules)

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        """One item as units of the policy and of the reference, or its error."""
        return self._texts.encode(item)

    def forward(self, units: Sequence[Unit]) -> list[Values]:
        """For each unit the log-probabilities of its completions under its model, float32 [completions, 1]; raises as `Scorer.forward`."""
        found: dict[int, Values] = {}
        for number, (model, forward) in enumerate(zip(self._models, self._forwards, strict=True)):
            indices = [index for index, unit in enumerate(units) if unit.member == number]
            if indices:
                comparisons = [units[index].comparison for index in indices]
                found |= zip(indices, forward.shared(comparisons, partial(self._run, model), "end"), strict=True)
        return [found[index] for index in range(len(units))]

    @torch.inference_mode()
    def _run(self, model: LanguageModel, comparisons: Sequence[EncodedComparison]) -> list[torch.Tensor]:
        values = model.completion_log_probs(pack(comparisons, layout=model.layout, pad_token_id=0)).cpu()[:, None]
        return list(torch.split(values, [comparison.num_completions for comparison in comparisons]))

    def finish(self, encoded: EncodedItem, values: Sequence[Values]) -> ItemResult:
        """The result of an item from the values of its units."""
        if encoded.error is not None:
            return ItemResult(error=encoded.error, taken_as=encoded.taken_as)
        failed = next((value for value in values if isinstance(value, ItemError)), None)
        if failed is not None:
            return ItemResult(error=failed, taken_as=encoded.taken_as)
        return settled(partial(self._result, encoded, cast(Sequence[UnitValues], values)))

    def _result(self, encoded: EncodedItem, values: Sequence[UnitValues]) -> ItemResult:
        policy, reference = (
            [
                log_prob
                for unit, value in zip(encoded.units, values, strict=True)
                if unit.member == number
                for log_prob in value.outputs[:, 0].tolist()
            ]
            for number in range(2)
        )
        lengths = [length for unit in encoded.units if unit.member == 0 for length in _num_taught(unit.comparison)]
        rewards = [
            self._rule.beta * (p - r) / (n if self._rule.per_token else 1) for p, r, n in zip(policy, reference, lengths, strict=True)
        ]
        return ItemResult(
            rewards=self.facts.normalised(rewards, encoded.item.asked),
            outputs=tuple(zip(policy, reference, strict=True)),
            **usage(encoded, values),
        )


def _num_taught(comparison: EncodedComparison) -> list[int]:
    # Tokens of each completion.
    assert comparison.text_starts is not None
    prefix = len(comparison.prefix_ids)
    return [prefix + len(branch) - start for branch, start in zip(comparison.branch_ids, comparison.text_starts, strict=True)]
