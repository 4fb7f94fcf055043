"""Conversations in, fp32 rewards out, by the contract; no Ray. The one scorer of serving, evaluation and `rayward score`.

All items of a call are merged into micro-batches under a token budget, each prompt computed once for its completions.
An item that cannot be scored gets an error; the others are scored. A score does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout, pack
from rayward.config.placement import Device, HashWeights
from rayward.contract.contract import CONTRACT_FILE, Contract, GoldenScore
from rayward.contract.encoder import Encoder
from rayward.contract.golden import golden_conversations
from rayward.contract.reading import Place, place_of
from rayward.contract.tokenizer import load_tokenizer, tokenizer_fingerprint
from rayward.errors import ModelLoadError
from rayward.model.build import load_reward_model, read_hf_config
from rayward.model.capabilities import context_length, position_limit
from rayward.model.reward_model import BatchTensors, RewardModel, to_tensors
from rayward.model.weights import head_sha256
from rayward.model.weights_identity import weights_identity
from rayward.schema import digest, identity
from rayward.scoring.critiques import CritiqueWriter
from rayward.scoring.encoding import ENCODING, TextEncoder, TextEncoderSpec, UnitRules
from rayward.scoring.finishing import num_reads, result_of
from rayward.scoring.forward import Forward
from rayward.scoring.isolation import each, finished
from rayward.scoring.scored_model import ModelFacts
from rayward.scoring.units import EncodedItem, Unit, Values, computed
from rayward.scoring.verify import is_intact, mismatch, pick_device, read_config, torch_dtype, verify_artifacts
from rayward.wire.items import ItemError, ItemResult, ScoreItem

__all__ = ["ItemError", "ItemResult", "ScoreItem", "Scorer"]
FOREIGN_MAX_TOKENS = 4096
"""Token limit of a model without contract, unless its own context is shorter."""


class Scorer:
    """A loaded model with its contract; use `Scorer.load`.

    Args:
        model: in eval mode, on the device it computes on.
        encoder: text to ids by the contract.
        model_id: name for replies.
        version: identifies what was loaded.
        tokens_per_batch: token budget of one forward.
        directory: where the tokenizer lies; None: units are made in this process only.
        alone: every completion goes through the model by itself (`Placement.batch_invariant`).
    """

    def __init__(
        self,
        model: RewardModel,
        encoder: Encoder,
        *,
        model_id: str,
        version: str,
        tokens_per_batch: int,
        directory: Path | None = None,
        alone: bool = False,
    ) -> None:
        self.contract = encoder.contract
        self.facts = ModelFacts(
            self.contract.outputs,
            self.contract.max_tokens,
            tuple(self.contract.weight_sets),
            self.contract.normaliser,
            writes_critiques=self.contract.critique_lead_in is not None,
        )
        self.model_id = model_id
        self.version = version
        self._model = model.eval()
        # What a compiled layer computes may depend on the shapes that it has seen before.
        if model.layout == "packed" and not alone and not self.facts.writes_critiques and self._on_cuda(model):
            model.compile_layers()
        self._encoder = encoder
        self._device = next(model.parameters()).device
        self._directory = directory
        self._forward = Forward(model.layout, self._device, tokens_per_batch, alone)
        self._writer = (
            CritiqueWriter(model, encoder, version=version, tokens_per_batch=tokens_per_batch) if self.facts.writes_critiques else None
        )
        # A pad token that the contract added to a foreign tokenizer has no embedding; masked positions may hold any id.
        pad = encoder.contract.pad_token_id
        vocabulary = len(cast(torch.Tensor, model.model.get_input_embeddings().weight))
        self._pad_id = pad if pad < vocabulary else 0
        why = "it is read after a critique" if self.facts.writes_critiques else model.why_no_trace
        self._rules = UnitRules(
            self.facts, vocabulary, tokens_per_batch, gated=self.contract.gate is not None, alone=alone, why_no_trace=why
        )
        self._texts = TextEncoder(encoder, self._rules)

    @staticmethod
    def _on_cuda(model: RewardModel) -> bool:
        return next(model.parameters()).device.type == "cuda"

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
        """Load an export, or any Hugging Face sequence-classification model (its contract derives from its tokenizer).

        Args:
            path: directory.
            device: `auto` takes CUDA where there is a GPU, in a Ray actor only one that is reserved for it.
            tokens_per_batch: token budget of one forward.
            verify: check files, head and golden scores of an export against its contract.
            hash_weights: how much of the weights of a model without contract its version covers.
            batch_invariant: a reward is bitwise the same whatever is scored beside it.

        Raises:
            ContractError: there is no readable contract or tokenizer.
            ContractMismatchError: an artifact, or a golden score, is not the contract's; says which part.
            UnverifiedError: `verify`, and the contract holds no golden score.
            ModelLoadError: the weights cannot be loaded, or the device is not there.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelLoadError(f"{directory} is not a directory", remedy="point at an exported or downloaded model")
        target = pick_device(device)
        if (directory / CONTRACT_FILE).is_file():
            return cls._load_export(directory, target, tokens_per_batch, verify, batch_invariant)
        return cls._load_foreign(directory, target, tokens_per_batch, hash_weights, batch_invariant)

    @classmethod
    def _load_export(cls, directory: Path, device: torch.device, tokens_per_batch: int, verify: bool, alone: bool) -> Self:
        contract = Contract.load(directory)
        if verify:
            contract.require_golden(directory)
            verify_artifacts(contract, directory)
        tokenizer = load_tokenizer(str(directory))
        encoder = Encoder(contract, tokenizer)
        intact = verify or is_intact(contract, directory)
        model = load_reward_model(
            directory,
            device=device,
            dtype=torch_dtype(contract.dtype),
            max_tokens=contract.max_tokens,
            with_language=contract.critique_lead_in is not None,
        )
        scorer = cls(
            model,
            encoder,
            model_id=directory.resolve().name,
            version=contract.model_version() if intact else _unverified(directory, contract, tokenizer),
            tokens_per_batch=tokens_per_batch,
            directory=directory,
            alone=alone,
        )
        if verify:
            scorer.verify_golden()
        return scorer

    @classmethod
    def _load_foreign(cls, directory: Path, device: torch.device, tokens_per_batch: int, hash_weights: HashWeights, alone: bool) -> Self:
        tokenizer = load_tokenizer(str(directory))
        limit = min(FOREIGN_MAX_TOKENS, context_length(read_hf_config(directory)) or FOREIGN_MAX_TOKENS)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_reward_model(directory, device=device, dtype=dtype, max_tokens=limit)
        labels = int(model.model.config.num_labels or 0)
        if labels != 1:
            raise ModelLoadError(
                f"{directory.name} has {labels} outputs and no {CONTRACT_FILE} that says how they become a reward",
                remedy="use a model with one output, or one that Rayward exported",
            )
        limit = min(limit, position_limit(model.model) or limit)
        contract = Contract.from_tokenizer(tokenizer, max_tokens=limit).model_copy(
            update={
                "dtype": str(dtype).removeprefix("torch."),
                "head_sha256": head_sha256(model.model.state_dict()),
            }
        )
        return cls(
            model,
            Encoder(contract, tokenizer),
            model_id=directory.resolve().name,
            version=_unverified(directory, contract, tokenizer, hash_weights),
            tokens_per_batch=tokens_per_batch,
            directory=directory,
            alone=alone,
        )

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item, in order.

        Errors of items: `too_long` (does not fit the contract's token limit), `template` (the chat template rejects it),
        `token_out_of_range` (an id without an embedding), `non_finite` (the model gave NaN or Inf), `unknown_weights`,
        `no_normaliser` (the contract has none), `no_critiques` (the model writes none), `failed` (anything else that this item alone
        raises).

        Raises:
            Exception: the device is broken, or out of memory for a single item.
        """
        return self.compute(self.encode(items))

    def encode(self, items: Sequence[ScoreItem]) -> list[EncodedItem]:
        """The first part of `score`, which needs the model only where critiques are written."""
        return [
            EncodedItem(item, error=found) if isinstance(found, ItemError) else self._texts.encode(found)
            for item, found in zip(items, self.criticise(items), strict=True)
        ]

    def compute(self, encoded: Sequence[EncodedItem]) -> list[ItemResult]:
        """The rest of `score`; the next items may be encoded meanwhile, in one other thread."""
        return computed(self, encoded)

    @property
    def layout(self) -> Layout:
        """Of its forwards."""
        return self._model.layout

    def encoder_spec(self) -> TextEncoderSpec | None:
        """What encodes as this scorer does; None where critiques are written, or where nobody said where the tokenizer lies."""
        if self._directory is None or self._writer is not None:
            return None
        return TextEncoderSpec.of(self._directory, self.contract, self._rules)

    def encode_item(self, item: ScoreItem) -> EncodedItem:
        """One item as units, or its error."""
        return self.encode([item])[0]

    def forward(self, units: Sequence[Unit]) -> list[Values]:
        """The values of units, of whatever items, in order; raises as `score`."""
        found: dict[int, Values] = {}
        for trace in (False, True):
            place: Place = "tokens" if trace else place_of(self.contract.reading)
            indices = [index for index, unit in enumerate(units) if unit.trace == trace]
            if indices:
                comparisons, run = [units[index].comparison for index in indices], partial(self._run, self._outputs, place)
                found |= zip(indices, self._forward.shared(comparisons, run, partial(num_reads, place)), strict=True)
        return [found[index] for index in range(len(units))]

    def finish(self, encoded: EncodedItem, values: Sequence[Values]) -> ItemResult:
        """The result of an item from the values of its units."""
        return finished(encoded, values, partial(result_of, self.contract, self.facts, encoded))

    def criticise(self, items: Sequence[ScoreItem]) -> list[ScoreItem | ItemError]:
        """The items as they are scored: with critiques, where the contract asks for them; or why they cannot be."""
        found = each(items, lambda item: self._texts.refusal(item) or item, doing="while it was checked")
        if self._writer is None:
            return found
        waiting = [i for i, item in enumerate(found) if isinstance(item, ScoreItem) and item.critiques is None]
        for index, item in zip(waiting, self._writer.write([items[i] for i in waiting]), strict=True):
            found[index] = item
        return found

    def verify_golden(self) -> None:
        """Recompute the contract's golden scores.

        Raises:
            UnverifiedError: the contract holds none.
            ContractMismatchError: token ids differ, or a reward is further off than the contract allows.
        """
        contract = self.contract
        contract.require_golden(self.model_id)
        for index, golden in enumerate(contract.golden):
            ids = self._encoder.encode(golden.prompt, golden.completion, golden.critique)
            if tuple(ids) != golden.token_ids:
                raise mismatch(
                    f"template or tokenizer: conversation {index} of the golden scores becomes {len(ids)} token ids "
                    f"that differ from the contract's {len(golden.token_ids)}"
                )
        for index, (golden, result) in enumerate(zip(contract.golden, self.score(_items_of(contract.golden)), strict=True)):
            if result.rewards is None:
                assert result.error is not None
                raise mismatch(f"golden scores: conversation {index} gives no reward ({result.error.message})")
            found = result.rewards if result.outputs is None else result.outputs[0]
            for name, value, expected in zip(contract.outputs, found, golden.reward, strict=True):
                if not abs(value - expected) <= contract.golden_tolerance * max(1.0, abs(expected)):
                    raise mismatch(
                        f"golden scores: conversation {index} scores {value:.6g} in {name}, the contract says {expected:.6g} "
                        f"(tolerance {contract.golden_tolerance:g})"
                    )

    def golden_scores(self, golden: Sequence[GoldenScore] = ()) -> tuple[GoldenScore, ...]:
        """Golden conversations with the ids and outputs that this model gives them; those that it cannot score are left out.

        Args:
            golden: their ids and rewards are not read; empty: those that the contract can hold.

        Raises:
            ModelLoadError: a reward is not finite, or none is left.
            ContractError: the contract can hold no conversation at all.
        """
        asked = golden or [entry for entry, _ in golden_conversations(self._encoder)]
        rescored, problem = [], ""
        for entry, result in zip(asked, self.score(_items_of(asked)), strict=True):
            if result.error is not None and result.error.code == "non_finite":
                raise ModelLoadError(f"a golden conversation has no reward: {result.error.message}", remedy="do not use this model")
            if result.rewards is None:
                problem = "" if result.error is None else result.error.message
                continue
            ids = tuple(self._encoder.encode(entry.prompt, entry.completion, entry.critique))
            values = result.rewards if result.outputs is None else result.outputs[0]
            rescored.append(entry.model_copy(update={"token_ids": ids, "reward": values}))
        if not rescored:
            raise ModelLoadError(f"no golden conversation has a reward: {problem}", remedy="use the template that the model was made with")
        return tuple(rescored)

    def features(self, items: Sequence[ScoreItem]) -> list[torch.Tensor | ItemError]:
        """What a head reads: for each item float32 [K, 2, hidden] (end of the completion, gate position), or why there is none."""
        encoded = each(items, partial(self._texts.plain_comparisons, gated=True), doing=ENCODING)
        parts = [comparison for found in encoded if not isinstance(found, ItemError) for comparison in found]
        run = partial(self._run, lambda batch: torch.stack(self._model.features(batch), dim=1), "end")
        hidden = iter(self._forward.separate(parts, run))
        results: list[torch.Tensor | ItemError] = []
        for comparisons in encoded:
            if isinstance(comparisons, ItemError):
                results.append(comparisons)
                continue
            values = [next(hidden) for _ in comparisons]
            failed = next((value for value in values if isinstance(value, ItemError)), None)
            results.append(failed or torch.cat(cast(list[torch.Tensor], values)))
        return results

    def _outputs(self, batch: BatchTensors) -> torch.Tensor:
        return cast(torch.Tensor, self._model(batch))

    @torch.inference_mode()
    def _run(
        self, compute: Callable[[BatchTensors], torch.Tensor], place: Place, comparisons: Sequence[EncodedComparison]
    ) -> list[torch.Tensor]:
        batch = pack(comparisons, layout=self._model.layout, pad_token_id=self._pad_id, read=place)
        outputs = compute(to_tensors(batch, self._device)).cpu()
        ends = np.cumsum([comparison.num_completions for comparison in comparisons])[:-1]
        sizes = [int(reads.sum()) for reads in np.split(np.asarray(batch.num_reads), ends)]
        return list(torch.split(outputs, sizes))


def _unverified(directory: Path, contract: Contract, tokenizer: PreTrainedTokenizerBase, hash_weights: HashWeights = "full") -> str:
    # Of a model that nothing vouches for: all that decides its rewards.
    weights = weights_identity(directory, full=hash_weights == "full")
    return f"unverified-{digest([identity(contract), read_config(directory), tokenizer_fingerprint(tokenizer), weights])[:12]}"


def _items_of(golden: Sequence[GoldenScore]) -> list[ScoreItem]:
    return [
        ScoreItem(
            entry.prompt,
            (entry.completion,),
            critiques=None if entry.critique is None else ((entry.critique,),),
        )
        for entry in golden
    ]
