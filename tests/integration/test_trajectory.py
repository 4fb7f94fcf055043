"""Promise 2: the loss of every step is the same for any number of workers and any token budget, on real ZeRO-3 over gloo.

Real here: DeepSpeed processes, gloo, Ray Data, Ray Train. Nothing is simulated.
Each size and each budget is tested once; every pair of them is a drill.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from tests.helpers.runs import NUM_STEPS, losses, run_ranks, tiny_config, write_world

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One worker, one budget, the plain torch engine."""
    return run_ranks(world, tmp_path_factory.mktemp("reference"), world_size=1, budget=512, engine="torch")


def drill(*values: int) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.drill)


@pytest.mark.parametrize(
    ("world_size", "budget"),
    [(1, 160), (2, 2048), (3, 512), drill(1, 512), drill(1, 2048), drill(2, 160), drill(2, 512), drill(3, 160), drill(3, 2048)],
)
def test_losses_do_not_depend_on_ranks_or_budget(world: Path, reference: list[float], tmp_path: Path, world_size: int, budget: int) -> None:
    found = run_ranks(world, tmp_path, world_size=world_size, budget=budget)
    assert len(found) == NUM_STEPS >= 20
    assert found == pytest.approx(reference, rel=TOLERANCE)


def test_the_balance_of_experts_is_that_of_the_whole_step(world: Path, tmp_path: Path) -> None:
    # The first steps: which experts are chosen is a step function, and rounding decides it sooner or later.
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = run_ranks(world, tmp_path / "one", world_size=1, budget=2048, engine="torch", experts=True)[:8]
    found = run_ranks(world, tmp_path / "two", world_size=2, budget=160, experts=True)[:8]
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("world_size", "budget"), [drill(1, 2048), (2, 160), drill(3, 512)])
def test_the_full_job_has_the_same_losses(world: Path, reference: list[float], tmp_path: Path, world_size: int, budget: int) -> None:
    from rayward.data.prepare.job import prepare
    from rayward.training.trainer import train

    config = tiny_config(world, tmp_path, "job", num_workers=world_size, tokens_per_microbatch=budget)
    train(config, prepare(config))
    assert losses(tmp_path / "job") == pytest.approx(reference, rel=TOLERANCE)
