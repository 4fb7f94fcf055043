"""Evaluation on a real local Ray, with a real (tiny) model, from raw files and from prepared shards."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.models import make_export, make_model
from tests.helpers.tokenizer import make_tokenizer

from rayward.config.placement import Placement
from rayward.data.record import Comparison
from rayward.errors import ContractMismatchError, ScoringError
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


def write_prepared(directory: Path, *, claimed_rows: int) -> None:
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
    shards = []
    for number, part in enumerate((comparisons[:25], comparisons[25:])):
        rows = [
            {
                "row": number * 25 + index,
                "id": c.id,
                "source": c.source,
                "prompt_key": c.prompt_key(),
                "ranks": c.ranks,
                "weight": 1.0,
                "prompt_json": json.dumps(c.prompt),
                "completions_json": json.dumps(c.completions),
            }
            for index, c in enumerate(part)
        ]
        (directory / "validation").mkdir(exist_ok=True)
        file = f"validation/part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), directory / file)
        shards.append({"file": file, "num_rows": len(part)})
    shards[-1]["num_rows"] = claimed_rows - 25
    (directory / "manifest.json").write_text(json.dumps({"validation_shards": shards}))


def test_prepared_shards_with_two_scorers_and_a_foreign_model(tmp_path: Path) -> None:
    model = tmp_path / "foreign"
    model.mkdir()
    make_model(make_tokenizer(model)).save_pretrained(model)
    write_prepared(tmp_path, claimed_rows=40)
    evaluation = evaluate(
        model=str(model), prepared=str(tmp_path), output=str(tmp_path / "out"), placement=Placement(device="cpu", actors=2)
    )
    assert (evaluation.num_rows, evaluation.num_scored, evaluation.overall.num_pairs) == (40, 40, 120)
    assert evaluation.num_rankings == 40
    assert evaluation.model_version == "unverified"
    assert [record.id for record in read_scores(tmp_path / "out" / "scores.jsonl")] == [f"c{i}" for i in range(40)]


def test_a_lost_row_is_an_error(export: Path, tmp_path: Path) -> None:
    write_prepared(tmp_path, claimed_rows=41)
    with pytest.raises(ScoringError, match="41 rows were given, 40 came back"):
        evaluate(model=str(export), prepared=str(tmp_path), output=str(tmp_path / "out"), placement=CPU)


def test_a_tampered_export_is_named_by_the_worker(tmp_path: Path) -> None:
    broken = make_export(tmp_path / "broken", golden_shift=1.0)
    write_prepared(tmp_path, claimed_rows=40)
    with pytest.raises(ContractMismatchError, match="golden scores"):
        evaluate(model=str(broken), prepared=str(tmp_path), output=str(tmp_path / "out"), placement=CPU)
