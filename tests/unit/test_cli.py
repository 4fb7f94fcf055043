from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayward import cli
from rayward.config.load import parse_config
from rayward.config.run import Config

ROOT = Path(__file__).resolve().parents[2]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the console script with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["rayward", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_config_prints_what_parses_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "config", "jobs/recipes/demo.yaml", "training.learning_rate=1e-3", "run.name=other") == 0
    printed = parse_config(json.loads(capsys.readouterr().out), Config)
    assert (printed.run.name, printed.training.learning_rate) == ("other", 1e-3)
    assert printed.model.architecture is not None


@pytest.mark.parametrize("command", ["config", "prepare", "train"])
def test_a_wrong_setting_exits_with_2_and_says_why(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, command, "training.lr=1e-5") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "training.lr" in error
    assert "remedy:" in error
    assert "Traceback" not in error


def test_a_wrong_setting_of_the_server_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "serve", "some/model", "max_replicas=many") == 2
    assert "max_replicas" in capsys.readouterr().err


def test_a_file_of_items_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_main(monkeypatch, "score", str(tmp_path), str(tmp_path / "items.jsonl")) == 2
    assert "items.jsonl cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evaluate", "m", "d", "--scorers", "0"), "--scorers"),
        (("critique", "m", "d", "--writers", "0"), "--writers"),
        (("evaluate", "m", "d", "--gpus-per-scorer", "-1"), "--gpus-per-scorer"),
        (("score", "m", "--device", "gpu"), "device = 'gpu'"),
        (("score", "m", "--tokens-per-batch", "3"), "tokens_per_batch = 3"),
        (("score", "m", "--normalise", "no"), "--normalise"),
        (("evaluate", "m", "d", "--n-critiques", "3"), "--temperature"),
        (("critique", "m", "d", "--temperature", "3"), "--temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_asked_and_where_it_runs_is_checked_before_anything_is_loaded(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err


def test_every_command_has_help() -> None:
    runner = CliRunner()
    listing = runner.invoke(cli.app, ["--help"])
    assert listing.exit_code == 0
    for command in ("config", "prepare", "train", "export", "evaluate", "score", "serve", "demo-data"):
        assert command in listing.output
        assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("program", "expected_code"),
    [
        (["-m", "rayward.cli", "--help"], 0),
        (["-m", "rayward.cli", "train", "training.lr=1"], 2),
        (["-m", "rayward.cli", "evaluate", "model", "rows.jsonl", "--benchmark", "nothing"], 2),
        (["jobs/train_rm.py", "--help"], 0),
        (["jobs/train_rm.py", "training.lr=1"], 2),
    ],
)
def test_help_and_wrong_settings_come_before_anything_heavy(program: list[str], expected_code: int) -> None:
    # -X importtime lists every module that is loaded, on standard error.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": "platform"}
    done = subprocess.run([sys.executable, "-X", "importtime", *program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == expected_code
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "rayward" in loaded
    assert not loaded & {"torch", "ray", "transformers", "deepspeed", "datasets", "pyarrow", "numpy"}
