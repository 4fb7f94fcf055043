"""Attention over packed comparisons, and the check whether a model can use it.

Two implementations of one rule (a token attends to the earlier tokens of its own branch and to the whole prefix of its
comparison, never to a sibling branch or another comparison):

- by segments (CPU, and whatever is not CUDA): scaled dot product attention span by span, so that the work is exactly the attended
  area. A mask over the whole row would pay for its square.
- flex (CUDA): FlexAttention with a block mask computed from two integers per token.

Which one is computed follows from the mask, and the mask from the device of the batch (`packed_mask`): nothing is chosen when the
model is built. The table of spans, or the block mask, travels as the 4-D `attention_mask` argument: Transformers hands a 4-D mask
through every architecture unchanged, whereas other keyword arguments are dropped by some decoder layers (Nemotron), and state
outside the call would be gone when gradient checkpointing recomputes a layer.

Shapes: B = 1 row, H query heads, G key/value heads, T tokens, D head size, S branches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from rayward.errors import ModelLoadError
from rayward.model.block_mask import flex_mask

PACKED_ATTENTION = "rayward_packed"


# Below this many tokens one masked call over the whole comparison beats a call per span: kernel launches cost more
# than the few masked entries.
ONE_CALL_TOKENS = 320


def packed_mask(segments: Tensor, num_tokens: int, device: torch.device) -> Tensor | BlockMask:
    """What stands for the mask of a packed row on this device.

    Args:
        segments: int64 [S, 4] on the CPU, the `PackedBatch.segments` table.
        num_tokens: T.
    """
    return flex_mask(segments, num_tokens, device) if device.type == "cuda" else segments[None, None]


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers attention function for packed rows: by segments, or flex where the mask is a block mask."""
    if isinstance(attention_mask, BlockMask):
        found: tuple[Tensor, Tensor | None] = flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    return segment_attention(module, query, key, value, attention_mask, **kwargs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows, span by span.

    Args:
        query: [1, H, T, D]; key and value: [1, G, T, D].
        attention_mask: int64 [1, 1, S, 4], the `PackedBatch.segments` table.

    Returns:
        [1, T, H, D], and None for the attention weights.

    Raises:
        ModelLoadError: the model asks for a feature that this attention does not compute.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelLoadError(
            f"{type(module).__name__} uses logit soft-capping or attention sinks, which packed attention does not compute",
            remedy="set the model up with layout='padded'",
        )
    if attention_mask is None:
        raise AssertionError("packed attention needs the segment table")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    outputs: list[Tensor] = []
    for start, prefix, branches in _comparisons(attention_mask):
        stop = branches[-1][1]
        if stop - start <= ONE_CALL_TOKENS:
            mask = _comparison_mask(prefix, branches, start, query.device)
            rows = slice(start, stop)
            outputs.append(_attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], mask, scaling, dropout))
            continue
        prefix_rows = slice(start, start + prefix)
        if prefix:
            q, k, v = (x[:, :, prefix_rows] for x in (query, key, value))
            outputs.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling))
        for first, last in branches:
            k = torch.cat([key[:, :, prefix_rows], key[:, :, first:last]], dim=2)
            v = torch.cat([value[:, :, prefix_rows], value[:, :, first:last]], dim=2)
            causal = torch.ones(last - first, prefix + last - first, dtype=torch.bool, device=query.device).tril(prefix)
            outputs.append(_attend(query[:, :, first:last], k, v, causal, scaling, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _comparisons(table: Tensor) -> list[tuple[int, int, list[tuple[int, int]]]]:
    # (prefix start, prefix length, [(branch start, branch stop), …]) per comparison, in row order. A branch belongs to the
    # comparison before it when both name one prefix; prefixes of length 0 are told apart by their start.
    result: list[tuple[int, int, list[tuple[int, int]]]] = []
    for start, prefix, first, length in table[0, 0].tolist():
        if not result or result[-1][0] != start:
            result.append((start, prefix, []))
        result[-1][2].append((first, first + length))
    return result


def _comparison_mask(prefix: int, branches: list[tuple[int, int]], start: int, device: torch.device) -> Tensor:
    size = branches[-1][1] - start
    mask = torch.zeros(size, size, dtype=torch.bool, device=device)
    mask[:, :prefix] = True
    for first, last in branches:
        mask[first - start : last - start, first - start : last - start] = True
    return mask.tril_()


def why_not_shareable(model: PreTrainedModel, *, max_tokens: int) -> str | None:
    """Reason why prefixes cannot be shared in this model, or None when they can.

    Decided from what the model is built of: causal attention in every layer, through Transformers' attention
    interface, with explicit positions, and nothing else that mixes tokens.
    """
    config = model.config.get_text_config()
    not_causal = why_not_causal(model)
    if not_causal is not None:
        return not_causal
    causal = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if len(causal) < config.num_hidden_layers:
        return "some layers mix tokens without attention (recurrent or hybrid)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_tokens:
        return f"its sliding window of {window} tokens is shorter than max_tokens {max_tokens}"
    if getattr(config, "attn_logit_softcapping", None) is not None or any(hasattr(m, "sinks") for m in causal):
        return "it uses logit soft-capping or attention sinks"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "rotary") == "relative_key":
        return "its position encoding does not follow position_ids"
    return None


def why_not_causal(model: PreTrainedModel) -> str | None:
    """Reason why a token's hidden state may depend on later ones, or None where it surely does not."""
    if model.config.get_text_config().is_encoder_decoder:
        return "it is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced (no attention interface)"
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        return "its attention is bidirectional"
    return None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
