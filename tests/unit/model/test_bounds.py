"""A config.json that does not belong to its weights is refused before anything of it is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.architectures import FAMILIES, make_architecture
from tests.helpers.models import make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rayward.errors import ModelLoadError
from rayward.model.bounds import refuse_absurd_counts
from rayward.model.build import load_reward_model
from rayward.model.language_model import LanguageModel
from rayward.scoring.scorer import Scorer

CPU = torch.device("cpu")


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ABSURD = [
    ("llama", {"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000, and the weights beside it have 21 tensors"),
    ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ("gpt2", {"n_layer": 1_000_000_000}, "n_layer=1000000000"),
    ("llama", {"hidden_size": 1 << 20}, "in its parameters"),
    ("llama", {"intermediate_size": 1 << 40}, "elements in its parameters"),
    ("llama", {"vocab_size": 1 << 40}, "elements in its parameters"),
    ("gpt2", {"n_positions": 1 << 40}, r"elements in its (parameters|buffers)|no model can be built"),
    ("llama", {"num_attention_heads": 0}, "no model"),
]


@pytest.mark.parametrize(("name", "changes", "says"), ABSURD, ids=[f"{name} {next(iter(changes))}" for name, changes, _ in ABSURD])
def test_absurd_numbers_are_refused_by_name(tmp_path: Path, name: str, changes: dict[str, Any], says: str) -> None:
    make_architecture(name).save_pretrained(tmp_path)
    load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64)
    assert caught.value.remedy


def test_a_model_that_is_served_without_a_contract_is_bounded_too(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model")
    (directory / "contract.json").unlink()
    edit_config(directory, num_hidden_layers=1_000_000)
    with pytest.raises(ModelLoadError, match="num_hidden_layers=1000000"):
        Scorer.load(directory, device="cpu")


def test_counts_inside_the_text_model_of_a_wrapper_are_seen(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="num_experts=5000"):
        refuse_absurd_counts(tmp_path, {"text_config": {"num_experts": 5000}}, 300)
    refuse_absurd_counts(tmp_path, {"text_config": {"num_experts": 5000}, "rope_theta": 1_000_000, "use_layers": True}, 6000)


def test_a_policy_is_bounded_and_never_read_from_a_pickle(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def load() -> LanguageModel:
        return LanguageModel.load(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64)

    load()
    for changes in ({"num_hidden_layers": 1_000_000}, {"hidden_size": 1 << 20}):
        text = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, **changes)
        with pytest.raises(ModelLoadError, match="the weights beside it have"):
            load()
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin; only safetensors are read"):
        load()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_known_family_is_out_of_bounds(family: str, tmp_path: Path) -> None:
    values = dict(FAMILIES[family])
    try:
        config = AutoConfig.for_model(values.pop("model_type", family), **values)
        model = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError) as exc:
        pytest.fail(f"{family}: {exc}")
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, device=CPU, dtype=torch.float32, max_tokens=64)
    assert sum(p.numel() for p in loaded.model.parameters()) > 0
