"""The implicit reward of a DPO policy: beta (log policy - log reference) of the completion (arXiv 2305.18290, eq. 6). No Ray.

A directory with `implicit.json` (`rayward.scoring.combining`) is scored, evaluated and served like a reward model. Like a Bradley-Terry
reward it compares completions of one prompt only. There are no golden scores: such a pair of policies was not exported with a contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Self

import torch

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout, pack
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
from rayward.scoring.isolation import finished
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.units import EncodedItem, Unit, UnitValues, Values, computed, usage
from rayward.scoring.verify import pick_device, read_config
from rayward.wire.items import ItemResult, ScoreItem, TokenTrace

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
        hash_weights: HashWeights = "full",
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

    @property
    def layout(self) -> Layout:
        """Of its models' forwards; padded where one of them is."""
        return "padded" if any(model.layout == "padded" for model in self._models) else "packed"

    def encoder_spec(self) -> TextEncoderSpec | None:
        """What encodes as this scorer does; None where nobody said where the policy's tokenizer lies."""
        return None if self._directory is None else TextEncoderSpec.of(self._directory, self._contract, self._rules)

    def encode(self, items: Sequence[ScoreItem]) -> list[EncodedItem]:
        """Items as units, or their errors."""
        return [self.encode_item(item) for item in items]

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        """One item as units of the policy and of the reference, or its error."""
        return self._texts.encode(item)

    def forward(self, units: Sequence[Unit]) -> list[Values]:
        """For each unit the log-probabilities of its completions under its model, float32 [completions, 1], or of their tokens where a
        trace is asked for; raises as `Scorer.forward`."""
        found: dict[int, Values] = {}
        for member, trace in product(range(len(self._models)), (False, True)):
            indices = [index for index, unit in enumerate(units) if (unit.member, unit.trace) == (member, trace)]
            if indices:
                run = partial(self._run, self._models[member], trace)
                num_reads = _num_taught if trace else lambda comparison: [1] * comparison.num_completions
                values = self._forwards[member].shared([units[index].comparison for index in indices], run, num_reads)
                found |= zip(indices, values, strict=True)
        return [found[index] for index in range(len(units))]

    @torch.inference_mode()
    def _run(self, model: LanguageModel, trace: bool, comparisons: Sequence[EncodedComparison]) -> list[torch.Tensor]:
        batch = pack(comparisons, layout=model.layout, pad_token_id=0)
        values = model.token_log_probs(batch)[0] if trace else model.completion_log_probs(batch)
        sizes = [sum(_num_taught(comparison)) if trace else comparison.num_completions for comparison in comparisons]
        return list(torch.split(values.cpu()[:, None], sizes))

    def finish(self, encoded: EncodedItem, values: Sequence[Values]) -> ItemResult:
        """The result of an item from the values of its units."""
        return finished(encoded, values, partial(self._result, encoded))

    def _result(self, encoded: EncodedItem, values: Sequence[UnitValues]) -> ItemResult:
        lengths = [length for unit in encoded.units if unit.member == 0 for length in _num_taught(unit.comparison)]
        parts = [
            torch.cat([value.outputs[:, 0] for unit, value in zip(encoded.units, values, strict=True) if unit.member == member]).double()
            for member in range(len(self._models))
        ]
        traces = None
        if encoded.token_texts:
            along = [torch.split(part, lengths) for part in parts]
            traces = tuple(
                self._trace(encoded, texts, policy, reference) for texts, policy, reference in zip(encoded.token_texts, *along, strict=True)
            )
            parts = [torch.stack([tokens.sum() for tokens in each]) for each in along]
        policy, reference = (part.tolist() for part in parts)
        counts = [max(length, 1) if self._rule.per_token else 1 for length in lengths]
        rewards = [self._rule.beta * (p - r) / count for p, r, count in zip(policy, reference, counts, strict=True)]
        return ItemResult(
            rewards=self.facts.normalised(rewards, encoded.item.asked),
            outputs=tuple(zip(policy, reference, strict=True)),
            traces=traces,
            **usage(encoded, values),
        )

    def _trace(self, encoded: EncodedItem, texts: tuple[str, ...], policy: torch.Tensor, reference: torch.Tensor) -> TokenTrace:
        # As if the conversation ended at each token. The first one of a conversation has no probability and adds nothing.
        rewards = (self._rule.beta * (policy - reference)).cumsum(0)
        if self._rule.per_token:
            rewards /= torch.arange(1, len(rewards) + 1)
        missing = [0.0] * (len(texts) - len(rewards))
        return TokenTrace(texts, self.facts.normalised([*missing, *rewards.tolist()], encoded.item.asked))


def _num_taught(comparison: EncodedComparison) -> list[int]:
    # Tokens of each completion that have a probability.
    assert comparison.text_starts is not None
    prefix = len(comparison.prefix_ids)
    return [prefix + len(branch) - max(start, 1) for branch, start in zip(comparison.branch_ids, comparison.text_starts, strict=True)]
