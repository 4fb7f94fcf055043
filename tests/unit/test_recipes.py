"""Every YAML file that ships parses with the schema it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import init_empty_weights

from rayward.config import ScoringConfig, load_config, parse_config
from rayward.contract import Contract
from rayward.errors import ConfigError
from rayward.mixture_config import MixtureConfig
from rayward.model.loading import build_reward_model, resolve_hf_config
from rayward.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "jobs" / "recipes").glob("*.y*ml"), *(ROOT / "jobs" / "recipes" / "published").glob("*.y*ml")])
METHODS = sorted((ROOT / "jobs" / "recipes" / "methods").glob("*.y*ml"))
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
APPLICATIONS = sorted((ROOT / "serve").glob("*.y*ml"))


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


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: path.name)
def test_a_serve_file_has_valid_arguments(path: Path) -> None:
    applications = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]
    assert applications
    for application in applications:
        assert application["import_path"] == "rayward.scoring.app:build"
        parse_config(application["args"], ScoringConfig)
