"""Backbone and head: a packed micro-batch in, fp32 rewards out. The only forward in the project.

Training, evaluation, golden scores and serving all call `RewardModel.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from rayward.batch.layout import LanguageLossTokens, Layout, PackedBatch
from rayward.errors import ModelLoadError
from rayward.model.attention import PACKED_ATTENTION, packed_mask, why_not_causal, why_not_shareable
from rayward.model.gate import Gating
from rayward.model.heads import LanguageHead, LinearHead, MlpHead
from rayward.model.routers import routing_sums


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """A `PackedBatch` on a device; the same fields and shapes, int64."""

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor | None
    attention_mask: Tensor | None
    end_row: Tensor
    end_column: Tensor
    read_row: Tensor
    read_column: Tensor
    gate_column: Tensor | None = None
    num_reads: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LanguageLossTensors:
    """`LanguageLossTokens` on a device: int64 [M], the weight float32 [M]."""

    row: Tensor
    before: Tensor
    column: Tensor
    weight: Tensor


def language_loss_tensors(tokens: LanguageLossTokens, device: torch.device) -> LanguageLossTensors:
    """Copy the table of language-loss tokens to a device."""
    arrays = (tokens.row, tokens.before, tokens.column, tokens.weight)
    return LanguageLossTensors(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def to_tensors(batch: PackedBatch, device: torch.device) -> BatchTensors:
    """Copy the arrays of a micro-batch to a device (the segment table stays on the CPU, where it is read)."""

    def move(name: str) -> Tensor | None:
        array = getattr(batch, name)
        return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)

    return BatchTensors(
        input_ids=cast(Tensor, move("input_ids")),
        position_ids=cast(Tensor, move("position_ids")),
        segments=None if batch.segments is None else torch.from_numpy(batch.segments),
        attention_mask=move("attention_mask"),
        end_row=cast(Tensor, move("end_row")),
        end_column=cast(Tensor, move("end_column")),
        read_row=cast(Tensor, move("read_row")),
        read_column=cast(Tensor, move("read_column")),
        gate_column=move("gate_column"),
        num_reads=None if batch.gate_column is None else cast(Tensor, move("num_reads")),
    )


class RewardModel(nn.Module):
    """A Transformers sequence-classification model whose rewards are read at the end token of each completion.

    Args:
        model: any `…ForSequenceClassification`; one with a linear `score` head gets the fp32 head, others (encoders
            with their own pooler) keep their head and are computed in the padded layout.
        max_tokens: longest conversation, to decide whether the model's attention window allows sharing.
        layout: force a layout; None decides by capability.
        gate: makes a score of the outputs of a linear head (mixture of objectives); its output comes after them.
        with_language: keep the language-model head, for a language-model loss or to write critiques.

    Raises:
        ModelLoadError: `with_language`, and the model is no causal language model with a linear reward head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        layout: Layout | None = None,
        gate: Gating | None = None,
        with_language: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.gate = gate
        self.has_linear_head = isinstance(getattr(model, "score", None), (nn.Linear, MlpHead))
        self.why_padded = why_not_shareable(model, max_tokens=max_tokens) if self.has_linear_head else "it has its own pooler"
        self.layout: Layout = layout or ("padded" if self.why_padded else "packed")
        if self.has_linear_head:
            _use_fp32_head(model)
        if with_language:
            if not self.has_linear_head:
                raise ModelLoadError(
                    f"{type(model).__name__} has no causal language model under its reward head, and a language-model loss or critiques "
                    "need one",
                    remedy="use a decoder model, or set objective.language_coefficient=0",
                )
            _add_language_head(model)
        if self.layout == "packed":
            self.use_packed_attention()

    def use_packed_attention(self) -> None:
        """Attention over packed comparisons, as the device of each batch needs it."""
        self.model.set_attn_implementation(PACKED_ATTENTION)

    def compile_layers(self) -> None:
        """Compile every layer of the backbone, for rows of any length; for scoring on CUDA, where the first forwards then take longer.

        Every operation rounds as it does when it is not compiled, so that rewards stay those of training.
        """
        kinds = set(self.model._no_split_modules or ())
        for module in self.model.modules():
            if type(module).__name__ in kinds:
                module.compile(dynamic=True, options={"emulate_precision_casts": True})

    @property
    def backbone(self) -> PreTrainedModel:
        return cast(PreTrainedModel, getattr(self.model, self.model.base_model_prefix))

    @property
    def why_no_trace(self) -> str | None:
        """Reason why the head says nothing at a token before the last one, or None where it does."""
        return why_not_causal(self.model) if self.has_linear_head else "its head reads a state of the whole text"

    def forward(
        self, batch: BatchTensors, tokens: LanguageLossTensors | None = None, *, with_routing: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Outputs, float32 [R, outputs], where the batch is read: completion by completion (R may be 0).

        With `tokens`, also the weighted sum of the negative log-probabilities of these tokens, a float32 scalar. With `with_routing`, also
        that sum (0 without tokens) and what the routers did, float32 [2, experts] (`routers.routing_sums`).
        """
        if not self.has_linear_head:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
            return cast(Tensor, logits[batch.end_row])
        output = self._run(batch, **({"output_router_logits": True} if with_routing else {}))
        hidden, routing = cast(Tensor, output.last_hidden_state), self._routing(batch, output) if with_routing else None
        # An empty micro-batch selects no position, and its sum still reaches every parameter with a zero gradient.
        outputs = cast(Tensor, cast(nn.Module, self.model.score)(hidden[batch.read_row, batch.read_column]))
        if tokens is not None:
            targets = batch.input_ids[tokens.row, tokens.column]
            log_probs = cast(LanguageHead, self.model.lm_head)(hidden[tokens.row, tokens.before], targets)
            language = -(tokens.weight * log_probs).sum()
            return (outputs, language) if routing is None else (outputs, language, routing)
        if routing is not None:
            return outputs, torch.zeros((), device=outputs.device), routing
        if self.gate is None:
            return outputs
        assert batch.gate_column is not None
        assert batch.num_reads is not None
        prompts = hidden[batch.end_row, batch.gate_column].repeat_interleave(batch.num_reads, dim=0)
        return cast(Tensor, self.gate(outputs, prompts))

    def features(self, batch: BatchTensors) -> tuple[Tensor, Tensor]:
        """What a head reads: hidden states at the end of each completion and at its gate position, float32 [N, H] each."""
        assert batch.gate_column is not None
        hidden = self._hidden(batch)
        return hidden[batch.end_row, batch.end_column].float(), hidden[batch.end_row, batch.gate_column].float()

    def _hidden(self, batch: BatchTensors) -> Tensor:
        return cast(Tensor, self._run(batch).last_hidden_state)

    def _routing(self, batch: BatchTensors, output: Any) -> Tensor:
        top_k = self.backbone.config.get_text_config().num_experts_per_tok
        return routing_sums(output.router_logits, batch.attention_mask, top_k, is_empty=len(batch.end_row) == 0)

    def _run(self, batch: BatchTensors, **asked: bool) -> Any:
        mask: Tensor | BlockMask | None = batch.attention_mask
        if batch.segments is not None:
            mask = packed_mask(batch.segments, batch.input_ids.shape[1], batch.input_ids.device)
        return self.backbone(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **asked)


def _use_fp32_head(model: PreTrainedModel) -> None:
    # Same parameters under the same names; only the arithmetic changes.
    if isinstance(model.score, nn.Linear):
        model.score.__class__ = LinearHead


def _add_language_head(model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings().weight
    model.lm_head = LanguageHead(model.config, cast(nn.Linear | MlpHead, model.score).in_features, cast(nn.Parameter, embedding))
