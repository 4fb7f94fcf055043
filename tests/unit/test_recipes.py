"""Every YAML file that ships parses with the schema it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rayward.config import ScoringConfig, load_config, parse_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.y*ml"))
APPLICATIONS = sorted((ROOT / "serve").glob("*.y*ml"))


def test_there_is_something_to_check() -> None:
    assert RECIPES
    assert APPLICATIONS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses_and_names_its_model(path: Path) -> None:
    config = load_config([path])
    assert config.model.path or config.model.architecture, "a recipe names its model"


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: path.name)
def test_a_serve_file_has_valid_arguments(path: Path) -> None:
    applications = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]
    assert applications
    for application in applications:
        assert application["import_path"] == "rayward.scoring.app:build"
        parse_config(application["args"], ScoringConfig)
