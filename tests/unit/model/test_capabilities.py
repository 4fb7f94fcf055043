"""What an architecture cannot do is said by name, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.architectures import FAMILIES, make_architecture
from tests.helpers.comparisons import VOCAB_SIZE
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.build import build_reward_model, resolve_hf_config
from rayward.model.capabilities import context_length, position_limit
from rayward.model.pretrained import fill, weight_source

TEXT: dict[str, Any] = {**FAMILIES["llama"], "vocab_size": VOCAB_SIZE}
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def resolved(model: ModelConfig) -> PretrainedConfig:
    contract = Contract(
        template="", template_source="plain", end_token="</s>", end_token_id=2, pad_token="<pad>", pad_token_id=0, max_tokens=64
    )
    return resolve_hf_config(model, contract, vocab_size=VOCAB_SIZE)


def architecture(model_type: str, **values: Any) -> ModelConfig:
    return ModelConfig(architecture={"model_type": model_type, **values}, tokenizer="t", max_tokens=64)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "t5gemma", "bigbird_pegasus"])
def test_an_encoder_decoder_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"model type '{name}' is an encoder-decoder"):
        resolved(architecture(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_a_wrapper_whose_text_model_cannot_be_a_reward_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"model type '{name}' wraps a text model of type .{name}_text"):
        resolved(architecture(name))


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_the_text_model_inside_a_wrapper_is_used_with_its_weights(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 1},
        "llava": {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": VOCAB_SIZE - 1,
        },
    }[name]
    torch.manual_seed(0)
    wrapper = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **given))
    wrapper.save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), max_tokens=64)
    config = resolved(settings)
    assert (config.model_type, config.num_labels, config.attention_dropout) == ({"gemma3": "gemma3_text", "llava": "llama"}[name], 1, 0.0)
    model = build_reward_model(config, max_tokens=64)
    fill(model.model, weight_source(model.model, settings, seed=0))
    found = dict(model.backbone.named_parameters())
    inside = dict(wrapper.model.language_model.named_parameters())
    assert found.keys() == inside.keys()
    assert all(torch.equal(found[key], inside[key]) for key in inside)


def test_no_context_length_is_no_limit() -> None:
    xlnet = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": VOCAB_SIZE}
    config = resolved(architecture("xlnet", **xlnet))
    assert context_length(config) is None
    build_reward_model(config, max_tokens=64)
    with pytest.raises(ConfigError, match="at most 32"):
        resolved(architecture("llama", **{**TEXT, "max_position_embeddings": 32}))


@pytest.mark.parametrize(
    ("name", "values", "cause"),
    [
        ("exaone4", {"sliding_window": None}, "ZeroDivisionError.*\n.*layer_types"),
        ("esmc", {"num_attention_heads": 4, "num_key_value_heads": 2}, "grouped-query"),
        ("xlnet", {"max_position_embeddings": 7}, "no sequence length limit"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_a_typed_error(name: str, values: dict[str, Any], cause: str) -> None:
    with pytest.raises(ModelLoadError, match=f"(?s)no model configuration in .*{name}.*{cause}"):
        resolved(architecture(name, **values))


def test_a_constructor_that_asserts_is_a_typed_error() -> None:
    config = resolved(architecture("squeezebert", hidden_size=32, vocab_size=VOCAB_SIZE, num_attention_heads=4, embedding_size=16))
    with pytest.raises(ModelLoadError, match="sequence-classification model of type 'squeezebert'"):
        build_reward_model(config, max_tokens=64)


def test_positions_that_begin_behind_the_pad_id_are_counted() -> None:
    assert position_limit(make_architecture("bert", max_position_embeddings=66)) == 66
    roberta = make_architecture("bert", model_type="roberta", max_position_embeddings=66, pad_token_id=1)
    assert position_limit(roberta) == 64
    roberta.eval()(input_ids=torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 65), 5))
    assert position_limit(make_architecture("llama")) is None


def test_layer_drop_is_switched_off_as_dropout_is() -> None:
    config = resolved(architecture("opt", **{**FAMILIES["opt"], "layerdrop": 0.5, "dropout": 0.1}))
    assert (config.layerdrop, config.dropout) == (0.0, 0.0)
