"""benchmarks/baselines.py on a table whose figures are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from tests.unit.evaluation.table import pair

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("baselines")


def test_the_longer_completion_is_judged_on_the_same_pairs(baselines: ModuleType) -> None:
    records = [pair(name, rewards=(2.0, 1.0), lengths=(10, 4 if name == "a" else 40)) for name in ("a", "b", "c", "d")]
    _, _, model, longer = baselines.order_table(records).splitlines()
    assert model.startswith("| model | 4 | 0 | 1.000 [")
    assert longer.startswith("| longer one wins | 4 | 0 | 0.250 [")


def test_rewards_are_compared_with_the_ratings_behind_the_ranks(baselines: ModuleType) -> None:
    # Ratings 5 and 1, lengths 10 and 30: perfect rewards. The training file has mean 4, and says 6 - length / 10.
    records = [pair(name, rewards=(5.0, 1.0), ranks=(-5.0, -1.0), lengths=(10, 30)) for name in ("a", "b")]
    _, _, model, mean, line = baselines.rating_table(records, [(10, 5.0), (20, 4.0), (30, 3.0)]).splitlines()
    assert model == "| model | 4 | 0.000 [0.000, 0.000] | -5.000 [-5.000, -5.000] | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |"
    assert mean == "| training mean | 4 | 5.000 [5.000, 5.000] | 0.000 [0.000, 0.000] | n/a | n/a |"
    assert line.startswith("| line in the length | 4 | 2.000 [2.000, 2.000] | -3.000 [-3.000, -3.000] | 1.000 [")


def test_ranks_that_are_no_ratings_are_refused(baselines: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--rank-by"):
        baselines.rating_table([pair("a", rewards=(5.0, 1.0), ranks=(0.0, 1.0))], [(10, 5.0), (20, 4.0)])
