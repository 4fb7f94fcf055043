"""The implicit reward of a DPO policy: beta (log policy - log reference) of the completion (arXiv 2305.18290, eq. 6). No Ray.

A directory with `implicit.json` (`rayward.scoring.combining`) is scored, evaluated and served like a reward model. Like a Bradley-Terry
reward it compares completions of one prompt only. There are no golden scores: such a pair of policies was not exported with a contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import pack
from rayward.batch.planner import group_by_budget
from rayward.config.placement import Device, HashWeights
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.rendering import Conversation
from rayward.contract.tokenizer import load_tokenizer, tokenizer_fingerprint
from rayward.errors import ModelLoadError
from rayward.model.language_model import LanguageModel
from rayward.model.weights_identity import weights_identity
from rayward.schema import digest, identity
from rayward.scoring.combining import ImplicitRule
from rayward.scoring.isolation import each, settled, together
from rayward.scoring.scored_model import ModelFacts, check_ids
from rayward.scoring.verify import pick_device, read_config
from rayward.wire.items import ItemError, ItemResult, ScoreItem

OUTPUTS = ("policy_log_prob", "reference_log_prob")


class ImplicitScorer:
    """Policy and reference, loaded; scores like a `Scorer`."""

    def __init__(
        self, rule: ImplicitRule, encoder: Encoder, models: tuple[LanguageModel, LanguageModel], *, model_id: str, version: str, budget: int
    ) -> None:
        self._rule, self._encoder, self._models, self._budget = rule, encoder, models, budget
        self.model_id, self.version = model_id, version
        self.facts = ModelFacts(OUTPUTS, encoder.contract.max_tokens, (), rule.normaliser)

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
            budget=tokens_per_batch,
        )

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item, in order; errors and what is raised as `Scorer.score`."""
        encoded = each(items, lambda item: self.facts.refusal(item.asked) or self._encode(item), doing="while it was made into tokens")
        comparisons = [found for found in encoded if not isinstance(found, ItemError)]
        values = zip(*(self._log_probs(model, comparisons) for model in self._models), strict=True)
        results: list[ItemResult] = []
        for item, found in zip(items, encoded, strict=True):
            if isinstance(found, ItemError):
                results.append(ItemResult(error=found))
            else:
                policy, reference = next(values)
                results.append(settled(partial(self._result, item, found, policy, reference)))
        return results

    def _encode(self, item: ScoreItem) -> EncodedComparison:
        split = self._encoder.encode_sure([Conversation(item.prompt, text, None, item.inputs) for text in item.completions])
        check_ids((encoding.ids for encoding in split), min(model.num_embeddings for model in self._models))
        shortest = min(encoding.text_start for encoding in split)
        shared = next((i for i in range(shortest) if len({encoding.ids[i] for encoding in split}) > 1), shortest)
        # Completions that were cut differently, or whose first token swallowed the end of the prompt, start where they differ.
        return EncodedComparison(
            id="item",
            prefix_ids=np.array(split[0].ids[:shared], dtype=np.int32),
            branch_ids=tuple(np.array(encoding.ids[shared:], dtype=np.int32) for encoding in split),
            labels=Labels(),
        )

    def _log_probs(self, model: LanguageModel, comparisons: Sequence[EncodedComparison]) -> list[list[float] | ItemError]:
        found: list[list[float] | ItemError] = [[] for _ in comparisons]
        device = next(model.parameters()).device
        for group in group_by_budget(comparisons, tokens_per_microbatch=self._budget, layout=model.layout):
            outputs = together([comparisons[i] for i in group], partial(self._group, model), device=device, good=_is_finite)
            for index, values in zip(group, outputs, strict=True):
                found[index] = values
        return found

    @torch.inference_mode()
    def _group(self, model: LanguageModel, comparisons: Sequence[EncodedComparison]) -> list[list[float]]:
        values = iter(model.completion_log_probs(pack(comparisons, layout=model.layout, pad_token_id=0)).tolist())
        return [[next(values) for _ in range(comparison.num_completions)] for comparison in comparisons]

    def _result(
        self, item: ScoreItem, comparison: EncodedComparison, policy: list[float] | ItemError, reference: list[float] | ItemError
    ) -> ItemResult:
        if isinstance(policy, ItemError) or isinstance(reference, ItemError):
            return ItemResult(error=policy if isinstance(policy, ItemError) else cast(ItemError, reference))
        lengths = [len(branch) if self._rule.per_token else 1 for branch in comparison.branch_ids]
        rewards = [self._rule.beta * (p - r) / n for p, r, n in zip(policy, reference, lengths, strict=True)]
        return ItemResult(
            rewards=self.facts.normalised(rewards, item.asked),
            outputs=tuple(zip(policy, reference, strict=True)),
            tokens=2 * comparison.num_tokens_unshared,
            tokens_computed=2 * comparison.num_tokens,
        )


def _is_finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))
