"""Checkpoints in the layouts that are published: what our source reads is what Transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.helpers.comparisons import VOCAB_SIZE
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSequenceClassification, PreTrainedModel

from rayward.config.model import ModelConfig
from rayward.errors import ModelLoadError
from rayward.model import layouts
from rayward.model.build import build_reward_model, load_reward_model
from rayward.model.pretrained import fill, shapes_of, weight_source
from rayward.model.views import Joined, Part, Stacked, Stored, Transposed, View, boxes, read_flat
from rayward.model.weights import SINGLE_FILE, persistent_buffers, weight_map

CPU = torch.device("cpu")
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "num_labels": 1,
    "pad_token_id": 0,
}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 12},
    "qwen2_moe": {"num_experts": 12, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 12, "decoder_sparse_step": 1, "head_dim": 8},
    "qwen3_next": {
        "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v2": {**_LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "phimoe": {"num_local_experts": 4},
    "jamba": {"num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "minimax": {"num_local_experts": 4, "head_dim": 8, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]}))
    for index, buffer in enumerate(persistent_buffers(model).values()):
        buffer.copy_(buffer + 0.25 * (index + 1))  # not what a model is built with
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_starts_from_its_published_layout(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path, max_shard_size="60KB")
    assert any(".experts.1." in name for name in weight_map(tmp_path)), "experts are stored one by one"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    source = weight_source(model_of(family), ModelConfig(path=str(tmp_path)), seed=0)
    for name, value in plain.state_dict().items():
        size = -(-value.numel() // 3)
        pieces = [
            source.read(name, tuple(value.shape), min(rank * size, value.numel()), min((rank + 1) * size, value.numel()))
            for rank in range(3)
        ]
        assert torch.equal(torch.cat(pieces), value.flatten().float()), name
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64).model.state_dict()
    assert loaded.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())


def test_the_fused_layout_of_an_export_is_read_too(tmp_path: Path) -> None:
    model = model_of("mixtral")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / SINGLE_FILE)
    model.config.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_rank_reads_its_part_of_the_experts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    source = weight_source(model, ModelConfig(path=str(tmp_path)), seed=0)
    read = 0
    plain_read = Stored.read

    def counting(self: Stored, box: Any) -> torch.Tensor:
        nonlocal read
        values = plain_read(self, box)
        read += values.numel()
        return values

    monkeypatch.setattr(Stored, "read", counting)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = shapes_of(model)[name]
    assert source.read(name, shape, 1000, 4321).numel() == 3321
    assert read == 3321


def test_a_missing_half_of_the_experts_and_a_missing_expert_are_errors(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    halves = {name: value for name, value in tensors.items() if ".w3." not in name}
    save_file(halves, tmp_path / SINGLE_FILE)
    with pytest.raises(ModelLoadError, match=r"there are none for .*w3"):
        weight_source(model_of("mixtral"), ModelConfig(path=str(tmp_path)), seed=0)
    less = {name: value for name, value in tensors.items() if ".experts.3." not in name}
    save_file(less, tmp_path / SINGLE_FILE)
    with pytest.raises(ModelLoadError, match=r"has shape \(11, 96, 32\), the model needs \(12, 96, 32\)"):
        weight_source(model_of("mixtral"), ModelConfig(path=str(tmp_path)), seed=0)


def test_an_operation_that_is_not_known_is_an_error_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(layouts._OPERATIONS, "Concatenate")
    with pytest.raises(ModelLoadError, match=r"gate_up_proj from .* with Concatenate, which is not known here"):
        weight_source(model, ModelConfig(path=str(tmp_path)), seed=0)


def test_a_fused_projection_is_split(tmp_path: Path) -> None:
    values = {key: value for key, value in _COMMON.items() if key not in ("moe_intermediate_size", "num_key_value_heads")}
    config = AutoConfig.for_model("nomic_bert", **values)
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert any("Wqkv" in name for name in weight_map(tmp_path)), "queries, keys and values are stored as one"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())


_TEXT = {k: v for k, v in _COMMON.items() if k not in ("moe_intermediate_size", "num_labels")}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize(
    ("wrapper", "text", "vision"),
    [
        ("gemma3", {"model_type": "gemma3_text", "head_dim": 8}, "siglip_vision_model"),
        ("llava", {"model_type": "llama"}, "clip_vision_model"),
    ],
)
def test_the_text_model_inside_a_wrapper(
    tmp_path: Path, wrapper: str, text: dict[str, Any], vision: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        wrapper, text_config={**_TEXT, **text}, vision_config={"model_type": vision, **_VISION}, mm_tokens_per_image=4, image_token_index=5
    )
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    inside = whole.model.language_model
    assert not any(name.startswith("model.layers.") for name in weight_map(tmp_path))
    text_config = AutoConfig.from_pretrained(tmp_path).get_text_config()
    text_config.num_labels = 1
    model = build_reward_model(text_config, max_tokens=64).model
    fill(model, weight_source(model, ModelConfig(path=str(tmp_path)), seed=0, announce=True))
    for name, value in inside.named_parameters():
        assert torch.equal(model.get_parameter(f"model.{name}"), value), name
    assert "the text model is used alone, without multi_modal_projector, vision_tower" in caplog.text


class Whole:
    """A tensor in memory as a view."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape = tuple(values.shape)

    def read(self, box: Any) -> torch.Tensor:
        assert all(0 <= first < last <= size for (first, last), size in zip(box, self.shape, strict=True))
        return self.values[tuple(slice(*bounds) for bounds in box)]


def test_every_range_of_every_view_is_that_of_the_tensor() -> None:
    parts = [torch.randn(3, 4, 5) for _ in range(3)]
    views: list[tuple[View, torch.Tensor]] = [
        *((Stacked([Whole(p) for p in parts], dim), torch.stack(parts, dim)) for dim in (0, 1, 3)),
        *((Joined([Whole(p) for p in parts], dim), torch.cat(parts, dim)) for dim in (0, 1, 2)),
        *((Part(Whole(parts[0]), dim, 1, 3), parts[0].narrow(dim, 1, 2)) for dim in (0, 1, 2)),
        (Transposed(Whole(parts[0]), (1, 2)), parts[0].transpose(1, 2)),
        (Transposed(Joined([Whole(p) for p in parts], 1), (0, 2)), torch.cat(parts, 1).transpose(0, 2)),
    ]
    for view, whole in views:
        assert view.shape == tuple(whole.shape)
        flat = whole.reshape(-1)
        for start in range(0, flat.numel(), 3):
            for stop in range(start, flat.numel() + 1, 7):
                assert torch.equal(read_flat(view, start, stop), flat[start:stop])


def test_boxes_are_few_and_cover_a_range_once() -> None:
    assert list(boxes((), 0, 1)) == [()]
    assert list(boxes((4, 6), 6, 18)) == [((1, 3), (0, 6))]
    assert list(boxes((4, 6), 7, 11)) == [((1, 2), (1, 5))]
    assert list(boxes((4, 6), 4, 14)) == [((0, 1), (4, 6)), ((1, 2), (0, 6)), ((2, 3), (0, 2))]


def test_a_scalar_and_a_slice_of_a_file(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "matrix": torch.arange(12.0).view(3, 4)}, tmp_path / SINGLE_FILE)
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as file:
        assert read_flat(Stored((), lambda: file.get_slice("scalar")), 0, 1).tolist() == [2.5]
        assert read_flat(Stored((3, 4), lambda: file.get_slice("matrix")), 2, 9).tolist() == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("family", ["deepseek_v3", "jamba", "minimax", "qwen3_next"])
def test_types_of_a_16_bit_model_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.bfloat16, max_tokens=64).model.state_dict()
    for name, value in plain.items():
        if name != "score.weight":
            assert loaded[name].dtype == value.dtype, name
            assert torch.equal(loaded[name], value), name
    assert loaded["score.weight"].dtype == torch.float32
