"""Promise 5: whatever dies, the run ends with the weights of the undisturbed run, bit for bit.

Real here: SIGKILL of a training worker and of a whole driver with its Ray, damaged files on disk. Nothing is simulated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from tests.helpers.processes import alive, descendants, kill, named, until
from tests.helpers.runs import NUM_STEPS, final_weights, losses, tiny_config, write_world

from rayward.config.load import dump_config
from rayward.errors import NonFiniteError, RaywardError

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 5  # a run on a fast machine may be over before it is killed; then it is tried again


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing happened to."""
    storage = tmp_path_factory.mktemp("undisturbed")
    run_here(world, storage)
    return storage / "run"


def run_here(world: Path, storage: Path, **training: object) -> None:
    from rayward.data.prepare.job import prepare
    from rayward.training.trainer import train

    config = tiny_config(world, storage, "run", **{"num_workers": 2, **training})
    train(config, prepare(config))


def committed(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*/commit.json"))


def training_workers() -> list[psutil.Process]:
    """Of the Ray that this process started."""
    return named("RayTrainWorker", psutil.Process().children(recursive=True))


def run_with_a_killer(world: Path, run: Path) -> None:
    """Train; once a checkpoint is committed a worker dies, unless the run is over by then."""
    over = threading.Event()

    def kill_one() -> None:
        until(lambda: committed(run) or over.is_set(), 300.0)
        kill(training_workers()[-1:])

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        run_here(world, run.parent, max_failures=1)
    finally:
        over.set()
        killer.join()


def test_a_killed_worker_costs_nothing(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    for attempt in range(ATTEMPTS):
        run = tmp_path / str(attempt) / "run"
        run_with_a_killer(world, run)
        notes = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"note"' in line]
        if notes:
            break
    assert [note["message"].split(" with ")[0] for note in notes] == [f"continuing at step {notes[0]['step']}"]
    assert notes[0]["step"] >= 6
    assert losses(run) == losses(undisturbed)
    assert final_weights(run) == final_weights(undisturbed)


def write_command(world: Path, directory: Path) -> list[str]:
    """The command line of a job in its own directory."""
    directory.mkdir()
    config = directory / "config.yaml"
    config.write_text(dump_config(tiny_config(world, directory, "run", num_workers=2)))
    return [sys.executable, str(ROOT / "jobs" / "train_rm.py"), str(config), "--no-evaluation"]


def kill_the_driver(command: Sequence[str], run: Path, environment: Mapping[str, str]) -> None:
    """Start the job and kill its driver once a checkpoint is committed; its Ray is gone afterwards."""
    with (run.parent / "first.log").open("w") as log:
        driver = subprocess.Popen(command, cwd=run.parent, env=environment, stdout=log, stderr=log)
    until(lambda: committed(run) or driver.poll() is not None, 300.0)
    assert driver.poll() in (None, 0), (run.parent / "first.log").read_text()[-3000:]
    children = descendants(driver)
    driver.kill()
    driver.wait()
    until(lambda: not alive(children))


def test_a_killed_driver_continues_with_the_same_command(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    for attempt in range(ATTEMPTS):
        directory = tmp_path / str(attempt)
        run, command = directory / "run", write_command(world, directory)
        kill_the_driver(command, run, environment)
        if not (run / "checkpoints" / f"step_{NUM_STEPS:08d}").exists():
            break
    assert not (run / "checkpoints" / f"step_{NUM_STEPS:08d}").exists()

    second = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-3000:]
    assert "continues at step" in second.stdout + second.stderr
    assert losses(run) == losses(undisturbed)
    assert final_weights(run) == final_weights(undisturbed)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    # Three checkpoints of the undisturbed run; the last is cut short, the one before has one flipped byte of the same length.
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    directories = [path.parent for path in committed(run)]
    assert [int(d.name.removeprefix("step_")) for d in directories] == [12, 18, 24]
    last = directories[2] / "rank_00001.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    middle = directories[1] / "rank_00000.safetensors"
    data = bytearray(middle.read_bytes())
    data[len(data) // 2] ^= 1
    middle.write_bytes(bytes(data))

    run_here(world, tmp_path, max_failures=1)
    assert (run / "checkpoints" / "step_00000018" / "commit.json").exists()
    assert losses(run) == losses(undisturbed)
    assert final_weights(run) == final_weights(undisturbed)


def test_another_number_of_workers_continues_the_same_trajectory(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in committed(run)[1:]:
        shutil.rmtree(path.parent)
    run_here(world, tmp_path, num_workers=1)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.mark.drill
def test_a_run_continues_after_its_first_epoch(world: Path, tmp_path: Path) -> None:
    import shutil

    settings = {"num_workers": 1, "num_epochs": 2, "comparisons_per_step": 16}
    run_here(world, tmp_path / "whole", **settings)
    whole = tmp_path / "whole" / "run"
    assert [int(path.parent.name.removeprefix("step_")) for path in committed(whole)] == [12, 18, 24]
    for step in (12, 18):  # the end of the first epoch, and the middle of the second
        shutil.copytree(whole, tmp_path / str(step) / "run")
        for path in committed(tmp_path / str(step) / "run"):
            if path.parent.name > f"step_{step:08d}":
                shutil.rmtree(path.parent)
        run_here(world, tmp_path / str(step), max_failures=0, **settings)
        assert losses(tmp_path / str(step) / "run") == losses(whole)
        assert final_weights(tmp_path / str(step) / "run") == final_weights(whole)


def test_other_settings_do_not_continue_a_run(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    from rayward.errors import ConfigError

    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(ConfigError, match="learning_rate"):
        run_here(world, tmp_path, learning_rate=2e-3)


def test_a_diverging_run_stops_everywhere_and_names_the_rows(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="step") as caught:
        run_here(world, tmp_path, learning_rate=1e30, warmup_fraction=0.0, clip_norm=1e30)
    ids = {json.loads(line)["id"] for line in (world / "train.jsonl").read_text().splitlines()}
    assert set(caught.value.comparison_ids) <= ids
    assert caught.value.comparison_ids
    assert vars(RaywardError.from_json((run / "failure.json").read_text())) == vars(caught.value)
    assert not training_workers()
