"""Heads on the backbone, always in fp32: rewards from pooled hidden states, and log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from rayward.errors import ModelLoadError
from rayward.model.weights import HEAD_PREFIX
from rayward.schema import Frozen

HEAD_KEY = "reward_head"
"""Key of a head that is no plain linear map, in `config.json`."""

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


class MlpHead(nn.Sequential):
    """Linear maps with ReLU between them, in fp32 (the head of Qwen2.5-Math-RM): parameters `score.0`, `score.2`, …"""

    def __init__(self, sizes: Sequence[int], biases: Sequence[bool], *, dtype: torch.dtype, device: torch.device) -> None:
        layers: list[nn.Module] = []
        for (width, next_width), bias in zip(pairwise(sizes), biases, strict=True):
            layers += [LinearHead(width, next_width, bias=bias, dtype=dtype, device=device), nn.ReLU()]
        super().__init__(*layers[:-1])

    @property
    def in_features(self) -> int:
        return cast(nn.Linear, self[0]).in_features


class HeadShape(Frozen):
    """How the stored reward head is built; it travels in the model's config, so that every process builds the same."""

    hidden_sizes: tuple[int, ...] = ()
    """Widths of the layers before the last one."""
    biases: tuple[bool, ...] = (False,)
    """Whether each layer has a bias."""
    num_outputs: int
    """Rows of the last layer."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self | None:
        """The head among stored tensors of these shapes; None without one.

        Raises:
            ModelLoadError: it is neither a linear map nor linear maps with ReLU between them.
        """
        names = {name.removeprefix(HEAD_PREFIX) for name in shapes if name.startswith(HEAD_PREFIX)}
        if not names:
            return None
        layers = ("",) if "weight" in names else tuple(f"{2 * i}." for i in range(sum(name.endswith(".weight") for name in names)))
        known = {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}
        if not {f"{layer}weight" for layer in layers} <= names <= known:
            found = ", ".join(HEAD_PREFIX + name for name in sorted(names))
            raise ModelLoadError(
                f"the reward head has the tensors {found}; a linear map (score.weight) and linear maps with ReLU between them "
                "(score.0.weight, score.2.weight, …) are computed here",
                remedy="use another model, or start a run from its backbone with model.head=fresh",
            )
        widths = tuple(shapes[f"{HEAD_PREFIX}{layer}weight"][0] for layer in layers)
        return cls(hidden_sizes=widths[:-1], biases=tuple(f"{layer}bias" in names for layer in layers), num_outputs=widths[-1])

    @property
    def is_plain(self) -> bool:
        return not self.hidden_sizes and not any(self.biases)


def set_head_shape(config: PretrainedConfig, shape: HeadShape | None) -> None:
    """Write the shape of the head into a config; a plain linear map is not mentioned."""
    if hasattr(config, HEAD_KEY):
        delattr(config, HEAD_KEY)
    if shape is not None and not shape.is_plain:
        setattr(config, HEAD_KEY, shape.model_dump(mode="json"))


def build_head(model: PreTrainedModel) -> None:
    """Replace the linear `score` of a model by the head that its config asks for.

    Raises:
        ModelLoadError: the model has its own classifier.
    """
    if not hasattr(model.config, HEAD_KEY):
        return
    shape = HeadShape.model_validate(getattr(model.config, HEAD_KEY))
    plain = getattr(model, "score", None)
    if not isinstance(plain, nn.Linear):
        raise ModelLoadError(
            f"{type(model).__name__} has its own classifier, and the checkpoint brings a reward head for decoders (score)",
            remedy="check that config.json matches the weights",
        )
    sizes = (plain.in_features, *shape.hidden_sizes, plain.out_features)
    dtype, device = plain.weight.dtype, plain.weight.device
    if shape.hidden_sizes:
        model.score = MlpHead(sizes, shape.biases, dtype=dtype, device=device)
    else:
        model.score = LinearHead(plain.in_features, plain.out_features, dtype=dtype, device=device)


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
