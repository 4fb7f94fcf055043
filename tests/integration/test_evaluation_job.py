"""Evaluation on a real local Ray, with a real (tiny) model, from raw files and from prepared shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.models import make_export, make_model
from tests.helpers.prepared import prepared_row, write_prepared
from tests.helpers.tokenizer import make_tokenizer

from rayward.config.placement import Placement
from rayward.data.record import Comparison
from rayward.errors import ContractMismatchError
from rayward.evaluation.records import Evaluation
from rayward.evaluation.run import evaluate, read_scores
from rayward.evaluation.summary import summarise
from rayward.scoring.scorer import ScoreItem, Scorer

# Ray Data 2.60 warns about its own deprecated settings whenever it copies its context.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

CPU = Placement(device="cpu")
ROWS = [
    {"prompt": f"Question {i // 2}?", "chosen": f"Answer {'x' * (i % 7)} {i}.", "rejected": f"No {'y' * (i % 5)} {i}!"} for i in range(40)
]
TOO_LONG = {"prompt": "Long?", "chosen": "word " * 200, "rejected": "No."}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


def test_raw_files_are_scored_by_the_scorer_and_every_row_is_accounted_for(export: Path, tmp_path: Path) -> None:
    lines = [*map(json.dumps, ROWS), "{broken", json.dumps(TOO_LONG)]
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines) + "\n")
    data, output = [str(tmp_path / "*.jsonl")], str(tmp_path / "out")
    evaluation = evaluate(model=str(export), data=data, output=output, placement=CPU, bootstrap_samples=200)
    assert (evaluation.num_rows, evaluation.num_scored, evaluation.num_errors) == (42, 40, 2)
    assert evaluation.errors == {"too_long": 1, "unparsable": 1}
    assert evaluation.overall.num_prompts == 20

    records = read_scores(tmp_path / "out" / "scores.jsonl")
    scorer = Scorer.load(export, device="cpu")
    assert evaluation.model_version == scorer.version
    items = [ScoreItem(({"role": "user", "content": row["prompt"]},), (row["chosen"], row["rejected"])) for row in ROWS]
    for record, expected in zip(records, scorer.score(items), strict=False):
        assert record.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert [record.error_code for record in records[-2:]] == ["unparsable", "too_long"]

    written = Evaluation.model_validate_json((tmp_path / "out" / "metrics.json").read_text())
    assert written == evaluation
    again = summarise(records, model=evaluation.model, model_version=evaluation.model_version, data=evaluation.data, bootstrap_samples=200)
    assert again == evaluation
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 4


def write_held_out(directory: Path) -> None:
    comparisons = [
        Comparison(
            id=f"c{i}",
            source="demo",
            prompt=({"role": "user", "content": row["prompt"]},),
            completions=(row["chosen"], row["rejected"], f"{row['rejected']} again"),
            ranks=(0.0, 1.0, 2.0),
        )
        for i, row in enumerate(ROWS)
    ]
    rows = [
        prepared_row(
            number,
            id=c.id,
            source=c.source,
            prompt_key=c.prompt_key(),
            ranks=c.ranks,
            prompt_json=json.dumps(c.prompt),
            completions_json=json.dumps(c.completions),
        )
        for number, c in enumerate(comparisons)
    ]
    write_prepared(str(directory), {"validation": [rows[:25], rows[25:]]})


def test_prepared_shards_with_two_scorers_and_a_foreign_model(tmp_path: Path) -> None:
    model = tmp_path / "foreign"
    model.mkdir()
    make_model(make_tokenizer(model)).save_pretrained(model)
    write_held_out(tmp_path)
    two = Placement(device="cpu", actors=2)
    evaluation = evaluate(model=str(model), prepared=str(tmp_path), output=str(tmp_path / "out"), placement=two)
    assert (evaluation.num_rows, evaluation.num_scored, evaluation.overall.num_pairs) == (40, 40, 120)
    assert evaluation.num_rankings == 40
    assert evaluation.model_version == Scorer.load(model, device="cpu").version
    assert [record.id for record in read_scores(tmp_path / "out" / "scores.jsonl")] == [f"c{i}" for i in range(40)]


def test_a_tampered_export_is_named_by_the_worker(tmp_path: Path) -> None:
    broken = make_export(tmp_path / "broken", golden_shift=1.0)
    write_held_out(tmp_path)
    with pytest.raises(ContractMismatchError, match="golden scores"):
        evaluate(model=str(broken), prepared=str(tmp_path), output=str(tmp_path / "out"), placement=CPU)
