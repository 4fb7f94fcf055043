"""Tiny random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
from tests.helpers.comparisons import VOCAB_SIZE
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "num_labels": 1,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "num_key_value_heads": 2},
    "nemotron": {**_COMMON, "model_type": "nemotron", "num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {**_COMMON, "model_type": "qwen2", "num_key_value_heads": 1},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048,
        "initializer_range": 0.2, "num_labels": 1, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "mistral": {**_COMMON, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16},
    "gemma2": {**_COMMON, "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8},
    "bert": {**_COMMON, "model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip

_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_MLA: dict[str, Any] = {
    **_COMMON, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_GPT: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("arcee", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "llama", "ministral", "mistral", "nemotron", "olmo2", "olmo3",
         "phi", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "stablelm", "hunyuan_v1_dense"), _GROUPED
    ),
    "phi3": {**_GROUPED, "bos_token_id": 1, "eos_token_id": 2},
    "exaone4": {**_GROUPED, "layer_types": ["full_attention", "full_attention"]},
    **{key: {**_GROUPED, **_EXPERTS} for key in ("mixtral", "hunyuan_v1_moe", "phimoe", "gpt_oss", "qwen3_moe")},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "jetmoe": {**_GROUPED, **_EXPERTS, "kv_channels": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    "minimax": {**_GROUPED, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v2": {**_MLA, **_ROUTED, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, **_ROUTED, "n_group": 1, "topk_group": 1},
    "gpt2": {**_GPT},
    "openai-gpt": {**_GPT},
    "gpt_neox": _COMMON,
    "opt": {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    **{key: {**_COMMON, "max_position_embeddings": 256} for key in ("bert", "roberta", "electra", "deberta-v2", "modernbert", "albert")},
    "distilbert": {"vocab_size": VOCAB_SIZE, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
}  # fmt: skip
"""One tiny model for each family of decoders and encoders that the tests go through."""


def make_architecture(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A …ForSequenceClassification with random weights."""
    values = {**ARCHITECTURES[name], **changes}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert isinstance(model, PreTrainedModel)
    return model
