from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.architectures import ARCHITECTURES, make_architecture
from tests.helpers.models import CONVERSATIONS, make_model
from tests.helpers.tokenizer import CHATML, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rayward import cli
from rayward.artifacts import writer as writer_module
from rayward.config.placement import Placement
from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.errors import ConfigError, ContractMismatchError, ModelLoadError
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.workflows.import_model import import_model

ITEMS = [ScoreItem(prompt, (text,)) for prompt, text in CONVERSATIONS]


def make_foreign(directory: Path, *, num_labels: int = 1, dtype: torch.dtype = torch.float32) -> LlamaForSequenceClassification:
    """A model as others publish it: no contract."""
    directory.mkdir(parents=True)
    model = make_model(make_tokenizer(directory), num_labels=num_labels, seed=7).to(dtype)
    model.save_pretrained(directory)
    return model


def rewards(scorer: Scorer) -> list[float]:
    found = [result.rewards for result in scorer.score(ITEMS)]
    assert None not in found
    return [row[0] for row in found if row is not None]


def test_an_imported_model_scores_as_its_source_and_is_verified(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source")
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    imported, foreign = Scorer.load(tmp_path / "model", device="cpu"), Scorer.load(tmp_path / "source", device="cpu")
    assert rewards(imported) == pytest.approx(rewards(foreign), abs=1e-5)
    assert len(contract.golden) > 3
    assert contract.max_tokens == 512, "the context of the model"
    assert not imported.version.startswith("unverified")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["problem_type"], config["pad_token_id"], config["architectures"]) == (
        "regression",
        0,
        ["LlamaForSequenceClassification"],
    )
    assert "trained elsewhere" in (tmp_path / "model" / "README.md").read_text()


def test_the_weights_keep_their_type(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source", dtype=torch.bfloat16)
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"), max_tokens=100)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "model"))
    assert contract.dtype == "bfloat16"
    assert contract.max_tokens == 100
    assert {name for name, value in after.items() if value.dtype == torch.float32} == {"score.weight"}
    assert all(torch.equal(after[name].float(), value.float()) for name, value in before.items())


def test_several_outputs_are_named_and_weighted(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source", num_labels=2)
    for given in ({}, {"outputs": ("a", "b")}, {"outputs": ("a",), "weights": (1.0,)}, {"outputs": ("a", "a"), "weights": (1.0, 1.0)}):
        with pytest.raises(ConfigError, match="2 outputs"):
            import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    import_model(
        tmp_path / "source",
        tmp_path / "model",
        placement=Placement(device="cpu"),
        outputs=("a", "b"),
        weights=(0.25, 2.0),
    )
    (result,) = Scorer.load(tmp_path / "model", device="cpu").score(ITEMS[:1])
    assert result.outputs is not None
    assert result.rewards == pytest.approx([0.25 * result.outputs[0][0] + 2.0 * result.outputs[0][1]], abs=1e-5)


def without_pad(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(directory)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The pad token becomes an ordinary one, so that the contract has to add its own.
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|pad|>"]
    (directory / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("pad_token", "added_tokens_decoder")}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(directory)


def test_a_pad_token_of_our_own_gets_a_row(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source")
    before = len(without_pad(tmp_path / "source"))
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    assert contract.pad_token_id == before
    rows = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert (len(rows), float(rows[before:].abs().sum())) == (before + 1, 0.0)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"),
    )
    ids = [list(golden.token_ids) for golden in contract.golden[:2]]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, 0].tolist()
    assert logits == pytest.approx([golden.reward[0] for golden in contract.golden[:2]], abs=1e-4)


EXPERTS: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.2, "num_labels": 1,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "deepseek_v3": {
        **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*ARCHITECTURES, *WITH_EXPERTS])
def test_every_family_is_imported_as_plain_transformers_computes_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    make_tokenizer(tmp_path / "source")
    torch.manual_seed(0)
    model = (
        AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **WITH_EXPERTS[name]))
        if name in WITH_EXPERTS
        else make_architecture(name, vocab_size=259)
    ).eval()
    model.save_pretrained(tmp_path / "source")
    contract = import_model(tmp_path / "source", tmp_path / "model", max_tokens=256, placement=Placement(device="cpu"))
    again, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    assert len({golden.reward for golden in contract.golden}) == len(contract.golden) > 3
    for golden in contract.golden:
        ids = torch.tensor([golden.token_ids])
        with torch.no_grad():
            before, after = (plain.eval()(input_ids=ids).logits[0, 0].item() for plain in (model, again))
        assert golden.reward[0] == pytest.approx(before, abs=1e-5)
        assert after == pytest.approx(before, abs=1e-5)


def test_an_encoder_keeps_its_count_of_positions(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    tokenizer = make_tokenizer(tmp_path / "source")
    # The pad id of its config is not the tokenizer's, and positions begin behind it: 48 of 50 are left.
    model = make_architecture("bert", model_type="roberta", vocab_size=len(tokenizer), max_position_embeddings=50, pad_token_id=1)
    model.eval().save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"1 to the model's context length \(48\)"):
        import_model(tmp_path / "source", tmp_path / "model", max_tokens=49, placement=Placement(device="cpu"))
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    assert contract.max_tokens == 48
    for golden in contract.golden:
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([golden.token_ids])).logits[0, 0].item()
        assert golden.reward[0] == pytest.approx(expected, abs=1e-5)


def test_a_copy_that_scores_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_foreign(tmp_path / "source")
    save = writer_module.save_file

    def faulty(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        damaged = {name: tensor if name.startswith("score.") else tensor * 1.01 for name, tensor in tensors.items()}
        save(damaged, path, metadata={"format": "pt"})

    monkeypatch.setattr(writer_module, "save_file", faulty)
    with pytest.raises(ContractMismatchError, match="golden scores"):
        import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source")
    with pytest.raises(ConfigError, match="--max-tokens is 513"):
        import_model(tmp_path / "source", tmp_path / "model", max_tokens=513, placement=Placement(device="cpu"))
    import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    with pytest.raises(ConfigError, match="exists already"):
        import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    with pytest.raises(ConfigError, match="has a contract already"):
        import_model(tmp_path / "model", tmp_path / "again", placement=Placement(device="cpu"))
    headless = shutil.copytree(tmp_path / "source", tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="random numbers"):
        import_model(headless, tmp_path / "again", placement=Placement(device="cpu"))
    with pytest.raises(ModelLoadError, match="neither a local directory nor a hub model"):
        import_model(Path("nobody/nothing"), tmp_path / "again", placement=Placement(device="cpu"))
    assert not (tmp_path / "again").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_foreign(tmp_path / "source", num_labels=2)
    arguments = [str(tmp_path / "source"), str(tmp_path / "model"), "--outputs", "a,b", "--weights", "1,-0.5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rayward", "import", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "golden scores" in capsys.readouterr().out
    contract = Contract.load(tmp_path / "model")
    assert (contract.outputs, contract.reward_weights) == (("a", "b"), (1.0, -0.5))


def _linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda hidden: nn.functional.linear(hidden, weight, bias)


def _write_head(directory: Path, kind: str) -> Callable[[Tensor], Tensor]:
    """Replace the head of a published model by one of another framework; what it computes."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(1, 32, generator=generator), torch.randn(1, generator=generator)
    wide, wide_bias = torch.randn(32, 32, generator=generator), torch.randn(32, generator=generator)
    tensors = load_file(directory / "model.safetensors")
    del tensors["score.weight"]
    config = json.loads((directory / "config.json").read_text())
    compute = _linear(weight)
    match kind:
        case "llama_factory":
            config["architectures"] = ["LlamaForCausalLM"]
            save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, directory / "value_head.safetensors")
            compute = _linear(weight, bias)
        case "openrlhf":
            config["value_head_prefix"] = "value_head"
            tensors["value_head.weight"] = weight
        case "bias":
            tensors |= {"score.weight": weight, "score.bias": bias}
            compute = _linear(weight, bias)
        case "mlp":
            tensors |= {"score.0.weight": wide, "score.0.bias": wide_bias, "score.2.weight": weight, "score.2.bias": bias}
            compute = nn.Sequential(Compute(_linear(wide, wide_bias)), nn.ReLU(), Compute(_linear(weight, bias)))
        case "wrapped":
            tensors = {f"module._orig_mod.{name}": value for name, value in tensors.items()} | {"module._orig_mod.score.weight": weight}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return compute


class Compute(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


@pytest.mark.parametrize("kind", ["llama_factory", "openrlhf", "bias", "mlp", "wrapped"])
def test_heads_of_other_frameworks_score_as_they_did(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = make_foreign(tmp_path / "source").model
    compute = _write_head(tmp_path / "source", kind)
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    for golden in contract.golden:
        with torch.no_grad():
            expected = compute(backbone(input_ids=torch.tensor([golden.token_ids])).last_hidden_state[0, -1]).item()
        assert golden.reward[0] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    imported = Scorer.load(tmp_path / "model", device="cpu")
    assert rewards(imported) == pytest.approx(rewards(Scorer.load(tmp_path / "source", device="cpu")), abs=1e-5)
    told = capsys.readouterr().out
    assert ("the reward head is" in told) == (kind in ("llama_factory", "openrlhf"))


def mlp_head(hidden_size: int) -> dict[str, torch.Tensor]:
    shapes = {"score.0.weight": (24, hidden_size), "score.0.bias": (24,), "score.2.weight": (1, 24), "score.2.bias": (1,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["bias", "layers", "value_head_file", "value_head_prefix", "wrapped"])
def test_heads_of_other_frameworks_are_imported_with_verified_scores(tmp_path: Path, kind: str) -> None:
    make_foreign(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    weight = tensors["score.weight"]
    if kind == "bias":
        tensors["score.bias"] = torch.tensor([2.5])
    elif kind == "wrapped":
        tensors = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    else:
        del tensors["score.weight"]
    if kind == "layers":
        tensors |= mlp_head(weight.shape[1])
    elif kind == "value_head_file":
        save_file({"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.5])}, file.with_name("value_head.safetensors"))
    elif kind == "value_head_prefix":
        tensors["value_score.weight"] = weight
        config = json.loads((tmp_path / "source" / "config.json").read_text())
        (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "value_head_prefix": "value_score"}))
    save_file(tensors, file, metadata={"format": "pt"})
    contract = import_model(tmp_path / "source", tmp_path / "model", placement=Placement(device="cpu"))
    assert contract.golden
    imported, foreign = Scorer.load(tmp_path / "model", device="cpu"), Scorer.load(tmp_path / "source", device="cpu")
    assert rewards(imported) == pytest.approx(rewards(foreign), abs=1e-5)
    shift = {"bias": 2.5, "value_head_file": 0.5}.get(kind, 0.0)
    if kind != "layers":
        make_foreign(tmp_path / "plain")
        plain = Scorer.load(tmp_path / "plain", device="cpu")
        assert rewards(imported) == pytest.approx([value + shift for value in rewards(plain)], abs=1e-5)


def test_what_the_template_changes_is_refused_or_accepted_by_the_contract(tmp_path: Path) -> None:
    make_foreign(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "strict", placement=Placement(device="cpu"))
    import_model(tmp_path / "source", tmp_path / "model", unshown_text="accept", placement=Placement(device="cpu"))
    thought = ScoreItem((Message(role="user", content="Who?"),), ("<think>Who indeed.</think>I.", "I."))
    (refused,), (accepted,) = (Scorer.load(tmp_path / name, device="cpu").score([thought]) for name in ("strict", "model"))
    assert refused.error is not None
    assert refused.error.code == "changed_by_template"
    assert accepted.rewards is not None
    assert accepted.rewards[0] == pytest.approx(accepted.rewards[1], abs=1e-6)
