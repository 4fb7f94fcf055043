"""One loader: what a directory says is read, in training and in scoring alike, or refused by name in both."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.architectures import ARCHITECTURES, make_architecture
from tests.helpers.comparisons import VOCAB_SIZE, random_comparisons
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rayward.batch.layout import pack
from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.errors import ModelLoadError
from rayward.model.build import build_reward_model, load_reward_model, resolve_hf_config
from rayward.model.heads import HeadShape
from rayward.model.pretrained import fill, weight_source
from rayward.model.reward_model import RewardModel, to_tensors
from rayward.model.weights import INDEX_FILE, SINGLE_FILE, Checkpoint, RandomInit

CPU = torch.device("cpu")


def contract(outputs: tuple[str, ...] = ("reward",)) -> Contract:
    return Contract(
        template="", template_source="plain", end_token="</s>", end_token_id=2, pad_token="<pad>", pad_token_id=0, max_tokens=64,
        outputs=outputs, reward_weights=(1.0,) * len(outputs),
    )  # fmt: skip


def trained_from(directory: Path, *, outputs: tuple[str, ...] = ("reward",), **settings: Any) -> RewardModel:
    """What the first step of a run from this directory starts with."""
    config = ModelConfig(path=str(directory), max_tokens=64, **settings)
    model = build_reward_model(resolve_hf_config(config, contract(outputs), vocab_size=0), max_tokens=64)
    fill(model.model, weight_source(model.model, config, seed=0))
    return model.eval()


def scored_from(directory: Path) -> RewardModel:
    return load_reward_model(directory, device=CPU, dtype=torch.float32, max_tokens=64)


def rewards_of(model: RewardModel) -> Tensor:
    batch = pack(random_comparisons(3, seed=1), layout=model.layout)
    with torch.no_grad():
        return model(to_tensors(batch, CPU))  # type: ignore[no-any-return]


def language_model(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    values = {**ARCHITECTURES["llama"], **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def change(directory: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = directory / SINGLE_FILE
    save_file({name: value.clone() for name, value in edit(load_file(file)).items()}, file, metadata={"format": "pt"})


def edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture
def reward_directory(tmp_path: Path) -> Path:
    make_architecture("llama", seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_architecture("llama", seed=3).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


# --- the files ---


def test_scoring_computes_with_what_training_starts_with(reward_directory: Path) -> None:
    trained, scored = trained_from(reward_directory), scored_from(reward_directory)
    assert torch.equal(rewards_of(trained), rewards_of(scored))
    stored = AutoModelForSequenceClassification.from_pretrained(reward_directory).state_dict()
    for model in (trained, scored):
        assert all(torch.equal(model.model.state_dict()[name], value) for name, value in stored.items())


def both_refuse(directory: Path, message: str) -> None:
    for load in (trained_from, scored_from):
        with pytest.raises(ModelLoadError, match=f"(?s){message}"):
            load(directory)


def test_an_index_and_a_single_file_beside_its_shards_are_two_models(sharded: Path, tmp_path: Path) -> None:
    make_architecture("llama", seed=4).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / SINGLE_FILE, sharded / SINGLE_FILE)
    both_refuse(sharded, "two models.*remove the one that is stale")
    (sharded / SINGLE_FILE).unlink()
    assert torch.equal(rewards_of(trained_from(sharded)), rewards_of(scored_from(sharded)))


def test_an_index_may_name_the_single_file(reward_directory: Path) -> None:
    names = dict.fromkeys(load_file(reward_directory / SINGLE_FILE), SINGLE_FILE)
    (reward_directory / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert torch.equal(rewards_of(trained_from(reward_directory)), rewards_of(scored_from(reward_directory)))


def test_a_shard_that_is_missing_truncated_or_another_is_refused_before_anything_is_read(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    last, whole = shards[-1], shards[-1].read_bytes()
    last.unlink()
    both_refuse(sharded, rf"lacks {last.name} \(1 of the {len(shards)} files")
    last.write_bytes(whole[:-8])
    both_refuse(sharded, f"cannot be read: {last.name}")
    shutil.copyfile(shards[0], last)
    both_refuse(sharded, rf"{last.name} in .* does not hold .*, which {INDEX_FILE} says it does")
    (sharded / INDEX_FILE).write_text('{"weight_map": ["a"]}')
    both_refuse(sharded, "cannot be read")


def test_weights_that_are_no_safetensors_are_named_with_a_remedy(reward_directory: Path) -> None:
    torch.save(load_file(reward_directory / SINGLE_FILE), reward_directory / "pytorch_model.bin")
    (reward_directory / SINGLE_FILE).unlink()
    both_refuse(reward_directory, r"its weights are in pytorch_model\.bin.*convert the weights to safetensors")


def test_an_adapter_beside_the_base_weights_is_refused(reward_directory: Path) -> None:
    (reward_directory / "adapter_config.json").write_text("{}")
    both_refuse(reward_directory, "adapter_config.json.*merge_and_unload")


def test_quantised_weights_and_normalised_rewards_are_refused(reward_directory: Path) -> None:
    edit_config(reward_directory, quantization_config={"quant_method": "fp8"})
    both_refuse(reward_directory, r"quantised \(fp8\)")
    edit_config(reward_directory, quantization_config=None, normalize_reward=True, mean=1.5, std=2.0)
    both_refuse(reward_directory, "mean 1.5 and standard deviation 2.0.*normalize_reward")


def test_bfloat16_keeps_the_head_in_fp32(reward_directory: Path) -> None:
    model = load_reward_model(reward_directory, device=CPU, dtype=torch.bfloat16, max_tokens=64).model
    assert model.score.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.score.weight, load_file(reward_directory / SINGLE_FILE)["score.weight"])


# --- names and tensors ---


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_the_names_of_wrappers_are_taken_off(reward_directory: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = rewards_of(scored_from(reward_directory))
    change(reward_directory, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    assert torch.equal(rewards_of(trained_from(reward_directory)), expected)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(rewards_of(scored_from(reward_directory)), expected)
    assert "the names are read without" in caplog.text


def test_a_compiled_layer_inside_the_names(reward_directory: Path) -> None:
    expected = rewards_of(scored_from(reward_directory))
    change(reward_directory, lambda tensors: {name.replace("layers.1.", "layers.1._orig_mod."): v for name, v in tensors.items()})
    assert torch.equal(rewards_of(trained_from(reward_directory)), expected)


def test_two_tensors_for_one_parameter_are_refused(reward_directory: Path) -> None:
    name = "model.norm.weight"
    change(reward_directory, lambda tensors: {**tensors, f"module.{name}": tensors[name] + 1})
    both_refuse(reward_directory, rf"(module\.)?{name} and (module\.)?{name} .* are both")
    change(
        reward_directory,
        lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("module.")} | {"norm.weight": torch.ones(32)},
    )
    both_refuse(reward_directory, r"norm\.weight and .*norm\.weight are both stored")


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.lora_A.weight",
     "regression_layer.weight", "gating.layers.0.weight", "score.1.weight"],
)  # fmt: skip
def test_a_tensor_that_nothing_computes_with_is_refused_by_name(reward_directory: Path, name: str) -> None:
    change(reward_directory, lambda tensors: {**tensors, name: torch.ones(4, 32)})
    both_refuse(reward_directory, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_tensors_that_mean_nothing_to_a_reward_are_left(reward_directory: Path, name: str) -> None:
    expected = rewards_of(scored_from(reward_directory))
    change(reward_directory, lambda tensors: {**tensors, name: torch.ones(4)})
    assert torch.equal(rewards_of(scored_from(reward_directory)), expected)
    assert torch.equal(rewards_of(trained_from(reward_directory)), expected)


def test_a_fresh_head_leaves_every_other_head_behind(reward_directory: Path) -> None:
    change(reward_directory, lambda tensors: {**tensors, "regression_layer.weight": torch.ones(4, 32)})
    model = trained_from(reward_directory, head="fresh")
    assert torch.equal(model.model.score.weight.flatten(), RandomInit(model.model, seed=0).read("score.weight", (1, 32), 0, 32))
    change(reward_directory, lambda tensors: {**tensors, "model.odd.weight": torch.ones(4, 32)})
    with pytest.raises(ModelLoadError, match=r"model\.odd\.weight"):
        trained_from(reward_directory, head="fresh")


# --- heads of decoders ---


def hidden_at_ends(model: RewardModel) -> Tensor:
    batch = to_tensors(pack(random_comparisons(3, seed=1), layout=model.layout), CPU)
    with torch.no_grad():
        return model._hidden(batch)[batch.read_row, batch.read_column]


def both_compute(directory: Path, expected: Callable[[Tensor], Tensor]) -> None:
    for model in (trained_from(directory), scored_from(directory)):
        torch.testing.assert_close(rewards_of(model), expected(hidden_at_ends(model)), rtol=1e-6, atol=1e-6)


def test_a_bias_of_the_head_is_added(reward_directory: Path) -> None:
    weight = load_file(reward_directory / SINGLE_FILE)["score.weight"]
    change(reward_directory, lambda tensors: {**tensors, "score.bias": torch.tensor([2.5])})
    both_compute(reward_directory, lambda hidden: hidden @ weight.T + 2.5)


def mlp(width: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"score.0.weight": (width, 32), "score.0.bias": (width,), "score.2.weight": (1, width), "score.2.bias": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_head_of_two_layers_is_computed_in_training_and_scoring(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    head = mlp()
    change(tmp_path, lambda tensors: {**tensors, **head})
    assert HeadShape.of({name: tuple(value.shape) for name, value in head.items()}) == HeadShape(
        hidden_sizes=(24,), biases=(True, True), num_outputs=1
    )

    def expected(hidden: Tensor) -> Tensor:
        inner = torch.relu(hidden @ head["score.0.weight"].T + head["score.0.bias"])
        return inner @ head["score.2.weight"].T + head["score.2.bias"]

    both_compute(tmp_path, expected)
    model = load_reward_model(tmp_path, device=CPU, dtype=torch.bfloat16, max_tokens=64)
    assert {p.dtype for p in model.model.score.parameters()} == {torch.float32}
    assert model.layout == "packed"
    assert rewards_of(model).dtype == torch.float32


def test_a_head_of_two_layers_survives_save_and_load(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path / "first")
    change(tmp_path / "first", lambda tensors: {**tensors, **mlp()})
    first = trained_from(tmp_path / "first")
    save_file(first.model.state_dict(), _made(tmp_path / "second") / SINGLE_FILE)
    first.model.config.save_pretrained(tmp_path / "second")
    assert torch.equal(rewards_of(scored_from(tmp_path / "second")), rewards_of(first))
    fresh = trained_from(tmp_path / "second", head="fresh")
    assert isinstance(fresh.model.score, torch.nn.Linear)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_gradients_reach_every_layer_of_the_head(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: {**tensors, **mlp()})
    model = trained_from(tmp_path)
    model(to_tensors(pack(random_comparisons(3, seed=1), layout=model.layout), CPU)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.model.score.parameters())


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("value_head.safetensors", ("v_head.summary.weight", "v_head.summary.bias")),
        (SINGLE_FILE, ("v_head.summary.weight", "v_head.summary.bias")),
        (SINGLE_FILE, ("value_head.weight",)),
        (SINGLE_FILE, ("my_head.weight",)),
    ],
)
def test_the_value_heads_of_other_frameworks(tmp_path: Path, file: str, names: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    language_model().save_pretrained(tmp_path)
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)), torch.tensor([0.75])
    head = dict(zip(names, (weight, bias), strict=False))
    if file == SINGLE_FILE:
        change(tmp_path, lambda tensors: {**tensors, **head})
        edit_config(tmp_path, value_head_prefix=names[0].split(".", maxsplit=1)[0])
    else:
        save_file(head, tmp_path / file)
    with caplog.at_level(logging.WARNING):
        both_compute(tmp_path, lambda hidden: hidden @ weight.T + (bias if len(names) == 2 else 0.0))
    assert f"the reward head is {', '.join(sorted(names))}" in caplog.text


def test_a_value_head_in_a_pickle_is_refused(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    torch.save({"v_head.summary.weight": torch.ones(1, 32)}, tmp_path / "value_head.bin")
    both_refuse(tmp_path, r"value_head\.bin; only safetensors")


def test_two_heads_are_refused(reward_directory: Path) -> None:
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, reward_directory / "value_head.safetensors")
    both_refuse(reward_directory, "score.weight and v_head.summary.weight .* are both the tensor score.weight")


@pytest.mark.parametrize("names", [("score.weight", "score.scale"), ("score.0.weight", "score.1.weight"), ("score.2.weight",)])
def test_a_head_of_another_kind_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelLoadError, match="the reward head has the tensors score"):
        HeadShape.of(dict.fromkeys(names, (1, 32)))


@pytest.mark.parametrize("biased", [False, True])
def test_one_output_of_a_head_with_layers_starts_a_run(tmp_path: Path, biased: bool) -> None:
    language_model().save_pretrained(tmp_path)
    head = {"score.weight": torch.randn(3, 32)} | ({"score.bias": torch.tensor([1.0, 2.0, 3.0])} if biased else {})
    change(tmp_path, lambda tensors: {**tensors, **head})
    contract(("a", "b", "c")).save(tmp_path)
    model = trained_from(tmp_path, head_output="b")
    assert torch.equal(model.model.score.weight, head["score.weight"][1:2])
    assert (model.model.score.bias is not None) == biased
    if biased:
        assert model.model.score.bias.tolist() == [2.0]


# --- heads of encoders ---

_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "deberta": _ENCODER,
    "deberta-v2": _ENCODER,
    "albert": {**_ENCODER, "embedding_size": 16},
    "electra": {**_ENCODER, "embedding_size": 16},
    "modernbert": {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "eurobert": _ENCODER,
    "distilbert": {"vocab_size": VOCAB_SIZE, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128,
                   "pad_token_id": 0, "initializer_range": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM], ids=["bare", "masked"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_run_starts_from_a_pretrained_encoder(tmp_path: Path, name: str, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    encoder = kind.from_config(AutoConfig.for_model(name, **ENCODERS[name]))
    encoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        config = ModelConfig(path=str(tmp_path), max_tokens=64)
        model = build_reward_model(resolve_hf_config(config, contract(), vocab_size=0), max_tokens=64)
        fill(model.model, weight_source(model.model, config, seed=0, announce=True))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).state_dict()
    stored = encoder.state_dict()
    base = f"{model.model.base_model_prefix}."
    fresh = RandomInit(model.model, seed=0)
    for parameter_name, value in model.model.named_parameters():
        in_stored = parameter_name in stored or parameter_name.removeprefix(base) in stored
        if in_stored:
            assert torch.equal(value, plain[parameter_name]), parameter_name
        else:
            assert not parameter_name.startswith(base) or parameter_name.startswith(f"{base}pooler."), parameter_name
            assert parameter_name in caplog.text
            assert torch.equal(value.flatten(), fresh.read(parameter_name, tuple(value.shape), 0, value.numel()))
    with pytest.raises(ModelLoadError, match="they would be random numbers"):
        scored_from(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    lost = next(
        key for key in sorted(tensors) if "layer" in key and "attention" in key.replace("attn", "attention") and key.endswith("weight")
    )
    change(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if key != lost})
    with pytest.raises(ModelLoadError, match=f"no tensor for parameter .*{lost.split('layer')[-1].replace('.', '[.]')}"):
        trained_from(tmp_path)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "distilbert"])
def test_a_trained_encoder_starts_a_run_and_scores_alike(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **ENCODERS[name], num_labels=1))
    model.save_pretrained(tmp_path)
    trained, scored = trained_from(tmp_path), scored_from(tmp_path)
    assert torch.equal(rewards_of(trained), rewards_of(scored))
    assert all(torch.equal(trained.model.state_dict()[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ModelLoadError, match=r"1 without names.*; the run has a, b"):
        trained_from(tmp_path, outputs=("a", "b"))
    fresh = trained_from(tmp_path, outputs=("a", "b"), head="fresh")
    assert fresh.model.config.num_labels == 2


def test_one_output_of_an_encoder_starts_a_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **_ENCODER, num_labels=3))
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path)
    contract(("a", "b", "c")).save(tmp_path)
    started = trained_from(tmp_path, head_output="c").model.classifier
    assert torch.equal(started.weight, model.classifier.weight[2:])
    assert torch.equal(started.bias, model.classifier.bias[2:])


def test_the_head_of_a_decoder_on_an_encoder_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model("bert", **_ENCODER)).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: {**tensors, "score.weight": torch.ones(1, 32)})
    both_refuse(tmp_path, r"score\.weight|own classifier")


def test_names_of_a_checkpoint_are_those_without_wrappers(reward_directory: Path) -> None:
    change(reward_directory, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})
    checkpoint = Checkpoint.open(reward_directory)
    assert checkpoint.stored_names["score.weight"] == "module.score.weight"
    assert checkpoint.views["score.weight"].shape == (1, 32)
