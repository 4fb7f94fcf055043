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


def make_architecture(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A …ForSequenceClassification with random weights."""
    values = {**ARCHITECTURES[name], **changes}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert isinstance(model, PreTrainedModel)
    return model
