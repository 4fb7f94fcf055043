from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.architectures import make_architecture
from tests.helpers.models import make_export, make_model, plain_reward
from tests.helpers.tokenizer import make_tokenizer
from transformers import LlamaForSequenceClassification

from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.errors import ContractMismatchError, ModelLoadError, UnverifiedError
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.serving.preflight import check_model


def item(prompt: str, *completions: str) -> ScoreItem:
    return ScoreItem(prompt=({"role": "user", "content": prompt},), completions=completions)


ITEMS = [
    item("Name a colour.", "Red.", "Blue, because the sky is blue.", "Red."),
    item("Count to three", "1 2 3"),
    item("Say something long", "word " * 20, "w", "other " * 18, "x y z"),
    item("Name a colour.", "Green"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.load(export, device="cpu")


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def test_rewards_equal_plain_transformers_one_by_one(export: Path, scorer: Scorer) -> None:
    model = LlamaForSequenceClassification.from_pretrained(export).eval()
    encoder = Encoder(Contract.load(export), load_tokenizer(str(export)))
    for asked, result in zip(ITEMS, scorer.score(ITEMS), strict=True):
        expected = [plain_reward(model, encoder.encode(asked.prompt, text)) for text in asked.completions]  # type: ignore[arg-type]
        assert result.rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [64, 200, 8192])
def test_score_does_not_depend_on_company_or_budget(export: Path, scorer: Scorer, tokens_per_batch: int) -> None:
    together = Scorer.load(export, device="cpu", tokens_per_batch=tokens_per_batch).score(ITEMS)
    for asked, result in zip(ITEMS, together, strict=True):
        alone = [scorer.score([ScoreItem(asked.prompt, (text,))])[0].rewards[0] for text in asked.completions]  # type: ignore[index]
        assert result.rewards == pytest.approx(alone, abs=1e-5)


def test_shared_prompt_is_computed_once(scorer: Scorer) -> None:
    prompt = "p" * 100
    (one,), (four,) = scorer.score([item(prompt, "a")]), scorer.score([item(prompt, "a", "b", "c", "d")])
    assert one.tokens == one.tokens_computed
    assert one.num_tokens == (one.tokens,)
    assert four.tokens == 4 * one.tokens
    assert four.num_tokens == 4 * one.num_tokens
    # Byte tokens: the completions differ in their first byte, and each is followed by the end token alone.
    assert four.tokens_computed == one.tokens + 3 * 2


def test_item_over_the_budget_is_split_with_its_prefix(export: Path) -> None:
    small = Scorer.load(export, device="cpu", tokens_per_batch=64)
    result = small.score([item("Name a number", *(f"{i} is one" for i in range(30)))])[0]
    assert result.rewards is not None
    assert len(result.rewards) == 30
    assert result.tokens_computed < result.tokens


def test_too_long_item_is_an_error_and_its_neighbours_are_scored(scorer: Scorer) -> None:
    first, second, third = scorer.score([ITEMS[0], item("short", "ok", "x" * 500), ITEMS[1]])
    assert second.rewards is None
    assert second.error is not None
    assert second.error.code == "too_long"
    assert first.rewards is not None
    assert third.rewards == pytest.approx(scorer.score([ITEMS[1]])[0].rewards, abs=1e-5)


def test_non_finite_reward_is_an_error_never_a_number(copy: Path) -> None:
    broken = Scorer.load(copy, device="cpu", verify=False)
    token = load_tokenizer(str(copy))("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        broken._model.model.get_input_embeddings().weight[token] = float("nan")
    good, bad = broken.score([item("fine", "ok"), item("hmm", "ok", "~")])
    assert good.rewards is not None
    assert bad.rewards is None
    assert bad.error is not None
    assert bad.error.code == "non_finite"


def test_empty_call(scorer: Scorer) -> None:
    assert scorer.score([]) == []


def test_version_identifies_the_contract(export: Path, scorer: Scorer, tmp_path: Path) -> None:
    other = Scorer.load(make_export(tmp_path / "other", seed=1), device="cpu")
    assert len(scorer.version) == 12
    assert other.version != scorer.version
    assert Scorer.load(export, device="cpu", verify=False).version == scorer.version


def test_foreign_model_is_served_unverified(export: Path, scorer: Scorer, copy: Path) -> None:
    (copy / "contract.json").unlink()
    foreign = Scorer.load(copy, device="cpu")
    assert foreign.version.startswith("unverified-")
    assert foreign.score(ITEMS)[0].rewards == pytest.approx(scorer.score(ITEMS)[0].rewards, abs=1e-5)


def test_foreign_tokenizer_without_pad_token(copy: Path) -> None:
    for name in ("contract.json", "chat_template.jinja"):
        (copy / name).unlink()
    for name in ("tokenizer_config.json",):
        values = json.loads((copy / name).read_text())
        values.pop("pad_token")
        (copy / name).write_text(json.dumps(values))
    foreign = Scorer.load(copy, device="cpu")
    assert foreign.contract.pad_token_id != foreign.contract.end_token_id
    assert all(result.rewards is not None for result in foreign.score(ITEMS))


def tamper_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    file.write_text(json.dumps(values))


def tamper_template(path: Path) -> None:
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("'content'] +", "'content'] + ' ' +"))


def tamper_contract_template(path: Path) -> None:
    file = path / "contract.json"
    values = json.loads(file.read_text())
    values["template"] = values["template"].replace("'content'] +", "'content'] + ' ' +")
    file.write_text(json.dumps(values))


def tamper_head(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def tamper_backbone(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def tamper_config(path: Path) -> None:
    file = path / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))


def truncate_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def remove_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("tamper", "part"),
    [
        (tamper_tokenizer, "tokenizer"),
        (tamper_template, "template"),
        (tamper_contract_template, "template or tokenizer"),
        (tamper_head, "head"),
        (tamper_backbone, "weights"),
        (truncate_weights, "weights"),
        (tamper_config, "model config"),
        (remove_tokenizer, "tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_tampering_is_refused_and_named(copy: Path, tamper, part: str) -> None:  # type: ignore[no-untyped-def]
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    tamper(copy)
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} != before
    with pytest.raises(ContractMismatchError) as caught:
        Scorer.load(copy, device="cpu")
    assert caught.value.problem.startswith(f"{part}:")
    assert caught.value.remedy


def test_golden_scores_are_compared(tmp_path: Path) -> None:
    with pytest.raises(ContractMismatchError, match=r"^golden scores: conversation 0"):
        Scorer.load(make_export(tmp_path / "shifted", golden_shift=0.01), device="cpu")


def test_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    make_model(tokenizer, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="3 outputs"):
        Scorer.load(tmp_path, device="cpu")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory"):
        Scorer.load(tmp_path / "nothing")


def test_a_contract_without_golden_scores_is_unverified_and_says_what_to_ask_for(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model")
    Contract.load(directory).model_copy(update={"golden": ()}).save(directory)
    with pytest.raises(UnverifiedError, match="no golden scores") as caught:
        Scorer.load(directory, device="cpu")
    assert "--no-verify" in caught.value.remedy
    assert "verify_golden: false" in caught.value.remedy
    loaded = Scorer.load(directory, device="cpu", verify=False)
    with pytest.raises(UnverifiedError):
        loaded.verify_golden()
    with pytest.raises(UnverifiedError):
        check_model(directory)
    check_model(directory, verify=False)
    assert len(loaded.golden_scores()) > 3


def test_an_id_without_embedding_is_an_error_of_its_item(export: Path, scorer: Scorer, copy: Path) -> None:
    (copy / "contract.json").unlink()
    tokenizer = load_tokenizer(str(copy))
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(copy)
    foreign = Scorer.load(copy, device="cpu")
    good, bad = foreign.score([ITEMS[0], item("An unheard word", "y")])
    assert good.rewards == pytest.approx(scorer.score(ITEMS)[0].rewards, abs=1e-5)
    assert bad.error is not None
    assert bad.error.code == "token_out_of_range"
    assert f"embeddings for {len(tokenizer) - 1} ids" in bad.error.message
    (feature,) = foreign.features([item("x", "unheard")])
    assert getattr(feature, "code", None) == "token_out_of_range"


def test_a_foreign_model_is_not_given_more_tokens_than_it_has_positions(copy: Path) -> None:
    (copy / "contract.json").unlink()
    for file in copy.glob("*.safetensors"):
        file.unlink()
    vocabulary = len(load_tokenizer(str(copy)))
    for name, positions, limit in (("gpt2", 48, 48), ("roberta", 50, 48)):
        model = make_architecture("gpt2" if name == "gpt2" else "bert", **FOREIGN[name], vocab_size=vocabulary, pad_token_id=1)
        model.save_pretrained(copy)
        assert positions in model.config.to_dict().values()
        foreign = Scorer.load(copy, device="cpu")
        assert foreign.contract.max_tokens == limit
        fits, long = foreign.score([item("a", "b"), item("a", "word " * 60)])
        assert fits.rewards is not None
        assert long.error is not None
        assert long.error.code == "too_long"


FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 48},
    "roberta": {"model_type": "roberta", "max_position_embeddings": 50},
}
