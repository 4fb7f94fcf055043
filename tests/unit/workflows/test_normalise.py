from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers.models import make_export

from rayward.config.placement import Placement
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ContractError, DataError
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked
from rayward.workflows.normalise import default_output, normalise_pipeline

COMPLETIONS = ("Red.", "Rust, which is a kind of red.", "Red or blue.")
LINES = [json.dumps({"prompt": "Name a colour.", "completions": list(COMPLETIONS)})]
ITEM = ScoreItem(({"role": "user", "content": "Name a colour."},), COMPLETIONS)


def run(model: Path, output: Path, lines: list[str] = LINES) -> None:
    normalise_pipeline(str(model), lines, output=output, reference="three colours", placement=Placement(device="cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "model", seed=4)


def test_the_model_itself_does_not_change(model: Path, tmp_path: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()}
    run(model, tmp_path / "normalised")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()} == before
    served, revised = Scorer.load(model, device="cpu"), Scorer.load(tmp_path / "normalised", device="cpu")
    assert served.version == revised.version
    rewards = served.score([ITEM])[0].rewards
    assert rewards is not None
    found = revised.contract.normaliser
    assert found is not None
    assert (found.mean, found.std, found.num_rewards) == pytest.approx((statistics.fmean(rewards), statistics.pstdev(rewards), 3))
    centred = revised.score([replace(ITEM, asked=Asked(normalise="centred"))])[0].rewards
    assert centred == pytest.approx([reward - found.mean for reward in rewards])


def test_a_second_reference_set_is_a_second_directory(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "normalised")
    with pytest.raises(ConfigError, match="exists already"):
        run(model, tmp_path / "normalised")
    run(tmp_path / "normalised", tmp_path / "again", [json.dumps({"prompt": "Hi", "completions": ["a", "b"]})])
    found = Contract.load(tmp_path / "again").normaliser
    assert found is not None
    assert found.num_rewards == 2


def test_rewards_without_spread_and_models_without_contract_leave_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without spread"):
        run(model, tmp_path / "out", [json.dumps({"prompt": "Hi", "completions": ["a"]})])
    with pytest.raises(DataError, match="item 2"):
        run(model, tmp_path / "out", [*LINES, json.dumps({"prompt": "Hi", "completions": ["word " * 300]})])
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ContractError, match="cannot be read"):
        run(tmp_path / "foreign", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rule_still_finds_its_members_from_elsewhere(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "both"
    directory.mkdir(parents=True)
    inside, absolute = make_export(directory / "inside", seed=5), make_export(tmp_path / "absolute", seed=6)
    EnsembleRule(rule="mean", members=("inside", str(absolute))).save(directory)
    output = tmp_path / "b" / "c" / "both"
    run(directory, output)
    found = Ensemble.load(output, device="cpu")
    assert found.version == Ensemble.load(directory, device="cpu").version
    assert found.facts.normaliser is not None
    members = EnsembleRule.load(output).members
    assert ((output / members[0]).resolve(), members[1]) == (inside, str(absolute))


def test_the_directory_beside_is_the_usual_one(tmp_path: Path) -> None:
    assert default_output(str(tmp_path / "run" / "export")) == tmp_path / "run" / "export-normalised"
    assert default_output(f"{tmp_path}/export/") == tmp_path / "export-normalised"
