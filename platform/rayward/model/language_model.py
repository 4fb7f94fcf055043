"""Log-probabilities of completions under a causal language model, on the same packed rows as the reward forward.

Shapes: B rows, T columns, M completion tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rayward.batch.layout import Layout, PackedBatch, language_loss_tokens
from rayward.errors import ModelLoadError
from rayward.model.attention import PACKED_ATTENTION, packed_mask, why_not_shareable
from rayward.model.bounds import refuse_absurd_counts, refuse_absurd_sizes
from rayward.model.heads import LOGIT_ROWS, capped, soft_cap, token_log_probs
from rayward.model.weights import raw_config, read_headers


class LanguageModel(nn.Module):
    """A causal language model that sums log-probabilities over the branches of comparisons.

    Args:
        model: any `…ForCausalLM`.
        max_tokens: longest conversation, to decide whether the model's attention window allows sharing.
        layout: force a layout; None decides by capability.

    Raises:
        ModelLoadError: the model scales its logits in a way that is not computed here.
    """

    def __init__(self, model: PreTrainedModel, *, max_tokens: int, layout: Layout | None = None) -> None:
        super().__init__()
        self._soft_cap = soft_cap(model.config)
        self.model = model
        self.num_embeddings = len(cast(Tensor, model.get_input_embeddings().weight))
        self.layout: Layout = layout or ("padded" if why_not_shareable(model, max_tokens=max_tokens) else "packed")
        if self.layout == "packed":
            model.set_attn_implementation(PACKED_ATTENTION)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device, dtype: torch.dtype, max_tokens: int) -> LanguageModel:
        """Load a policy for inference.

        Raises:
            ModelLoadError: it is no causal language model, or its weights cannot be read.
        """
        shapes = {name: shape for name, (_, shape) in read_headers(directory).items()}
        refuse_absurd_counts(directory, raw_config(directory), len(shapes))
        try:
            config = AutoConfig.from_pretrained(directory)
            refuse_absurd_sizes(directory, shapes, lambda: AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
            raise ModelLoadError(f"{directory} cannot be loaded as a causal language model: {exc}", remedy="check the directory") from exc
        language_model = cls(model, max_tokens=max_tokens).eval()
        return language_model.to(device)

    def completion_log_probs(self, batch: PackedBatch) -> Tensor:
        """Sum of log p(token | everything before it) over the text of each completion, float32 [N].

        The text begins at `text_starts`, or with the branch where that is not known; the first token of a conversation is not counted.
        """
        log_probs, owner = self.token_log_probs(batch)
        total = torch.zeros(len(batch.end_row), dtype=torch.float32, device=log_probs.device)
        return total.index_add_(0, owner, log_probs)

    def token_log_probs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """For each of these tokens, completion by completion, its log-probability, float32 [M], and its completion, int64 [M]."""
        device = next(self.model.parameters()).device
        ids = torch.from_numpy(batch.input_ids).to(device)
        if batch.segments is not None:
            mask: Tensor | BlockMask | None = packed_mask(torch.from_numpy(batch.segments), batch.input_ids.shape[1], device)
        else:
            mask = torch.from_numpy(batch.attention_mask).to(device)
        backbone = cast(PreTrainedModel, getattr(self.model, self.model.base_model_prefix))
        positions = torch.from_numpy(batch.position_ids).to(device)
        hidden = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        tokens = language_loss_tokens(batch, "all")
        rows, before, column, owner = (
            torch.from_numpy(a).to(device) for a in (tokens.row, tokens.before, tokens.column, tokens.completion)
        )
        log_probs = torch.empty(len(rows), dtype=torch.float32, device=device)
        for start in range(0, len(rows), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = self._logits(hidden[rows[part], before[part]])
            log_probs[part] = token_log_probs(logits, ids[rows[part], column[part]])
        return log_probs, owner

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert head is not None
        return capped(cast(Tensor, head(hidden)), self._soft_cap)
