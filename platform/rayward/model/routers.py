"""Load balancing of mixtures of experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6), as sums that add up over micro-batches.

Over layers and tokens, C_e counts how often expert e is chosen and P_e sums its probabilities; N rows in all, E experts. The loss of a step
is E * sum_e (C_e / N) (P_e / N). C has no gradient, so with C and N of the whole step known each micro-batch adds its own P.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayward.errors import ConfigError


def check_routers(backbone: PreTrainedModel) -> None:
    """Check that a model has routers whose loss is known.

    Raises:
        ConfigError: it has none.
    """
    config = backbone.config.get_text_config()
    if "router_logits" not in (getattr(backbone, "_can_record_outputs", None) or {}) or not hasattr(config, "num_experts_per_tok"):
        raise ConfigError(
            f"training.router_coefficient is set and {type(backbone).__name__} has no routers that Transformers records",
            remedy="set training.router_coefficient=0, or use a mixture of experts such as Mixtral or Qwen3-MoE",
        )


def routing_sums(layers: tuple[Tensor, ...], mask: Tensor | None, top_k: int, *, is_empty: bool) -> Tensor:
    """C and P of a micro-batch, float32 [2, E]; only P has a gradient.

    Args:
        layers: for each router what Transformers records as its logits, [rows, E].
        mask: int64 [R, T], 1 for real tokens; None: all are.
        is_empty: the only row is a dummy, which counts nothing.
    """
    num_experts = layers[0].shape[-1]
    sums = torch.zeros(2, num_experts, device=layers[0].device)
    for logits in layers:
        probabilities = logits.reshape(-1, num_experts).float().softmax(dim=-1)
        weight = probabilities.new_ones((len(probabilities), 1)) if mask is None else mask.reshape(-1, 1).float()
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.detach().topk(top_k, dim=-1).indices, 1.0)
        sums = sums + torch.stack([(chosen * weight).sum(dim=0), (probabilities * weight).sum(dim=0)])
    # Times zero: a rank without work still reaches every router, with a zero gradient.
    return sums * 0.0 if is_empty else sums


def expert_load(sums: Tensor) -> Tensor:
    """What each expert's probability costs, E C_e / N^2, float32 [E], from the sums [2, E] of a whole step."""
    chosen, probabilities = sums
    num_rows = probabilities.sum().clamp(min=1.0)
    load: Tensor = len(chosen) * chosen / num_rows**2
    return load.float()
