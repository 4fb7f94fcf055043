"""Conversations in, fp32 rewards out, by the contract; no Ray. The one scorer of serving, evaluation and `rayward score`.

All items of a call are merged into micro-batches under a token budget, each prompt computed once for its completions.
An item that cannot be scored gets an error; the others are scored. A score does not depend on its company.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from rayward.contract import CONTRACT_FILE, Contract, Encoder, GoldenScore, gate_position, load_tokenizer, verify_files
from rayward.data.comparison import Message, shared_prefix_length
from rayward.data.packing import EncodedComparison, Labels, group_by_budget, pack
from rayward.errors import ContractError, ContractMismatchError, ModelLoadError, TooLongError
from rayward.model.loading import HEAD_PREFIX, head_sha256, load_reward_model
from rayward.model.reward_model import BatchTensors, RewardModel, to_tensors
from rayward.scoring.facts import Device, ModelFacts
from rayward.scoring.wire import ItemError, ItemResult, ScoreItem

__all__ = ["Device", "ItemError", "ItemResult", "ScoreItem", "Scorer"]

FOREIGN_MAX_TOKENS = 4096
"""Token limit of a model without contract, unless its own context is shorter."""


@dataclass(frozen=True, slots=True)
class _Conversation:
    ids: list[int]
    gate_position: int | None


@dataclass(frozen=True, slots=True)
class _Part:
    # Some completions of one item, as one comparison; an item over the budget becomes several.
    item: int
    comparison: EncodedComparison


class Scorer:
    """A loaded model with its contract; use `Scorer.load`.

    Args:
        model: in eval mode, on the device it computes on.
        encoder: text to ids by the contract.
        model_id: name for replies.
        version: identifies what was loaded.
        tokens_per_batch: token budget of one forward.
    """

    def __init__(self, model: RewardModel, encoder: Encoder, *, model_id: str, version: str, tokens_per_batch: int) -> None:
        self.contract = encoder.contract
        self.facts = ModelFacts(self.contract.outputs, self.contract.max_tokens, tuple(self.contract.weight_sets), self.contract.normaliser)
        self.model_id = model_id
        self.version = version
        self._model = model.eval()
        self._encoder = encoder
        self._device = next(model.parameters()).device
        self._tokens_per_batch = tokens_per_batch
        # A pad token that the contract added to a foreign tokenizer has no embedding; masked positions may hold any id.
        pad = encoder.contract.pad_token_id
        self._pad_id = pad if pad < len(cast(torch.Tensor, model.model.get_input_embeddings().weight)) else 0

    @classmethod
    def load(cls, path: str | Path, *, device: Device = "auto", tokens_per_batch: int = 8192, verify: bool = True) -> Self:
        """Load an export, or any Hugging Face sequence-classification model (its contract derives from its tokenizer).

        Args:
            path: directory.
            device: `auto` takes CUDA when there is one.
            tokens_per_batch: token budget of one forward.
            verify: check files, head and golden scores of an export against its contract.

        Raises:
            ContractError: there is no readable contract or tokenizer.
            ContractMismatchError: an artifact, or a golden score, is not the contract's; says which part.
            ModelLoadError: the weights cannot be loaded, or the device is not there.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise ModelLoadError(f"{directory} is not a directory", remedy="point at an exported or downloaded model")
        target = pick_device(device)
        if (directory / CONTRACT_FILE).is_file():
            return cls._load_export(directory, target, tokens_per_batch, verify)
        return cls._load_foreign(directory, target, tokens_per_batch)

    @classmethod
    def _load_export(cls, directory: Path, device: torch.device, tokens_per_batch: int, verify: bool) -> Self:
        contract = Contract.load(directory)
        if verify:
            _verify_artifacts(contract, directory)
        encoder = Encoder(contract, load_tokenizer(str(directory)))
        model = load_reward_model(directory, device=device, dtype=_dtype(contract.dtype), max_tokens=contract.max_tokens)
        scorer = cls(model, encoder, model_id=directory.resolve().name, version=contract.model_version(), tokens_per_batch=tokens_per_batch)
        if verify:
            scorer.verify_golden()
        return scorer

    @classmethod
    def _load_foreign(cls, directory: Path, device: torch.device, tokens_per_batch: int) -> Self:
        tokenizer = load_tokenizer(str(directory))
        config = _read_config(directory)
        context = config.get("max_position_embeddings")
        limit = min(FOREIGN_MAX_TOKENS, context) if isinstance(context, int) else FOREIGN_MAX_TOKENS
        contract = Contract.from_tokenizer(tokenizer, max_tokens=limit)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_reward_model(directory, device=device, dtype=dtype, max_tokens=limit)
        labels = int(model.model.config.num_labels or 0)
        if labels != 1:
            raise ModelLoadError(
                f"{directory.name} has {labels} outputs and no {CONTRACT_FILE} that says how they become a reward",
                remedy="use a model with one output, or one that Rayward exported",
            )
        contract = contract.model_copy(
            update={
                "dtype": str(dtype).removeprefix("torch."),
                "head_sha256": head_sha256(model.model.state_dict()),
            }
        )
        identity = hashlib.sha256(json.dumps([contract.model_dump(mode="json"), config], sort_keys=True).encode()).hexdigest()
        return cls(
            model,
            Encoder(contract, tokenizer),
            model_id=directory.resolve().name,
            version=f"unverified-{identity[:12]}",
            tokens_per_batch=tokens_per_batch,
        )

    def score(self, items: Sequence[ScoreItem]) -> list[ItemResult]:
        """Rewards or an error for each item, in order.

        Errors of items: `too_long` (does not fit the contract's token limit), `template` (the chat template rejects it),
        `non_finite` (the model gave NaN or Inf), `unknown_weights`, `no_normaliser` (the contract has none).
        """
        results: list[ItemResult | None] = [None] * len(items)
        parts: list[_Part] = []
        for index, item in enumerate(items):
            problem = self.facts.refusal(item)
            if problem is not None:
                results[index] = ItemResult(error=problem)
                continue
            try:
                conversations = [self._encode(item, text, gated=self.contract.gate is not None) for text in item.completions]
            except TooLongError as exc:
                results[index] = ItemResult(error=ItemError("too_long", exc.problem))
            except ContractError as exc:
                results[index] = ItemResult(error=ItemError("template", exc.problem))
            else:
                parts += [_Part(index, c) for c in self._split(index, conversations)]
        outputs = self._forward([part.comparison for part in parts], self._model)
        by_item: dict[int, list[tuple[EncodedComparison, torch.Tensor]]] = {}
        for part, values in zip(parts, outputs, strict=True):
            by_item.setdefault(part.item, []).append((part.comparison, values))
        for index, scored in by_item.items():
            results[index] = self._result(items[index], scored)
        assert all(result is not None for result in results)
        return cast(list[ItemResult], results)

    def verify_golden(self) -> None:
        """Recompute the contract's golden scores.

        Raises:
            ContractMismatchError: token ids differ, or a reward is further off than the contract allows.
        """
        contract = self.contract
        for index, golden in enumerate(contract.golden):
            ids = self._encoder.encode(golden.prompt, golden.completion)
            if tuple(ids) != golden.token_ids:
                raise _mismatch(
                    f"template or tokenizer: conversation {index} of the golden scores becomes {len(ids)} token ids "
                    f"that differ from the contract's {len(golden.token_ids)}"
                )
        items = [ScoreItem(tuple(_as_dict(turn) for turn in golden.prompt), (golden.completion,)) for golden in contract.golden]
        for index, (golden, result) in enumerate(zip(contract.golden, self.score(items), strict=True)):
            if result.rewards is None:
                assert result.error is not None
                raise _mismatch(f"golden scores: conversation {index} gives no reward ({result.error.message})")
            found = result.rewards if result.outputs is None else result.outputs[0]
            for name, value, expected in zip(contract.outputs, found, golden.reward, strict=True):
                if not abs(value - expected) <= contract.golden_tolerance * max(1.0, abs(expected)):
                    raise _mismatch(
                        f"golden scores: conversation {index} scores {value:.6g} in {name}, the contract says {expected:.6g} "
                        f"(tolerance {contract.golden_tolerance:g})"
                    )

    def golden_scores(self, golden: Sequence[GoldenScore]) -> tuple[GoldenScore, ...]:
        """The same conversations with the ids and outputs that this model gives them; those the contract cannot hold are left out."""
        items = [ScoreItem(tuple(_as_dict(turn) for turn in entry.prompt), (entry.completion,)) for entry in golden]
        rescored = []
        for entry, result in zip(golden, self.score(items), strict=True):
            if result.error is not None and result.error.code == "non_finite":
                raise ModelLoadError(f"a golden conversation has no reward: {result.error.message}", remedy="do not use this model")
            if result.rewards is not None:
                ids = tuple(self._encoder.encode(entry.prompt, entry.completion))
                values = result.rewards if result.outputs is None else result.outputs[0]
                rescored.append(entry.model_copy(update={"token_ids": ids, "reward": values}))
        return tuple(rescored)

    def features(self, items: Sequence[ScoreItem]) -> list[torch.Tensor | ItemError]:
        """What a head reads: for each item float32 [K, 2, hidden] (end of the completion, gate position), or why there is none."""
        results: list[torch.Tensor | ItemError] = []
        for index, item in enumerate(items):
            try:
                conversations = [self._encode(item, text, gated=True) for text in item.completions]
            except ContractError as exc:
                results.append(ItemError("too_long" if isinstance(exc, TooLongError) else "template", exc.problem))
                continue
            found = self._forward(self._split(index, conversations), lambda batch: torch.stack(self._model.features(batch), dim=1))
            results.append(torch.cat(found))
        return results

    def _encode(self, item: ScoreItem, text: str, *, gated: bool) -> _Conversation:
        prompt = cast(Sequence[Message], item.prompt)
        if not gated:
            return _Conversation(self._encoder.encode(prompt, text), None)
        ids, prompt_length = self._encoder.encode_split(prompt, text)
        return _Conversation(ids, gate_position(self.contract, ids, prompt_length))

    def _split(self, item: int, conversations: list[_Conversation]) -> list[EncodedComparison]:
        # Truncation is decided per completion, so prefixes are compared as ids, not as text.
        prefix = shared_prefix_length([conversation.ids for conversation in conversations])
        comparisons: list[EncodedComparison] = []
        group: list[_Conversation] = []
        used = prefix
        for conversation in conversations:
            length = len(conversation.ids) - prefix
            if group and used + length > self._tokens_per_batch:
                comparisons.append(_comparison(item, prefix, group))
                group, used = [], prefix
            group.append(conversation)
            used += length
        return [*comparisons, _comparison(item, prefix, group)]

    @torch.inference_mode()
    def _forward(self, comparisons: list[EncodedComparison], compute: Callable[[BatchTensors], torch.Tensor]) -> list[torch.Tensor]:
        # float32 [K, ...] on the CPU for each comparison.
        found: list[torch.Tensor] = [torch.zeros(0) for _ in comparisons]
        layout = self._model.layout
        for group in group_by_budget(comparisons, tokens_per_microbatch=self._tokens_per_batch, layout=layout):
            batch = pack([comparisons[i] for i in group], layout=layout, pad_token_id=self._pad_id)
            outputs = compute(to_tensors(batch, self._device)).cpu()
            start = 0
            for index in group:
                stop = start + comparisons[index].num_completions
                found[index] = outputs[start:stop]
                start = stop
        return found

    def _result(self, item: ScoreItem, scored: list[tuple[EncodedComparison, torch.Tensor]]) -> ItemResult:
        comparisons = [comparison for comparison, _ in scored]
        outputs = torch.cat([values for _, values in scored])
        tokens = sum(c.num_tokens_unshared for c in comparisons)
        computed = tokens if self._model.layout == "padded" else sum(c.num_tokens for c in comparisons)
        num_bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        if num_bad:
            # NaN in one completion can reach its siblings through masked attention, so the item fails as a whole.
            error = ItemError("non_finite", f"the model gave NaN or Inf for {num_bad} of {len(outputs)} completions")
            return ItemResult(error=error, tokens=tokens, tokens_computed=computed)
        return ItemResult(
            rewards=self._rewards(item, outputs),
            outputs=tuple(tuple(row) for row in outputs.tolist()) if outputs.shape[1] > 1 else None,
            tokens=tokens,
            tokens_computed=computed,
        )

    def _rewards(self, item: ScoreItem, outputs: torch.Tensor) -> tuple[float, ...]:
        contract = self.contract
        weights = contract.reward_weights if item.weights is None else contract.weight_sets[item.weights]
        combined = outputs[:, 0] if weights == (1.0,) else outputs @ torch.tensor(weights, dtype=torch.float32)
        return self.facts.normalised(combined.tolist(), item)


def _comparison(item: int, prefix: int, group: list[_Conversation]) -> EncodedComparison:
    positions = [conversation.gate_position for conversation in group]
    return EncodedComparison(
        id=str(item),
        prefix_ids=np.array(group[0].ids[:prefix], dtype=np.int32),
        branch_ids=tuple(np.array(conversation.ids[prefix:], dtype=np.int32) for conversation in group),
        labels=Labels(),
        gate_positions=None if None in positions else tuple(cast(list[int], positions)),
    )


def _verify_artifacts(contract: Contract, directory: Path) -> None:
    try:
        verify_files(contract, directory)
    except ContractMismatchError as exc:
        # The head lives in a weights file; name it when it is what was changed.
        if exc.problem.startswith("weights") and _head_differs(contract, directory):
            raise _mismatch(f"head: {exc.problem.removeprefix('weights: ')}, and its head is another one") from exc
        raise
    if _head_differs(contract, directory):
        raise _mismatch(f"head: its tensors in {directory} are not those that the contract was written for")


def _head_differs(contract: Contract, directory: Path) -> bool:
    stored = _stored_head_sha256(directory)
    return None not in (stored, contract.head_sha256) and stored != contract.head_sha256


def _stored_head_sha256(directory: Path) -> str | None:
    # From the files, not from the loaded model: loading may cast. None when a file is damaged.
    head: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                head |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(HEAD_PREFIX)}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return head_sha256(head)


def _as_dict(turn: Message) -> dict[str, str]:
    return {"role": turn["role"], "content": turn["content"]}


def _mismatch(problem: str) -> ContractMismatchError:
    return ContractMismatchError(problem, remedy="restore the exported files, or export the model again")


def pick_device(device: Device) -> torch.device:
    """The device that a setting means.

    Raises:
        ModelLoadError: CUDA is asked for and not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device is cuda and torch sees no GPU", remedy="use device: cpu, or request a GPU (gpus_per_replica)")
    return torch.device(device)


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ContractError(f"contract dtype {name!r} is not one of {', '.join(dtypes)}", remedy="export the model again")
    return dtypes[name]


def _read_config(directory: Path) -> dict[str, object]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{directory}/config.json cannot be read ({exc})", remedy="point at a Transformers model directory") from exc
    if not isinstance(config, dict):
        raise ModelLoadError(f"{directory}/config.json is not a JSON object", remedy="download the model again")
    return config
