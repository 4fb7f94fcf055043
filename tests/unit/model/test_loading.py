from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.architectures import ARCHITECTURES, make_architecture
from tests.helpers.comparisons import VOCAB_SIZE
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rayward.config.model import ModelConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.build import build_reward_model, load_reward_model, resolve_hf_config
from rayward.model.pretrained import weight_source
from rayward.model.weights import INDEX_FILE, INIT_CHUNK, SINGLE_FILE, RandomInit, WeightSource, head_sha256, resolve_model_dir

CPU = torch.device("cpu")


def contract(max_tokens: int = 64, **changes: Any) -> Contract:
    changes.setdefault("reward_weights", (1.0,) * len(changes.get("outputs", ("reward",))))
    return Contract(
        template="",
        template_source="plain",
        end_token="</s>",
        end_token_id=2,
        pad_token="<pad>",
        pad_token_id=0,
        max_tokens=max_tokens,
        **changes,
    )


def read_in_pieces(source: WeightSource, name: str, shape: tuple[int, ...], world_size: int) -> Tensor:
    """As `world_size` ranks would: equal ceilings, the last ones shorter or empty."""
    numel = torch.Size(shape).numel()
    size = -(-numel // world_size)
    pieces = [source.read(name, shape, min(r * size, numel), min((r + 1) * size, numel)) for r in range(world_size)]
    return torch.cat(pieces)


def values_of(source: WeightSource, model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: source.read(n, tuple(p.shape), 0, p.numel()).view(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 5, 13])
def test_random_weights_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    model = make_architecture("nemotron")
    source = RandomInit(model, seed=4)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        whole = source.read(name, shape, 0, parameter.numel())
        assert whole.shape == (parameter.numel(),)
        assert torch.equal(read_in_pieces(RandomInit(model, seed=4), name, shape, world_size), whole)


def test_random_weights_across_the_borders_of_chunks() -> None:
    source = RandomInit(make_architecture("llama"), seed=0)
    shape = (3, INIT_CHUNK - 7)
    whole = source.read("w", shape, 0, 3 * shape[1])
    for start, stop in [(0, 5), (INIT_CHUNK - 3, INIT_CHUNK + 4), (INIT_CHUNK, INIT_CHUNK), (INIT_CHUNK - 1, 2 * INIT_CHUNK + 1)]:
        assert torch.equal(source.read("w", shape, start, stop), whole[start:stop])


def test_random_weights_are_seeded_and_of_the_right_size() -> None:
    model = make_architecture("llama", hidden_size=64, intermediate_size=128)
    first, again, other = (values_of(RandomInit(model, seed=seed), model) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.up_proj.weight"])
    assert first[name].std().item() == pytest.approx(0.2, rel=0.05)
    assert 0 < first["score.weight"].abs().max() < 5 / 65
    assert first["model.norm.weight"].unique().tolist() == [1.0]


def test_norms_that_add_one_start_at_zero_and_biases_too() -> None:
    model = make_architecture("nemotron")
    values = values_of(RandomInit(model, seed=0), model)
    assert values["model.norm.weight"].abs().max() == 0
    assert values["model.norm.bias"].abs().max() == 0
    gemma = make_architecture("gemma2")
    assert values_of(RandomInit(gemma, seed=0), gemma)["model.norm.weight"].abs().max() == 0


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    model = make_architecture("llama", seed=3)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def source_of(directory: Path, model: PreTrainedModel) -> WeightSource:
    return weight_source(model, ModelConfig(path=str(directory)), seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_slices_of_a_checkpoint_are_the_whole(tmp_path: Path, world_size: int, shard_size: str) -> None:
    model = make_architecture("llama", seed=3)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX_FILE).is_file() == (shard_size == "20KB")
    source = source_of(tmp_path, make_architecture("llama", seed=9))
    for name, parameter in model.named_parameters():
        found = read_in_pieces(source, name, tuple(parameter.shape), world_size)
        assert found.dtype == torch.float32
        assert torch.equal(found, parameter.detach().reshape(-1))


def test_a_checkpoint_in_bf16_is_read_as_fp32(tmp_path: Path) -> None:
    model = make_architecture("llama", seed=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = values_of(source_of(tmp_path, make_architecture("llama")), model)
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], p.float()) for name, p in model.named_parameters())


def test_a_language_model_gets_a_fresh_head(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = dict(ARCHITECTURES["llama"])
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    language_model.save_pretrained(tmp_path)
    model = make_architecture("llama")
    source = source_of(tmp_path, model)
    found = values_of(source, model)
    assert torch.equal(found["score.weight"], values_of(RandomInit(model, seed=0), model)["score.weight"])
    for name, parameter in language_model.model.named_parameters():
        assert torch.equal(found[f"model.{name}"], parameter)


def test_a_checkpoint_of_the_bare_backbone(tmp_path: Path) -> None:
    model = make_architecture("gpt2", seed=1)
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / SINGLE_FILE)
    found = values_of(source_of(tmp_path, model), model)
    assert torch.equal(found["transformer.wte.weight"], model.transformer.wte.weight)


def exported(directory: Path, outputs: tuple[str, ...]) -> PreTrainedModel:
    """A model with this head and a contract that names its outputs."""
    model = make_architecture("llama", num_labels=len(outputs), seed=4)
    model.save_pretrained(directory)
    contract(outputs=outputs).save(directory)
    return model


def with_head(outputs: tuple[str, ...]) -> PreTrainedModel:
    model = make_architecture("llama", num_labels=len(outputs))
    model.config.id2label = dict(enumerate(outputs))
    return model


def head_of(directory: Path, outputs: tuple[str, ...], **settings: Any) -> Tensor:
    model = with_head(outputs)
    source = weight_source(model, ModelConfig(path=str(directory), **settings), seed=0)
    return values_of(source, model)["score.weight"]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_one_output_of_a_regression_head_starts_a_bradley_terry_head(tmp_path: Path, world_size: int) -> None:
    stored = exported(tmp_path, ("helpfulness", "correctness", "verbosity"))
    model = with_head(("reward",))
    for row, name in enumerate(("helpfulness", "correctness", "verbosity")):
        source = weight_source(model, ModelConfig(path=str(tmp_path), head_output=name), seed=0)
        assert torch.equal(read_in_pieces(source, "score.weight", (1, 32), world_size), stored.score.weight[row])


def test_a_head_with_the_same_outputs_is_taken_as_it_is(tmp_path: Path) -> None:
    stored = exported(tmp_path, ("a", "b"))
    assert torch.equal(head_of(tmp_path, ("a", "b")), stored.score.weight)
    (tmp_path / "contract.json").unlink()
    assert torch.equal(head_of(tmp_path, ("x", "y")), stored.score.weight)  # nobody says what its outputs are


@pytest.mark.parametrize(
    ("outputs", "settings", "message"),
    [
        (("reward",), {}, "outputs a, b; the run has reward.*model.head=fresh"),
        (("b", "a"), {}, "outputs a, b; the run has b, a"),
        (("reward",), {"head_output": "c"}, "model.head_output is 'c'; the outputs of .* are a, b"),
        (("b", "a"), {"head_output": "a"}, "those of the run b, a"),
    ],
)
def test_a_head_with_other_outputs_is_refused_and_never_silently_made_anew(
    tmp_path: Path, outputs: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    exported(tmp_path, ("a", "b"))
    with pytest.raises(ModelLoadError, match=f"(?s){message}"):
        head_of(tmp_path, outputs, **settings)
    model = with_head(outputs)
    assert torch.equal(head_of(tmp_path, outputs, head="fresh"), values_of(RandomInit(model, seed=0), model)["score.weight"])


def test_a_classifier_without_a_contract_and_with_another_number_of_outputs_is_refused(tmp_path: Path) -> None:
    make_architecture("llama", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"(?s)3 without names.*model.head=fresh"):
        source_of(tmp_path, make_architecture("llama"))


@pytest.mark.parametrize("world_size", [1, 2, 5, 50])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_vocabulary_that_grew_has_zero_rows_at_its_end(tmp_path: Path, name: str, world_size: int) -> None:
    stored = make_architecture(name, seed=1)
    stored.save_pretrained(tmp_path)
    grown = make_architecture(name, vocab_size=VOCAB_SIZE + 3)
    embedding = grown.get_input_embeddings().weight
    (key,) = [key for key, p in grown.named_parameters() if p is embedding]
    found = read_in_pieces(source_of(tmp_path, grown), key, tuple(embedding.shape), world_size).view(embedding.shape)
    assert torch.equal(found[:VOCAB_SIZE], stored.get_input_embeddings().weight)
    assert found[VOCAB_SIZE:].abs().max() == 0


def test_only_the_vocabulary_may_grow(tmp_path: Path) -> None:
    make_architecture("gpt2").save_pretrained(tmp_path)
    longer = make_architecture("gpt2", n_positions=4096)
    with pytest.raises(ModelLoadError, match=r"wpe\.weight .*has shape \(2048, 32\), the model needs \(4096, 32\)"):
        values_of(source_of(tmp_path, longer), longer)


def test_a_missing_backbone_tensor_is_an_error(saved: tuple[Path, PreTrainedModel]) -> None:
    directory, model = saved
    tensors = load_file(directory / SINGLE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"no tensor for parameter model\.layers\.1\.mlp\.up_proj\.weight"):
        values_of(source_of(directory, model), model)


def test_weights_of_another_size_are_an_error(saved: tuple[Path, PreTrainedModel]) -> None:
    directory, _ = saved
    wider = make_architecture("llama", intermediate_size=96)
    with pytest.raises(ModelLoadError, match=r"has shape \(64, 32\), the model needs \(96, 32\)"):
        values_of(source_of(directory, wider), wider)


def test_damaged_or_absent_weights(saved: tuple[Path, PreTrainedModel]) -> None:
    directory, model = saved
    file = directory / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        source_of(directory, model)
    file.unlink()
    with pytest.raises(ModelLoadError, match=r"has no model\.safetensors"):
        source_of(directory, model)
    (directory / INDEX_FILE).write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        source_of(directory, model)


def test_a_name_that_is_neither_directory_nor_downloadable() -> None:
    with pytest.raises(ModelLoadError, match="neither a local directory nor a hub model"):
        resolve_model_dir("nobody/nothing-of-this-name", None)


def architecture(name: str = "llama", **changes: Any) -> ModelConfig:
    return ModelConfig(architecture={**ARCHITECTURES[name], **changes}, tokenizer="unused", max_tokens=64)


def test_the_configuration_is_that_of_a_reward_model() -> None:
    config = resolve_hf_config(architecture(num_labels=5), contract(), vocab_size=10)
    assert (config.num_labels, config.problem_type, config.pad_token_id, config.use_cache) == (1, "regression", 0, False)
    assert config.vocab_size == VOCAB_SIZE, "a padded vocabulary is kept"
    assert resolve_hf_config(architecture(), contract(), vocab_size=VOCAB_SIZE + 1).vocab_size == VOCAB_SIZE + 1
    several = resolve_hf_config(architecture(), contract(outputs=("a", "b")), vocab_size=10)
    assert (several.num_labels, several.id2label) == (2, {0: "a", 1: "b"})


def test_a_context_length_that_is_too_short_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_hf_config(architecture(max_position_embeddings=63), contract(), vocab_size=10)
    assert "model.max_tokens is 64, the model's context length is 63" in caught.value.problem
    assert "at most 63" in caught.value.remedy
    resolve_hf_config(architecture(max_position_embeddings=64), contract(), vocab_size=10)


def test_no_dropout_is_left() -> None:
    config = resolve_hf_config(architecture(attention_dropout=0.3), contract(), vocab_size=10)
    assert config.attention_dropout == 0.0
    gpt2 = resolve_hf_config(architecture("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), contract(), vocab_size=10)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.0, 0.0, 0.0)
    model = build_reward_model(gpt2, max_tokens=64)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_an_unset_number_of_key_value_heads_is_that_of_the_heads() -> None:
    config = resolve_hf_config(architecture("nemotron", num_key_value_heads=None), contract(), vocab_size=10)
    assert config.num_key_value_heads == config.num_attention_heads
    build_reward_model(config, max_tokens=64)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model configuration"):
        resolve_hf_config(ModelConfig(architecture={"model_type": "no-such"}, tokenizer="t"), contract(), vocab_size=10)
    with pytest.raises(ModelLoadError, match="no model configuration"):
        resolve_hf_config(ModelConfig(path=str(tmp_path)), contract(), vocab_size=10)
    with pytest.raises(ModelLoadError, match="sequence-classification model of type 'clip_vision_model'"):
        build_reward_model(AutoConfig.for_model("clip_vision_model"), max_tokens=64)


def test_a_whole_model_for_inference(saved: tuple[Path, PreTrainedModel]) -> None:
    directory, model = saved
    loaded = load_reward_model(directory, device=CPU, dtype=torch.float32, max_tokens=64)
    assert not loaded.training
    assert torch.equal(loaded.model.score.weight, model.score.weight)
    (directory / SINGLE_FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_reward_model(directory, device=CPU, dtype=torch.float32, max_tokens=64)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = dict(ARCHITECTURES["llama"])
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"lacks weights for score\.weight"):
        load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64)


def test_the_hash_of_the_head_covers_names_and_values_and_nothing_else() -> None:
    head = {"score.weight": torch.ones(1, 3)}
    reference = head_sha256(head)
    assert head_sha256({**head, "model.w": torch.ones(2)}) == reference
    assert head_sha256({"score.weight": torch.ones(1, 3, dtype=torch.bfloat16)}) == reference
    assert head_sha256({"score.weight": torch.ones(1, 3) * 1.0001}) != reference
    assert head_sha256({**head, "score.bias": torch.zeros(1)}) != reference
