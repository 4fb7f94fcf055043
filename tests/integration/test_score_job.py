"""`rayward score --output` on a real local Ray: what is killed goes on, and every row has one reward, that of the scorer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.models import make_export
from tests.helpers.prepared import prepared_row, write_prepared
from tests.helpers.processes import alive, descendants, until

from rayward.config.placement import Placement
from rayward.contract.contract import Contract
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.workflows.mixture_features import features_of

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
ROWS: list[dict[str, Any]] = [
    {"id": i, "prompt": f"Question {i % 40}?", "completions": [f"Answer {i}.", "No. " * (i % 9 + 1)]} for i in range(3000)
]
TOO_LONG = {"id": "long", "prompt": "Long?", "completions": ["word " * 200]}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", "rayward.cli", *arguments]
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def commits(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in output.glob("_commits/*/0*.json")}


def test_a_killed_job_goes_on_and_scores_nothing_twice(export: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:1800], TOO_LONG]) + "{broken\n")
    pq.write_table(pa.Table.from_pylist([{**row, "source": "web"} for row in ROWS[1800:]]), source / "b.parquet", row_group_size=500)
    words = ("score", str(export), str(source), "--output", str(output), "--output-format", "jsonl", "--keep-columns", "--device", "cpu",
             "--rows-per-part", "64", "--scorers", "2")  # fmt: skip
    first = command(*words)
    until(lambda: len(commits(output)) >= 3 or first.poll() is not None, 180.0)
    assert first.poll() is None, first.communicate()
    started = descendants(first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    # The scorers of a driver that died go with it, after what they are at.
    until(lambda: not alive(started))
    before = commits(output)
    assert 3 <= len(before) < 49
    assert not (output / "_manifest.json").exists()

    second = command(*words)
    out, error = second.communicate(timeout=300)
    assert second.returncode == 1, (out, error)
    assert "3,002 = 3,000 scored + 2 with an error (" in out
    assert "too_long 1" in out
    assert "unparsable 1" in out
    assert "'source'" in out
    after = commits(output)
    assert {path: after[path] for path in before} == before, "what was committed is not scored again"

    manifest = json.loads((output / "_manifest.json").read_text())
    found_rows = [json.loads(line) for name in manifest["files"] for line in (output / name).read_text().splitlines()]
    assert [row.get("id") for row in found_rows] == [*range(1800), "long", None, *range(1800, 3000)]
    assert {row["version"] for row in found_rows} == {Contract.load(export).model_version()}
    good = [row for row in found_rows if "error" not in row]
    assert [(row["prompt"], row["completions"]) for row in good] == [(row["prompt"], row["completions"]) for row in ROWS]
    some: list[dict[str, Any]] = [*good[:100], *good[-100:]]
    items = [ScoreItem(({"role": "user", "content": row["prompt"]},), tuple(row["completions"])) for row in some]
    for row, expected in zip(some, Scorer.load(export, device="cpu").score(items), strict=True):
        assert row["rewards"] == pytest.approx(expected.rewards, abs=1e-5)


def test_statistics_of_a_reference_set_by_several_scorers_are_those_of_one(export: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in ROWS[:200]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = []
    for name, scorers in (("one", "1"), ("two", "2")):
        words = ("normalise", str(export), str(tmp_path / "pairs.jsonl"), "--format", "trl", "--device", "cpu", "--scorers", scorers,
                 "--output", str(tmp_path / name))  # fmt: skip
        done = command(*words)
        out, error = done.communicate(timeout=300)
        assert done.returncode == 0, (out, error)
        found.append(Contract.load(tmp_path / name).normaliser)
        assert not (tmp_path / f"{name}.scores").exists()
    one, two = found
    assert one is not None
    assert two is not None
    assert one.num_rewards == two.num_rewards == 400
    assert (one.mean, one.std) == pytest.approx((two.mean, two.std), abs=1e-6)


def test_features_of_two_scorers_come_in_the_order_of_the_rows(export: Path, tmp_path: Path) -> None:
    rows = [
        prepared_row(
            number,
            prompt_key=f"{number:08x}",
            prompt_json=json.dumps([{"role": "user", "content": row["prompt"]}]),
            completions_json=json.dumps(row["completions"]),
        )
        for number, row in enumerate(ROWS[:700])
    ]
    prepared = write_prepared(str(tmp_path / "prepared"), {"train": [rows[:300], rows[300:310], rows[310:]]})
    (tmp_path / "features").mkdir()
    found = features_of(str(export), prepared, tmp_path / "features", placement=Placement(device="cpu", actors=2))
    assert found.ends.shape == found.gates.shape == (1400, 32)
    assert found.pairs.tolist() == [[2 * number, 2 * number + 1] for number in range(700)]
    assert found.held_out.tolist() == [number % 5 == 0 for number in range(700) for _ in range(2)]
    items = [ScoreItem(({"role": "user", "content": row["prompt"]},), tuple(row["completions"])) for row in ROWS[:700]]
    scorer = Scorer.load(export, device="cpu")
    for number in (0, 299, 300, 309, 310, 699):
        (alone,) = scorer.features([items[number]])
        np.testing.assert_allclose(found.ends[2 * number : 2 * number + 2], alone[:, 0], atol=1e-5)  # type: ignore[index]
