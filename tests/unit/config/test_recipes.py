"""Every YAML file that ships parses with the schema it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from accelerate import init_empty_weights
from packaging.version import Version
from safetensors.torch import save_file

from rayward.config.load import load_config, parse_config
from rayward.config.mixture import MixtureConfig
from rayward.config.scoring import ScoringConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError
from rayward.model.build import build_reward_model, resolve_hf_config
from rayward.objectives.table import OBJECTIVES

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted([*(ROOT / "jobs" / "recipes").glob("*.y*ml"), *(ROOT / "jobs" / "recipes" / "published").glob("*.y*ml")])
METHODS = sorted((ROOT / "jobs" / "recipes" / "methods").glob("*.y*ml"))
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
MADE_BY_THE_DEMO = ("runs/critique_sft/export", "runs/correctness/export")
APPLICATIONS = sorted(path for path in (ROOT / "serve").glob("*.y*ml") if "applications:" in path.read_text(encoding="utf-8"))


def test_there_is_something_to_check() -> None:
    assert RECIPES
    assert APPLICATIONS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses_and_names_its_model(path: Path) -> None:
    config = load_config([path])
    assert config.model.path or config.model.architecture, "a recipe names its model"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_recipe_lies_over_the_demo_and_is_named_after_its_run(path: Path) -> None:
    config = load_config([DEMO, path])
    assert config.run.name == path.stem
    assert config.model.path or config.model.architecture


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes" / "mixture").glob("*.y*ml")), ids=lambda path: path.name)
def test_a_mixture_recipe_parses(path: Path) -> None:
    config = load_config([path], schema=MixtureConfig)
    assert config.ratings.attributes
    assert config.preferences.train


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ratings.attributes=[]", r"ratings\.attributes is empty"),
        ("verbosity_attribute=length", "verbosity_attribute is 'length'.*correctness"),
        ("gate_dept=2", "gate_dept = 2: unknown key"),
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config([ROOT / "jobs" / "recipes" / "mixture" / "demo.yaml"], [override], schema=MixtureConfig)


def test_every_method_has_a_recipe() -> None:
    assert {load_config([DEMO, path]).objective.type for path in METHODS} == set(OBJECTIVES)


def test_the_340b_recipe_has_the_published_number_of_parameters() -> None:
    # arXiv 2406.11704: 331.6 B without and 9.4 B in the embeddings; the reward model has a head instead of the output embedding.
    config = load_config([ROOT / "jobs" / "recipes" / "published" / "nemotron4_340b_regression.yaml"])
    contract = Contract(
        template="", template_source="plain", end_token="</s>", end_token_id=2, pad_token="<pad>", pad_token_id=0, max_tokens=4096
    ).for_head(config.outputs, config.objective.reward_weights(config.outputs))
    with init_empty_weights():
        model = build_reward_model(resolve_hf_config(config.model, contract, vocab_size=256_000), max_tokens=4096, dtype=torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    embedding = sizes.pop("model.embed_tokens.weight")
    head = sizes.pop("score.weight")
    assert (sum(sizes.values()), 2 * embedding, head) == (331_592_011_776, 9_437_184_000, 5 * 18432)
    assert model.layout == "packed"


LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8, "max_position_embeddings": 8192}
LLAMA3_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128_256,
}  # fmt: skip
LLAMA3_70B = LLAMA3_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA2_70B = LLAMA3_70B | {"vocab_size": 32_000, "max_position_embeddings": 4096}
LLAMA2_7B = LLAMA3_8B | {
    "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32_000, "max_position_embeddings": 4096,
}  # fmt: skip
GPT_J = {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50_400, "n_positions": 2048}
SMOLLM2 = LLAMA | {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
# model.path -> its published architecture, and its parameters without the embeddings, in millions
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "meta-llama/Meta-Llama-3-8B": (LLAMA3_8B, 6_980),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA3_8B, 6_980),
    "runs/cloud-8b-sft/export": (LLAMA3_8B, 6_980),
    "meta-llama/Meta-Llama-3-70B-Instruct": (LLAMA3_70B, 68_450),
    "runs/helpfulness/export": (LLAMA3_70B, 68_450),
    "meta-llama/Llama-2-70b-chat-hf": (LLAMA2_70B, 68_450),
    "meta-llama/Llama-2-7b-chat-hf": (LLAMA2_7B, 6_476),
    "EleutherAI/gpt-j-6b": (GPT_J, 5_638),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (SMOLLM2, 106),
    "runs/smollm2-critique-sft/export": (SMOLLM2, 106),
}
OVER_DEMO = {path: [DEMO, path] for path in METHODS} | {path: [path] for path in RECIPES}


@pytest.mark.parametrize("path", OVER_DEMO, ids=lambda path: path.stem)
def test_a_recipe_has_the_shape_of_its_model(path: Path, tmp_path: Path) -> None:
    config = load_config(OVER_DEMO[path])
    contract = Contract(
        template="", template_source="plain", end_token="</s>", end_token_id=2, pad_token="<pad>", pad_token_id=0,
        max_tokens=config.model.max_tokens,
    )  # fmt: skip
    objective, model_config, millions = config.objective, config.model, None
    contract = contract.for_head(config.outputs, objective.reward_weights(config.outputs), objective.reading(config.data.step_separator))
    if config.model.path is not None:
        demo = load_config([DEMO]).model.architecture, None
        architecture, millions = demo if config.model.path in MADE_BY_THE_DEMO else PUBLISHED[config.model.path]
        (tmp_path / "config.json").write_text(json.dumps(architecture))
        save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")  # a checkpoint without a head
        model_config = config.model.model_copy(update={"path": str(tmp_path)})
    hf_config = resolve_hf_config(model_config, contract, vocab_size=0)
    with_language = objective.language_coefficient > 0
    with init_empty_weights():
        model = build_reward_model(hf_config, max_tokens=contract.max_tokens, with_language=with_language)
    sizes = {name: parameter.numel() for name, parameter in model.model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sizes["score.weight"] == len(config.outputs) * model.model.score.in_features
    assert hasattr(model.model, "lm_head") == with_language
    own_attention = hf_config.model_type == "gptj" and Version(transformers.__version__) < Version("5.24")
    assert model.layout == ("padded" if own_attention else "packed")
    embedding = model.model.get_input_embeddings().weight.numel()
    if millions is not None:
        backbone = sum(size for name, size in sizes.items() if name not in ("score.weight", "lm_head.weight")) - embedding
        assert backbone / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: path.name)
def test_a_serve_file_has_valid_arguments(path: Path) -> None:
    applications = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]
    assert applications
    for application in applications:
        assert application["import_path"] == "rayward.serving.app:build"
        parse_config(application["args"], ScoringConfig)
