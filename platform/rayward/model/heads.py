"""Heads on the backbone, always in fp32: rewards from pooled hidden states, and log-probabilities of tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from rayward.errors import ModelLoadError

LOGIT_ROWS = 1024
"""Positions whose logits [.., V] are in memory at once."""


class LinearHead(nn.Linear):
    """Linear map computed in fp32 whatever the backbone's type (rewards rounded to bf16 tie).

    Stored under the name `score`, so that the export is a plain Transformers sequence-classification model.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, hidden] -> float32 [N, outputs]."""
        bias = None if self.bias is None else self.bias.float()
        return linear(input.float(), self.weight.float(), bias)


class LanguageHead(nn.Linear):
    """The output embedding of a language model, for log-probabilities; logits are computed again in the backward, not kept.

    Args:
        config: of the model; `tie_word_embeddings` makes `embedding` the weight.
        hidden_size: width of the hidden states.
        embedding: the input embedding.

    Raises:
        ModelLoadError: the model scales its logits in a way that is not computed here.
    """

    def __init__(self, config: PretrainedConfig, hidden_size: int, embedding: nn.Parameter) -> None:
        super().__init__(hidden_size, config.vocab_size, bias=False, dtype=embedding.dtype, device=embedding.device)
        self._soft_cap = soft_cap(config)
        if getattr(config, "tie_word_embeddings", False):
            self.weight = embedding

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Log-probabilities of the targets [M] after the hidden states [M, hidden], float32 [M]; without targets the logits."""
        if targets is None:
            return capped(linear(hidden, self.weight), self._soft_cap)
        chunks = zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
        if torch.is_grad_enabled():
            parts = [cast(Tensor, checkpoint(self._log_probs, h, t, use_reentrant=False)) for h, t in chunks]
        else:
            parts = [self._log_probs(h, t) for h, t in chunks]
        return torch.cat(parts)

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_log_probs(capped(linear(hidden, self.weight), self._soft_cap), targets)


def soft_cap(config: PretrainedConfig) -> float | None:
    """Bound of the logits, None without one.

    Raises:
        ModelLoadError: the model scales its logits in a way that is not computed here.
    """
    if getattr(config, "logits_scaling", 1.0) != 1.0 or getattr(config, "logit_scale", 1.0) != 1.0:
        raise ModelLoadError(
            f"a model of type {config.model_type!r} scales its logits, which is not supported here", remedy="use another architecture"
        )
    return cast(float | None, getattr(config, "final_logit_softcapping", None))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits as float32, softly bounded."""
    logits = logits.float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) from logits [M, V] and targets [M]."""
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
