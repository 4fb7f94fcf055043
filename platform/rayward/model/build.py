"""Modules of a reward model without values, and a whole model for inference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rayward.batch.layout import Layout
from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.bounds import refuse_absurd_sizes
from rayward.model.capabilities import UNSUITABLE, context_length, text_config
from rayward.model.gate import GATING_FILE, Gating
from rayward.model.heads import HeadShape, MlpHead, build_head, set_head_shape
from rayward.model.pretrained import fill, scoring_source
from rayward.model.reward_model import RewardModel
from rayward.model.weights import Checkpoint, check_language_head, persistent_buffers, resolve_model_dir


def resolve_hf_config(model: ModelConfig, contract: Contract, *, vocab_size: int) -> PretrainedConfig:
    """The Transformers config of the reward model: regression head, the contract's pad token, no dropout.

    Raises:
        ConfigError: `max_tokens` exceeds the model's context length.
        ModelLoadError: the config cannot be read, or its architecture cannot be a reward model.
    """
    values = dict(model.architecture or {})
    if model.path is not None:
        config = read_hf_config(resolve_model_dir(model.path, model.revision))
    else:
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        except UNSUITABLE as exc:
            raise _no_configuration(model.architecture, exc) from exc
    config = text_config(config)
    context = context_length(config)
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
    set_head_shape(config, None if model.path is None or model.head == "fresh" else _stored_head(model.path, model.revision))
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def read_hf_config(directory: Path) -> PretrainedConfig:
    """The Transformers config of a model directory.

    Raises:
        ModelLoadError: it cannot be read, or its values contradict each other.
    """
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(directory))
    except (OSError, *UNSUITABLE) as exc:
        raise _no_configuration(directory, exc) from exc


def _no_configuration(where: object, exc: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"no model configuration in {where}: {type(exc).__name__}: {exc}",
        remedy="check model.path or model.architecture; a model whose layers are of several kinds may need layer_types, one for each layer"
        if isinstance(exc, (ArithmeticError, TypeError))
        else "check model.path or model.architecture",
    )


def _stored_head(path: str, revision: str | None) -> HeadShape | None:
    checkpoint = Checkpoint.open(resolve_model_dir(path, revision))
    return HeadShape.of({name: view.shape for name, view in checkpoint.views.items()})


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
            model.tie_weights()  # which Transformers leaves out together with the values
            build_head(model)
            return RewardModel(model, max_tokens=max_tokens, layout=layout, with_language=with_language)
    except UNSUITABLE as exc:
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
    checkpoint = Checkpoint.open(directory)
    config = read_hf_config(directory)
    config = config if config.is_encoder_decoder else text_config(config)
    head = HeadShape.of({name: view.shape for name, view in checkpoint.views.items()})
    set_head_shape(config, head)
    if head is not None and head.num_outputs != config.num_labels:
        # A language model's config says nothing about the head that was put on it.
        config.num_labels = head.num_outputs
    if with_language:
        check_language_head(directory, config)
    shapes = {name: view.shape for name, view in checkpoint.views.items()}
    refuse_absurd_sizes(directory, shapes, lambda: AutoModelForSequenceClassification.from_config(config))  # type: ignore[no-untyped-call]
    loaded = build_reward_model(config, max_tokens=max_tokens, dtype=dtype, layout=layout, with_language=with_language)
    _keep_in_fp32(loaded.model, dtype)
    fill(loaded.model, scoring_source(loaded.model, checkpoint))
    loaded.gate = Gating.load(directory / GATING_FILE) if (directory / GATING_FILE).is_file() else None
    return loaded.to(device).eval()


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # The head, and what the architecture marks as too sensitive for 16 bits.
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
            if tensor.is_floating_point() and any(re.search(pattern, name) for pattern in patterns):
                tensor.data = tensor.data.float()
    if isinstance(getattr(model, "score", None), (nn.Linear, MlpHead)):
        model.score.float()
