"""The parts around the scoring job; the job itself is in tests/integration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.prepared import make_manifest, prepared_row, write_prepared
from tests.unit.evaluation.table import evaluation_of, make_records, pair

from rayward.config.data import DataConfig
from rayward.errors import ConfigError, DataError, DataFormatError, ModelLoadError, ScoringError
from rayward.evaluation.held_out import HeldOut, read_prepared, read_raw
from rayward.evaluation.run import collect, evaluate, merge, read_scores, to_record, write_scores


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(locations: Sequence[str], tmp_path: Path, **config: Any) -> HeldOut:
    return read_raw(locations, DataConfig(**config), download_to=str(tmp_path / "downloads"))


def rows_of(held_out: HeldOut) -> list[dict[str, Any]]:
    return [row for table in held_out.tables for row in table.to_pylist()]


def test_raw_rows_become_blocks_and_bad_rows_become_records_with_their_reason(tmp_path: Path) -> None:
    good = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five, surely."}
    path = write_lines(
        tmp_path / "pairs.jsonl",
        [good, "{not json", {**good, "rejected": ""}, {**good, "rejected": "Four."}, {**good, "rejected": "Six."}, "[1, 2]"],
    )
    held_out = read([path], tmp_path)
    assert held_out.num_rows == 6
    assert [row["row"] for row in rows_of(held_out)] == [0, 4]
    assert {position: record.error_code for position, record in held_out.rejected.items()} == {
        1: "unparsable",
        2: "empty_completion",
        3: "identical_completions",
        5: "unparsable",
    }
    assert held_out.rejected[2].id == "pairs:3"
    first = rows_of(held_out)[0]
    assert json.loads(first["prompt_json"]) == [{"role": "user", "content": "Two and two?"}]
    assert json.loads(first["completions_json"]) == ["Four.", "Five, surely."]
    assert first["ranks"][0] < first["ranks"][1]


def test_positions_run_over_all_files(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completions": ["a", "b", "c"], "ranks": [2, 0, 1]}
    paths = [write_lines(tmp_path / f"set-{name}.jsonl", [{**row, "prompt": f"Q{name}{i}"} for i in range(2)]) for name in "ab"]
    rows = rows_of(read(paths, tmp_path))
    assert [(row["row"], row["source"]) for row in rows] == [(0, "set-a"), (1, "set-a"), (2, "set-b"), (3, "set-b")]
    assert rows[0]["ranks"] == [2, 0, 1]


def test_a_file_without_any_readable_row_is_all_errors_and_an_undecidable_one_is_refused(tmp_path: Path) -> None:
    held_out = read([write_lines(tmp_path / "broken.jsonl", ["{", "nope"])], tmp_path)
    assert (held_out.tables, len(held_out.rejected), held_out.num_rows) == ((), 2, 2)
    with pytest.raises(DataFormatError, match="fits no known format"):
        read([write_lines(tmp_path / "odd.jsonl", [{"a": 1}])], tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read([str(tmp_path / "absent.jsonl")], tmp_path)
    with pytest.raises(DataError, match="no rows"):
        read([write_lines(tmp_path / "empty.jsonl", [])], tmp_path)


def test_prepared_directory_gives_its_validation_rows_in_blocks(tmp_path: Path) -> None:
    write_prepared(str(tmp_path), {"validation": [[prepared_row(number) for number in range(600)]]})
    held_out = read_prepared(str(tmp_path))
    assert [table.num_rows for table in held_out.tables] == [256, 256, 88]
    assert [r["row"] for r in rows_of(held_out)] == list(range(600))
    assert held_out.num_rows == 600
    (tmp_path / "validation/part-00000.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"part-00000\.parquet cannot be read"):
        read_prepared(str(tmp_path))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "holds no manifest"),
        ("{", "not a valid manifest"),
        ("{}", "version 1, which is no longer read"),
        (make_manifest().model_dump_json(), "no validation rows"),
    ],
)
def test_prepared_directory_without_validation_rows_is_refused(tmp_path: Path, manifest: str | None, says: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=says):
        read_prepared(str(tmp_path))


def test_merge_restores_the_order_and_notices_a_lost_row() -> None:
    held_out = HeldOut(tables=(), rejected={1: pair("b", rewards=(0.0, 0.0))}, num_rows=3)
    scored = {2: pair("c", rewards=(1.0, 0.0)), 0: pair("a", rewards=(1.0, 0.0))}
    assert [record.id for record in merge(held_out, scored)] == ["a", "b", "c"]
    del scored[2]
    with pytest.raises(ScoringError, match="3 rows were given, 1 came back from scoring and 1 were rejected"):
        merge(held_out, scored)


def test_scored_row_to_record() -> None:
    row: dict[str, Any] = {"id": "x", "source": "s", "prompt_key": "k", "ranks": [0.0, 1.0], "completions_json": '["äb", "c"]'}
    row |= {"rewards": [0.5, 0.25], "error": None}
    record = to_record(row)
    assert (record.lengths, record.rewards, record.error_code) == ((2, 1), (0.5, 0.25), None)
    failed = to_record({**row, "rewards": None, "error": {"code": "too_long", "message": "the completion takes 9: too many"}})
    assert (failed.rewards, failed.error_code, failed.error) == (None, "too_long", "the completion takes 9: too many")


def test_an_evaluation_is_of_one_version_of_the_model() -> None:
    def block(*rows: tuple[int, str]) -> pa.Table:
        scored = {"rewards": [0.5, 0.25], "error": None}
        return pa.Table.from_pylist([{**prepared_row(number), **scored, "version": version} for number, version in rows])

    records, version = collect([block((1, "a")), block((0, "a"), (2, "a"))])
    assert (sorted(records), version) == ([0, 1, 2], "a")
    with pytest.raises(ScoringError, match="scored by the versions a, b of the model"):
        collect([block((0, "a")), block((1, "b"))])
    with pytest.raises(ScoringError, match="row 1 was scored twice"):
        collect([block((1, "a")), block((1, "a"))])


def test_scores_file_holds_what_every_table_is_computed_from(tmp_path: Path) -> None:
    records = make_records(100)
    write_scores(records, tmp_path / "scores.jsonl")
    again = read_scores(tmp_path / "scores.jsonl")
    assert again == records
    assert evaluation_of(again) == evaluation_of(records)


def test_damaged_scores_file_names_the_line(tmp_path: Path) -> None:
    write_scores(make_records(2), tmp_path / "scores.jsonl")
    with (tmp_path / "scores.jsonl").open("a") as stream:
        stream.write('{"id": 3}\n')
    with pytest.raises(DataError, match="line 3"):
        read_scores(tmp_path / "scores.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "absent.jsonl")


def test_contradicting_arguments_are_refused_before_anything_heavy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        evaluate(model="m", output=str(tmp_path))
    with pytest.raises(ConfigError, match="exactly one"):
        evaluate(model="m", output=str(tmp_path), data=["a"], prepared="b")
    with pytest.raises(ConfigError, match="is a URI"):
        evaluate(model="m", output="s3://bucket/x", prepared="b")
    with pytest.raises(ModelLoadError, match="not a directory"):
        evaluate(model=str(tmp_path / "absent"), output=str(tmp_path), prepared="b")


def test_rated_rows_are_ranked_by_the_rating_that_is_named(tmp_path: Path) -> None:
    answers = [{"response": text, "overall_score": score} for text, score in (("4", 8.5), ("5", 3.0))]
    path = write_lines(tmp_path / "rated.jsonl", [{"instruction": "2+2?", "completions": answers}])
    assert rows_of(read([path], tmp_path, attributes=("overall_score",), rank_by="overall_score"))[0]["ranks"] == [-8.5, -3.0]
    # Without the name there is nothing to rank by, and the row says so.
    assert [record.error_code for record in read([path], tmp_path).rejected.values()] == ["missing_field"]
