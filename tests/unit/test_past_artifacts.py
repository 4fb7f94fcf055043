"""What past versions wrote (`tests/fixtures`, by `make.py` there) is read today, under the identity that it had then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import create_model
from tests.fixtures.make import FIXTURES, IDENTIFIED, MAKERS, NUM_STEPS, continue_run, defaults_of, run_config, run_job
from tests.helpers.models import CONVERSATIONS

from rayward.config.data import DataConfig
from rayward.config.model import ModelConfig
from rayward.config.run import Config
from rayward.config.training import TrainingConfig
from rayward.contract.contract import Contract, GoldenScore
from rayward.data import prepared as prepared_module
from rayward.data.prepare import inputs
from rayward.data.prepared import Manifest, PreparedData
from rayward.errors import CheckpointVersionError, ConfigError, ContractError, DataError, ModelLoadError, RaywardError
from rayward.model.weights_identity import weights_identity
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import OBJECTIVES
from rayward.schema import identity
from rayward.scoring.combining import EnsembleRule, ImplicitRule
from rayward.scoring.load import load_scored_model
from rayward.scoring.scorer import ScoreItem
from rayward.serving.preflight import check_model
from rayward.training import session
from rayward.training.checkpoints.store import choose_checkpoint
from rayward.training.session import Trajectory, resume_point

LATER: dict[str, Any] = {"later_number": (float, 0.5), "later_names": (tuple[str, ...], ()), "later_choice": (str | None, None)}
"""Fields that a later Rayward may have, each with a default."""


def later(record: type[Any], **fields: Any) -> type[Any]:
    """The same record in a later Rayward: new fields with defaults, and those given changed."""
    return create_model(f"Later{record.__name__}", __base__=record, **LATER, **fields)


LaterGoldenScore = later(GoldenScore)
LaterContract = later(Contract, golden=(tuple[LaterGoldenScore, ...], ()))  # type: ignore[valid-type]  # made above
LaterManifest = later(Manifest)
LaterModelConfig = later(ModelConfig)
LaterDataConfig = later(DataConfig)
LaterTrajectory = later(Trajectory, model=(LaterModelConfig, ...))

VERSIONS = {
    "contract_v1": ("98157d0b524d", "d076863a97afc9c1980f998bda2fa874"),
    "prepared_v3": ("ea86a6cd0b32", "2b71839c0f4e5508aeaa827b22605a60"),
    "export_v1": ("8b9743087ebb", "2b71839c0f4e5508aeaa827b22605a60"),
    "mixture_v1": ("0f6b39ec9d96", "2b71839c0f4e5508aeaa827b22605a60"),
}
"""Model version and fingerprint of every contract kept. They never change: models, runs and prepared data are known by them."""
TRAJECTORY = "c5d14c2d5b28a0b082d4e4b3cffe1c7b"
DATA = "229b83ef420c29642421c01a9ee0f1f9"
FOREIGN_WEIGHTS = "18b55955044ba70a0c35c7158291fd1ac2a72ba892ec99247648d2eb0e4301b3"


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def test_every_kind_that_is_written_is_kept() -> None:
    assert sorted(MAKERS) == sorted(path.name for path in FIXTURES.iterdir() if path.name not in ("make.py", "__pycache__"))


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("kind", [Contract, LaterContract])
def test_a_contract_keeps_its_version_and_its_fingerprint(name: str, kind: type[Contract]) -> None:
    contract = kind.load(FIXTURES / name)
    assert (contract.model_version(), contract.fingerprint()) == VERSIONS[name]


def test_a_later_field_counts_as_soon_as_it_is_set() -> None:
    contract = LaterContract.load(FIXTURES / "contract_v1")
    golden = (contract.golden[0].model_copy(update={"later_number": 1.0}),)
    changed = [contract.model_copy(update={"later_choice": "x"}), contract.model_copy(update={"golden": golden})]
    assert len({c.model_version() for c in (contract, *changed)}) == 3
    # A rule of text that nobody has classified is taken for one: prepared data is made again rather than read by other rules.
    assert len({c.fingerprint() for c in (contract, *changed)}) == 2


def test_a_contract_with_every_field_is_read_as_it_was_written() -> None:
    text = (FIXTURES / "contract_v1" / "contract.json").read_text()
    contract = Contract.load(FIXTURES / "contract_v1")
    assert json.loads(text).items() <= json.loads(contract.model_dump_json()).items()
    assert contract.golden[0].critique == "Right."


@pytest.mark.parametrize("name", ["export_v1", "mixture_v1", "ensemble_v1", "ensemble_unversioned", "implicit_v1"])
def test_what_scores_is_loaded_verified_and_scored(name: str) -> None:
    check_model(FIXTURES / name)
    scorer = load_scored_model(FIXTURES / name)
    results = scorer.score([ScoreItem(cast(Any, prompt), (completion,)) for prompt, completion in CONVERSATIONS])
    assert all(result.rewards for result in results)
    if name in VERSIONS:
        assert scorer.version == VERSIONS[name][0]


def test_a_rule_without_a_version_is_the_same_model() -> None:
    one, other = (load_scored_model(FIXTURES / name).version for name in ("ensemble_v1", "ensemble_unversioned"))
    assert one == other == "5f933ea99787"


@pytest.mark.parametrize(("kind", "name"), [(EnsembleRule, "ensemble_v1"), (ImplicitRule, "implicit_v1")])
def test_a_rule_keeps_its_identity(kind: type[EnsembleRule], name: str) -> None:
    assert identity(kind.load(FIXTURES / name)) == identity(later(kind).load(FIXTURES / name))


def test_weights_keep_their_identity() -> None:
    assert weights_identity(FIXTURES / "implicit_v1" / "policy") == FOREIGN_WEIGHTS


def test_prepared_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(FIXTURES / "prepared_v3")
    prepared = PreparedData.load(directory)
    assert [row["id"] for table in prepared.tables("train", ["id", "strength"]) for row in table.to_pylist()] == ["r0", "r1"]
    monkeypatch.setattr(prepared_module, "Manifest", LaterManifest)
    found = PreparedData.load(directory)
    assert found.manifest.fingerprint == prepared.manifest.fingerprint
    assert identity(found.manifest) == identity(prepared.manifest)


def data_fingerprint(monkeypatch: pytest.MonkeyPatch, data: DataConfig, contract: Contract) -> str:
    # Without a tokenizer: its own hash is that of a library's text form, which is not ours to keep.
    monkeypatch.setattr(inputs, "tokenizer_fingerprint", lambda _tokenizer: "tokenizer")
    config = run_config(Path("runs")).model_copy(update={"data": data})
    return inputs._fingerprint(config, [], contract, None)  # type: ignore[arg-type]


def test_the_fingerprint_of_the_data_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ties": "keep", "attributes": ["helpfulness"], "validation_fraction": 0.1}
    contract = Contract.load(FIXTURES / "prepared_v3")
    today = data_fingerprint(monkeypatch, DataConfig.model_validate(settings), contract)
    assert today == DATA
    later_contract = LaterContract.load(FIXTURES / "prepared_v3")
    assert data_fingerprint(monkeypatch, LaterDataConfig.model_validate(settings), later_contract) == DATA
    assert data_fingerprint(monkeypatch, LaterDataConfig.model_validate({**settings, "later_number": 1}), contract) != DATA
    assert data_fingerprint(monkeypatch, DataConfig.model_validate({**settings, "ties": "quarantine"}), contract) != DATA


def test_the_keys_of_kept_critiques_stay() -> None:
    from rayward.workflows.critique import Sampling, _keyed

    later_sampling = make_dataclass("LaterSampling", [("top_p", float, 1.0)], bases=(Sampling,), frozen=True)
    row = {"id": "r", "prompt_json": "[]", "completions_json": "[]"}
    keys = {_keyed(row, ("model", identity(sampling)))["key"] for sampling in (Sampling(0.7, 1), later_sampling(0.7, 1))}
    assert keys == {"b892474b8651e9a26caafaf823ae0b2b"}


def test_a_run_is_continued_to_its_end(tmp_path: Path) -> None:
    job = run_job(copy_of("checkpoints_v1", tmp_path))
    assert identity(job.trajectory) == TRAJECTORY
    checkpoint = resume_point(job)
    assert checkpoint is not None
    assert checkpoint.commit.step == 2
    continue_run(job, checkpoint)
    assert [c.commit.step for c in job.store.committed()] == [NUM_STEPS, 2]


def test_a_run_is_continued_by_a_rayward_with_more_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run_job(copy_of("checkpoints_v1", tmp_path))
    monkeypatch.setattr(session, "Trajectory", LaterTrajectory)
    monkeypatch.setitem(OBJECTIVES, "bradley_terry", replace(OBJECTIVES["bradley_terry"], settings=later(BradleyTerryObjective)))
    values = job.config.model_dump(mode="json")
    settings = create_model("LaterConfig", __base__=Config, model=(LaterModelConfig, LaterModelConfig()))

    def job_with(**model: Any) -> session.Job:
        config = settings.model_validate({**values, "model": {**values["model"], **model}})
        return replace(job, config=config, contract=LaterContract.load(FIXTURES / "prepared_v3"))

    later_job = job_with()
    assert "later_number" in later_job.trajectory.model_dump()["objective"]
    assert identity(later_job.trajectory) == TRAJECTORY
    assert resume_point(later_job) is not None
    with pytest.raises(ConfigError, match=r"model: .*'later_number': 0\.5.* -> .*'later_number': 0\.75"):
        resume_point(job_with(later_number=0.75))


FREE = {
    "num_workers", "tokens_per_microbatch", "num_epochs", "max_steps", "gradient_checkpointing", "engine", "log_every_steps",
    "evaluate_every_steps", "max_failures", "cpus_per_worker", "gpus_per_worker", "threads_per_worker",
}  # fmt: skip
"""Settings of training that do not decide the trajectory, besides by the number of steps."""


def test_every_setting_of_training_decides_the_trajectory_or_is_free() -> None:
    assert set(TrainingConfig.model_fields) - set(Trajectory.model_fields) == FREE, "a new setting belongs into Trajectory or into FREE"
    assert set(Config.model_fields) == {"run", "data", "model", "objective", "training", "checkpoint", "tracking"}


def test_a_run_is_not_continued_when_a_default_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run_job(copy_of("checkpoints_v1", tmp_path))
    other = create_model("Other", __base__=BradleyTerryObjective, label_smoothing=(float, 0.1))
    monkeypatch.setitem(OBJECTIVES, "bradley_terry", replace(OBJECTIVES["bradley_terry"], settings=other))
    config = job.config.model_copy(update={"objective": other()})
    with pytest.raises(ConfigError, match="objective: "):
        resume_point(replace(job, config=config))


def test_settings_that_are_not_known_here_are_named(tmp_path: Path) -> None:
    job = run_job(copy_of("checkpoints_v1", tmp_path))
    file = tmp_path / "checkpoints_v1" / "run" / "checkpoints" / "step_00000002" / "commit.json"
    commit = json.loads(file.read_text())
    commit["trajectory"]["model"]["tied_heads"] = True
    file.write_text(json.dumps(commit))
    with pytest.raises(ConfigError, match="tied_heads") as caught:
        resume_point(job)
    assert "the Rayward that started it" in caught.value.remedy


READERS: tuple[tuple[str, str, type[RaywardError], Callable[[Path], object]], ...] = (
    ("contract_v1", "contract.json", ContractError, Contract.load),
    ("export_v1", "contract.json", ContractError, check_model),
    ("export_v1", "contract.json", ContractError, load_scored_model),
    ("mixture_v1", "contract.json", ContractError, load_scored_model),
    ("prepared_v3", "manifest.json", DataError, lambda path: PreparedData.load(str(path))),
    ("prepared_v3", "manifest.json", DataError, lambda path: PreparedData.find(str(path))),
    ("ensemble_v1", "ensemble.json", ModelLoadError, load_scored_model),
    ("ensemble_v1", "ensemble.json", ModelLoadError, check_model),
    ("implicit_v1", "implicit.json", ModelLoadError, load_scored_model),
    ("implicit_v1", "implicit.json", ModelLoadError, check_model),
    ("checkpoints_v1", "run/checkpoints/step_00000002/commit.json", CheckpointVersionError, lambda path: resume_point(run_job(path))),
    (
        "checkpoints_v1",
        "run/checkpoints/step_00000002/commit.json",
        CheckpointVersionError,
        lambda path: choose_checkpoint(run_job(path).store, "best"),
    ),
)


@pytest.mark.parametrize(("name", "file", "error", "read"), READERS)
@pytest.mark.parametrize("version", [99, 0])
def test_a_file_of_another_rayward_says_so(
    tmp_path: Path, name: str, file: str, error: type[RaywardError], read: Callable[[Path], object], version: int
) -> None:
    directory = copy_of(name, tmp_path)
    # Neither the fields that it lacks nor those that it has more matter: nobody here knows what they mean.
    (directory / file).write_text(json.dumps({"version": version, "unheard_of": {"a": [1]}}))
    with pytest.raises(error) as caught:
        read(directory)
    assert file in str(caught.value)
    assert ("written by a newer Rayward: it has version 99" if version else "has version 0, which is no longer read") in str(caught.value)
    assert "not a valid" not in str(caught.value)
    assert "upgrade Rayward" in caught.value.remedy if version else caught.value.remedy
    assert not caught.value.retryable


def test_a_newer_checkpoint_is_not_passed_over_for_an_older_one(tmp_path: Path) -> None:
    job = run_job(copy_of("checkpoints_v1", tmp_path))
    steps = tmp_path / "checkpoints_v1" / "run" / "checkpoints"
    shutil.copytree(steps / "step_00000002", steps / "step_00000004")
    (steps / "step_00000004" / "commit.json").write_text('{"version": 2, "step": 4}')
    with pytest.raises(CheckpointVersionError, match=r"step_00000004/commit\.json was written by a newer Rayward"):
        resume_point(job)
    (steps / "step_00000004" / "commit.json").write_text('{"version": 1, "step": 4')
    found = resume_point(job)
    assert found is not None
    assert found.commit.step == 2, "what is damaged is passed over"


def test_defaults_that_identities_leave_out_have_not_changed() -> None:
    kept = json.loads((FIXTURES / "defaults_v1.json").read_text())
    assert set(kept) == {record.__name__ for record in IDENTIFIED}
    for record in IDENTIFIED:
        changed = [name for name, value in kept[record.__name__].items() if defaults_of(record).get(name, "no such field") != value]
        assert changed == [], (
            f"{record.__name__}: what left these fields out would mean something else under the same identity; "
            "keep the default, and give the new meaning to a field of another name"
        )
