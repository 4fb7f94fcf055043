from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.jobs import make_job, make_prepared
from tests.helpers.models import make_export
from tests.unit.evaluation.table import evaluation_of, make_records

from rayward.contract.contract import Contract
from rayward.evaluation.run import SCORES_FILE
from rayward.scoring.scorer import Scorer
from rayward.workflows.train import publish_evaluated


def test_what_the_evaluation_showed_is_published_in_place_of_the_first_export(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    output, folder = make_export(tmp_path / "export"), tmp_path / "export-evaluation"
    before = Contract.load(output)
    records = make_records(40)
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "a.png").write_bytes(b"png")
    (folder / SCORES_FILE).write_text("".join(record.model_dump_json() + "\n" for record in records))
    with (output / "contract.json").open() as served:
        publish_evaluated(make_job(tmp_path, prepared).config, prepared, output, evaluation_of(records), folder)
        assert Contract.model_validate_json(served.read()) == before, "who opened the first one reads it to its end"
    after = Contract.load(output)
    assert after.normaliser is not None
    rewards = [reward for record in records for reward in record.rewards or ()]
    assert after.normaliser.num_rewards == len(rewards)
    assert after.normaliser.mean == pytest.approx(sum(rewards) / len(rewards))
    assert after.model_copy(update={"normaliser": None}) == before
    assert "Rewards of" in (output / "README.md").read_text()
    assert (output / "plots" / "a.png").is_file()
    Scorer.load(output, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "export-evaluation", "prepared"]
