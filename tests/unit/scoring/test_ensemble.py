from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.helpers.models import make_export

from rayward.config.placement import Placement
from rayward.errors import ContractMismatchError, ModelLoadError
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.load import load_scored_model
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.serving.preflight import check_model
from rayward.wire.items import Asked

ITEM = ScoreItem(({"role": "user", "content": "Name a colour."},), ("Red.", "Blue, because the sky is blue.", "42"))
TOO_LONG = ScoreItem(({"role": "user", "content": "long"},), ("word " * 200,))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three exports."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        make_export(root / f"m{seed}", seed=seed)
    return root


def write_ensemble(models: Path, name: str, **content: object) -> Path:
    directory = models / name
    directory.mkdir(exist_ok=True)
    (directory / EnsembleRule.file).write_text(json.dumps({"members": ["../m0", "../m1", "../m2"], **content}))
    return directory


def test_rewards_follow_the_rule_and_outputs_show_the_members(models: Path) -> None:
    alone = [Scorer.load(models / f"m{seed}", device="cpu").score([ITEM])[0].rewards for seed in range(3)]
    members = list(zip(*alone, strict=True))
    expected = {
        "mean": [statistics.fmean(values) for values in members],
        "minimum": [min(values) for values in members],
        "lower_bound": [statistics.fmean(values) - 2.0 * statistics.pstdev(values) for values in members],
    }
    for rule, rewards in expected.items():
        ensemble = load_scored_model(write_ensemble(models, rule, rule=rule, penalty=2.0), Placement(device="cpu"))
        assert isinstance(ensemble, Ensemble)
        assert ensemble.facts.outputs == ("0_m0", "1_m1", "2_m2", "spread")
        (result,) = ensemble.score([ITEM])
        assert result.rewards == pytest.approx(rewards, abs=1e-6)
        assert result.outputs is not None
        for row, values in zip(result.outputs, members, strict=True):
            assert row == pytest.approx((*values, statistics.pstdev(values)), abs=1e-6)


@pytest.mark.parametrize(
    ("safety_probability", "chosen"),
    [(0.14, "safety"), (0.15, "helpfulness"), (0.9, "helpfulness"), (1e-9, "safety")],
)
def test_the_safety_gate_of_llama_2(safety_probability: float, chosen: str) -> None:
    rule = EnsembleRule(rule="safety_gate", members=("helpful", "safe"))
    safety = math.log(safety_probability / (1 - safety_probability))
    assert rule.combine([5.0, safety]) == (safety if chosen == "safety" else 5.0)
    assert rule.combine([5.0, -1e4]) == -1e4


def test_an_item_that_one_member_cannot_score_is_an_error(models: Path) -> None:
    ensemble = Ensemble.load(write_ensemble(models, "e", rule="mean"), device="cpu")
    good, bad, weighted, centred = ensemble.score(
        [ITEM, TOO_LONG, replace(ITEM, asked=Asked(weights="w")), replace(ITEM, asked=Asked(normalise="centred"))]
    )
    assert good.rewards is not None
    for result, code in ((bad, "too_long"), (weighted, "unknown_weights"), (centred, "no_normaliser")):
        assert result.rewards is None
        assert result.error is not None
        assert result.error.code == code


def test_the_version_names_the_rule_and_every_member(models: Path) -> None:
    versions = {
        Ensemble.load(write_ensemble(models, name, **content), device="cpu").version
        for name, content in (
            ("a", {"rule": "mean"}), ("b", {"rule": "minimum"}), ("c", {"rule": "mean", "members": ["../m0", "../m1"]}),
        )
    }  # fmt: skip
    assert len(versions) == 3
    same = Ensemble.load(write_ensemble(models, "d", rule="mean"), device="cpu").version
    assert same in versions


def test_a_changed_member_is_refused(models: Path, tmp_path: Path) -> None:
    make_export(tmp_path / "m0")
    make_export(tmp_path / "m1", seed=1)
    weights = load_file(tmp_path / "m1" / "model.safetensors")
    weights["score.weight"] += 1e-3
    save_file(weights, tmp_path / "m1" / "model.safetensors", metadata={"format": "pt"})
    directory = write_ensemble(tmp_path, "e", rule="mean", members=["../m0", "../m1"])
    with pytest.raises(ContractMismatchError, match="head"):
        Ensemble.load(directory, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rule": "median"}, "rule"),
        ({"rule": "mean", "members": ["../m0"]}, "at least 2"),
        ({"rule": "safety_gate"}, "safety_gate has 3 members"),
        ({"rule": "mean", "threshhold": 0.1}, "threshhold"),
    ],
)
def test_a_wrong_ensemble_file_says_what_is_wrong(models: Path, content: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        check_model(write_ensemble(models, "wrong", **content))


def test_a_missing_member_is_found_before_anything_starts(models: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere is not a directory"):
        check_model(write_ensemble(models, "missing", rule="mean", members=["../m0", "../nowhere"]))
