"""Promise 2: the loss of every step is the same for any number of workers and any token budget, on real ZeRO-3 over gloo.

Real here: DeepSpeed processes, gloo, Ray Data, Ray Train. Nothing is simulated.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.runs import NUM_STEPS, losses, tiny_config, write_world

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One worker, one budget, the plain torch engine."""
    return run_ranks(world, tmp_path_factory.mktemp("reference"), world_size=1, budget=512, engine="torch")


def run_ranks(world: Path, storage: Path, *, world_size: int, budget: int, engine: str = "deepspeed") -> list[float]:
    """Losses of a run without Ray, one process per rank."""
    from rayward.data.prepare.job import prepare

    config = tiny_config(world, storage, "ranks", tokens_per_microbatch=budget, engine=engine)
    prepared = prepare(config)
    path = storage / "config.json"
    path.write_text(config.model_dump_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.zero3_rank", str(path), prepared.directory, str(rank), str(world_size), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, outputs[0][1][-3000:]
    (line,) = [line for line in outputs[0][0].splitlines() if line.startswith("LOSSES ")]
    history: list[float] = json.loads(line.removeprefix("LOSSES "))
    return history


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [160, 512, 2048])
def test_losses_do_not_depend_on_ranks_or_budget(world: Path, reference: list[float], tmp_path: Path, world_size: int, budget: int) -> None:
    found = run_ranks(world, tmp_path, world_size=world_size, budget=budget)
    assert len(found) == NUM_STEPS >= 20
    assert found == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize(("world_size", "budget"), [(1, 2048), (2, 160), (3, 512)])
def test_the_full_job_has_the_same_losses(world: Path, reference: list[float], tmp_path: Path, world_size: int, budget: int) -> None:
    from rayward.data.prepare.job import prepare
    from rayward.training.trainer import train

    config = tiny_config(world, tmp_path, "job", num_workers=world_size, tokens_per_microbatch=budget)
    train(config, prepare(config))
    assert losses(tmp_path / "job") == pytest.approx(reference, rel=TOLERANCE)
