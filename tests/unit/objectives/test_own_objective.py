"""The README's worked example: an objective of one's own is one settings class, two functions and one row, in one file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.jobs import make_job, make_prepared, run_session

from rayward.batch.comparison import Labels
from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.objectives import table as objectives

README = Path(__file__).resolve().parents[3] / "README.md"


@pytest.fixture
def hinge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README's two blocks: the file of its own, and the row at the end of table.py."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (own,) = [block for block in blocks if "class HingeObjective" in block]
    (row,) = [block for block in blocks if block.startswith("OBJECTIVES[")]
    assert not re.search(r"import .*\b_", own), "a private name"
    monkeypatch.setitem(objectives.OBJECTIVES, "hinge", objectives.OBJECTIVES["bradley_terry"])
    names: dict[str, object] = {"__name__": "hinge"}
    # In a file, because the documentation of a setting is read from the source of its class.
    (tmp_path / "hinge.py").write_text(own, encoding="utf-8")
    exec(compile(own, str(tmp_path / "hinge.py"), "exec", dont_inherit=True), names)
    exec(compile(row, str(README), "exec"), {**names, "Method": objectives.Method, "OBJECTIVES": objectives.OBJECTIVES})
    assert objectives.OBJECTIVES["hinge"].settings.__name__ == "HingeObjective"


@pytest.mark.usefixtures("hinge")
def test_it_is_configured_trained_and_resumed_without_touching_another_file(tmp_path: Path) -> None:
    config = parse_config({"objective": {"type": "hinge", "target": 0.5}}, Config)
    assert Config.model_validate_json(config.model_dump_json()).objective == config.objective
    prepared = make_prepared(tmp_path / "prepared")
    job = make_job(tmp_path, prepared)
    job = replace(job, config=job.config.model_copy(update={"objective": config.objective}))
    run_session(job, prepared)
    commit = job.store.latest()
    assert commit is not None
    assert {"type": "hinge", "target": 0.5}.items() <= commit.commit.trajectory["objective"].items()
    assert 0.0 < commit.commit.metrics["loss"] < 1.0


@pytest.mark.usefixtures("hinge")
def test_its_loss_by_hand() -> None:
    objective = objectives.Objective(objectives.OBJECTIVES["hinge"].settings.model_validate({"target": 1.0}))
    labels = [Labels(ranks=torch.tensor([0.0, 1.0]).numpy())] * 3
    outputs = torch.tensor([[2.0], [0.0], [0.25], [0.0], [0.0], [3.0]])
    assert objective.loss(outputs, labels).loss_sum.item() / objective.count(labels) == pytest.approx((0.0 + 0.75 + 4.0) / 3)
