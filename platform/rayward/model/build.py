"""Modules of a reward model without values, and a whole model for inference."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rayward.batch.layout import Layout
from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.gate import GATING_FILE, Gating
from rayward.model.reward_model import RewardModel
from rayward.model.weights import LANGUAGE_HEAD, check_language_head, is_tied, resolve_model_dir, weight_map


def resolve_hf_config(model: ModelConfig, contract: Contract, *, vocab_size: int) -> PretrainedConfig:
    """The Transformers config of the reward model: regression head, the contract's pad token, no dropout.

    Raises:
        ConfigError: `max_tokens` exceeds the model's context length.
        ModelLoadError: the config cannot be read.
    """
    values = dict(model.architecture or {})
    try:
        if model.path is not None:
            config = AutoConfig.from_pretrained(resolve_model_dir(model.path, model.revision))
        else:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelLoadError(
            f"no model configuration in {model.path or model.architecture}: {exc}", remedy="check model.path or model.architecture"
        ) from exc
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and contract.max_tokens > context:
        raise ConfigError(
            f"model.max_tokens is {contract.max_tokens}, the model's context length is {context}",
            remedy=f"set model.max_tokens to at most {context}",
        )
    config.num_labels = len(contract.outputs)
    config.id2label = dict(enumerate(contract.outputs))
    config.label2id = {name: index for index, name in enumerate(contract.outputs)}
    config.problem_type = "regression"
    config.pad_token_id = contract.pad_token_id
    config.vocab_size = max(config.vocab_size, vocab_size)
    config.use_cache = False
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
    return cast(PretrainedConfig, config)


def build_reward_model(
    config: PretrainedConfig,
    *,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
    with_language: bool = False,
) -> RewardModel:
    """The modules without values: call `fill` next. Inside `deepspeed.zero.Init` the parameters are partitioned at once.

    Args:
        with_language: keep the language-model head.

    Raises:
        ModelLoadError: Transformers has no sequence-classification model of this type, or it has no language-model head.
    """
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            return RewardModel(model, max_tokens=max_tokens, layout=layout, with_language=with_language)
    except (ValueError, KeyError) as exc:
        raise ModelLoadError(
            f"Transformers cannot build a sequence-classification model of type {config.model_type!r}: {exc}",
            remedy="use an architecture with a …ForSequenceClassification class",
        ) from exc


def load_reward_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    layout: Layout | None = None,
    with_language: bool = False,
) -> RewardModel:
    """Load a whole sequence-classification model for inference: an export of ours or any other.

    Raises:
        ModelLoadError: it cannot be loaded, or its head would be newly initialised.
    """
    verbosity = transformers_logging.get_verbosity()
    try:
        # Its report of a kept language-model head reads like a fault; what is missing is our own error.
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        model, info = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise ModelLoadError(
            f"{directory} cannot be loaded as a sequence-classification model: {exc}", remedy="check the directory"
        ) from exc
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{directory} lacks weights for {', '.join(missing[:4])}: they would be random numbers",
            remedy="give a trained reward model; a language model has no reward head yet",
        )
    model = model.to(device)
    if isinstance(getattr(model, "score", None), nn.Linear):
        model.score.float()
    gate = Gating.load(directory / GATING_FILE).to(device) if (directory / GATING_FILE).is_file() else None
    loaded = RewardModel(model, max_tokens=max_tokens, layout=layout, gate=gate, with_language=with_language).eval()
    if with_language:
        check_language_head(directory, model.config)
        if not is_tied(model.config):
            with safe_open(directory / weight_map(directory)[LANGUAGE_HEAD], framework="pt") as file, torch.no_grad():
                cast(nn.Linear, model.lm_head).weight.copy_(file.get_tensor(LANGUAGE_HEAD))
    return loaded
