"""The scoring job without Ray: what a read task and an actor do, what is committed, and what the driver makes of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from tests.helpers.models import make_export, make_model
from tests.helpers.tokenizer import make_tokenizer

from rayward import storage
from rayward.config.placement import Placement
from rayward.data.sources.find import SourceFile, find_files
from rayward.errors import ConfigError, DataError, ModelLoadError, ScoringError
from rayward.scoring import batch
from rayward.scoring.combining import EnsembleRule
from rayward.scoring.job import model_identity, run_job
from rayward.scoring.moments import Moments
from rayward.scoring.part_work import Job, read_parts
from rayward.scoring.parts import COMMITS, JOB_FILE, MANIFEST_FILE, Done, name_units, publish
from rayward.scoring.rows import RowRules
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.wire.items import Asked

CPU = Placement(device="cpu")


def write_rows(path: Path, count: int, start: int = 0) -> list[dict[str, Any]]:
    rows = [
        {"id": f"r{i}", "prompt": f"Question {i % 5}?", "completions": [f"Answer {i}.", "No." * (i % 7 + 1)]}
        for i in range(start, start + count)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


class Killed(BaseException):
    """The driver dies."""


@pytest.fixture
def here(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tasks and actors are calls in this process; the list holds the rows of every part that was scored."""
    scorer, scored = Scorer.load(model, device="cpu"), []

    def reading(sources: Sequence[Any], read: Callable[[Any], Iterator[pa.Table]], *, scorers: int) -> Iterator[pa.Table]:
        return (table for source in sources for table in read(source))

    def pool(blocks: Iterator[pa.Table], work: Any, **_: Any) -> Iterator[pa.Table]:
        for block in blocks:
            if block["raws"][0].as_py() is not None:
                scored.append(len(block["raws"][0]))
            yield work(scorer, block)

    monkeypatch.setattr(batch, "reading", reading)
    monkeypatch.setattr(batch, "pool", pool)
    return scored


def files_of(*locations: Path) -> list[SourceFile]:
    return find_files([str(location) for location in locations], "validation")[0]


def job(output: Path, **options: Any) -> Job:
    return Job.of(str(output), RowRules(), **{"rows_per_part": 4, **options})


def run(model: Path, files: list[SourceFile], to: Job, **options: Any) -> Done:
    return run_job(str(model), files, to, placement=CPU, **options)


def lines_of(done: Done, place: str) -> list[dict[str, Any]]:
    return [json.loads(line) for name in done.files for line in (Path(place) / name).read_text().splitlines()]


def test_every_row_comes_out_in_order_with_the_reward_of_the_scorer(model: Path, here: list[int], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in" / "a.jsonl", 10) + write_rows(tmp_path / "in" / "b.jsonl", 3, start=10)
    with (tmp_path / "in" / "b.jsonl").open("a") as stream:
        stream.write('\n{"prompt": "a", "completions": ["b"]}, {"prompt": "c", "completions": ["d"]}\n')
    to = job(tmp_path / "out", output_format="jsonl")
    done = run(model, files_of(tmp_path / "in"), to)
    assert here == [4, 4, 2, 4]
    found = lines_of(done, to.place)
    assert [row.get("id") for row in found] == [*(row["id"] for row in rows), None]
    assert [(Path(row["file"]).name, row["row"]) for row in found[9:]] == [("a.jsonl", 10), *(("b.jsonl", n) for n in (1, 2, 3, 5))]
    scorer = Scorer.load(model, device="cpu")
    for row, given in zip(found, rows, strict=False):
        (alone,) = scorer.score([ScoreItem(({"role": "user", "content": given["prompt"]},), tuple(given["completions"]))])
        assert row["rewards"] == pytest.approx(alone.rewards, abs=1e-5)
    assert (done.rows, done.errors) == (14, {"unparsable": 1})
    assert "b.jsonl row 5" in done.examples["unparsable"]
    rewards = [reward for row in found for reward in row.get("rewards", ())]
    expected = Moments.of(rewards)
    assert (done.rewards.count, done.rewards.mean, done.rewards.deviation) == pytest.approx((26, expected.mean, expected.deviation))
    # A directory of results is a data set: what is not results is hidden by the custom of such directories.
    assert [Path(file.uri).name for file in files_of(tmp_path / "out")] == sorted(done.files)


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
@pytest.mark.parametrize("dies_after", [0, 1, 2, 3, 4])
def test_what_dies_goes_on_and_nothing_is_scored_twice_or_lost(
    model: Path, here: list[int], tmp_path: Path, dies_after: int, output_format: Any
) -> None:
    rows = write_rows(tmp_path / "in" / "a.jsonl", 9) + write_rows(tmp_path / "in" / "b.jsonl", 7, start=9)
    to, files = job(tmp_path / "out", output_format=output_format), files_of(tmp_path / "in")

    def kill(progress: Any) -> None:
        if len(here) > dies_after:
            raise Killed

    with pytest.raises(Killed):
        run(model, files, to, notify=kill)
    # What an interrupted write leaves behind.
    (tmp_path / "out" / ".half.tmp").write_text("{")
    done = run(model, files, to)
    assert sorted(here) == [1, 3, 4, 4, 4]
    assert run(model, files, to) == done
    assert len(here) == 5
    table = pq.read_table([f"{to.place}/{name}" for name in done.files]) if output_format == "parquet" else None
    names = table["id"].to_pylist() if table is not None else [row["id"] for row in lines_of(done, to.place)]
    assert names == [row["id"] for row in rows]
    assert (done.rows, done.rewards.count) == (16, 32)


def test_a_part_without_its_record_is_scored_again(model: Path, here: list[int], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 8)
    to, files = job(tmp_path / "out", output_format="jsonl"), files_of(tmp_path / "a.jsonl")
    done = run(model, files, to)
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    (unit,) = (tmp_path / "out" / COMMITS).iterdir()
    (unit / "00001.json").unlink()
    (tmp_path / "out" / done.files[1]).write_text("half")
    again = run(model, files, to)
    assert here == [4, 4, 4]
    assert (again.rows, [row["id"] for row in lines_of(again, to.place)]) == (8, [f"r{i}" for i in range(8)])


def test_a_part_that_is_gone_is_scored_again(model: Path, here: list[int], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 8)
    to, files = job(tmp_path / "out", output_format="jsonl"), files_of(tmp_path / "a.jsonl")
    done = run(model, files, to)
    (tmp_path / "out" / done.files[0]).unlink()
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    assert [row["id"] for row in lines_of(run(model, files, to), to.place)] == [f"r{i}" for i in range(8)]
    assert here == [4, 4, 4]


def test_parts_that_lie_on_another_node_are_no_result(
    model: Path, here: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(location: str, data: bytes) -> None:
        publish(location.replace("/out/", "/other-node/"), data)

    monkeypatch.setattr("rayward.scoring.part_work.publish", elsewhere)
    write_rows(tmp_path / "a.jsonl", 8)
    with pytest.raises(DataError, match="lacks 2 files") as caught:
        run(model, files_of(tmp_path / "a.jsonl"), job(tmp_path / "out"))
    assert "share" in caught.value.remedy
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_inputs_that_came_or_changed_are_scored_and_the_rest_is_not(model: Path, here: list[int], tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", 4)
    write_rows(tmp_path / "in" / "b.jsonl", 3)
    to = job(tmp_path / "out", output_format="jsonl")
    run(model, files_of(tmp_path / "in"), to)
    write_rows(tmp_path / "in" / "b.jsonl", 2, start=50)
    write_rows(tmp_path / "in" / "c.jsonl", 1, start=60)
    done = run(model, files_of(tmp_path / "in"), to)
    assert here == [4, 3, 2, 1]
    assert [row["id"] for row in lines_of(done, to.place)] == ["r0", "r1", "r2", "r3", "r50", "r51", "r60"]
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 3, "the rows that are no longer there have no results"


def test_another_job_does_not_write_into_the_same_place(model: Path, here: list[int], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    files = files_of(tmp_path / "a.jsonl")
    run(model, files, job(tmp_path / "out"))
    other = make_export(tmp_path / "other", seed=9)
    for changed, of, says in (
        (job(tmp_path / "out"), other, "model"),
        (job(tmp_path / "out", output_format="jsonl"), model, "output_format"),
        (job(tmp_path / "out", rows_per_part=5), model, "rows_per_part"),
        (Job.of(str(tmp_path / "out"), RowRules(keep=True), rows_per_part=4), model, "keep_columns"),
        (Job.of(str(tmp_path / "out"), RowRules(Asked(temperature=0.5)), rows_per_part=4), model, "options"),
    ):
        with pytest.raises(ConfigError, match=f"differs in {says}"):
            run(of, files, changed)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match="holds no scoring job"):
        run(model, files, job(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"
    assert here == [4, 1]


def test_a_model_that_was_replaced_meanwhile_is_found(
    model: Path, here: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    files, to = files_of(tmp_path / "a.jsonl"), job(tmp_path / "out", output_format="jsonl")

    def kill(progress: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(model, files, to, notify=kill)
    ((record,),) = [list(unit.glob("0*.json")) for unit in (tmp_path / "out" / COMMITS).iterdir()]
    record.write_text(record.read_text().replace(Scorer.load(model, device="cpu").version, "another"))
    with pytest.raises(ScoringError, match="holds scores of version another"):
        run(model, files, to)


def test_one_file_is_there_whole_or_not_at_all(model: Path, here: list[int], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in" / "a.jsonl", 9)
    files = files_of(tmp_path / "in")
    for suffix in ("jsonl", "parquet"):
        here.clear()
        output = tmp_path / "out" / f"scores.{suffix}"
        to = job(output)

        def kill(progress: Any) -> None:
            raise Killed

        with pytest.raises(Killed):
            run(model, files, to, notify=kill)
        assert not output.exists()
        done = run(model, files, to)
        assert here == [4, 4, 1]
        found = pq.read_table(output).to_pylist() if suffix == "parquet" else [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        assert (run(model, files, to), here) == (done, [4, 4, 1])
        output.unlink()
        assert run(model, files, to).rows == 9
        assert here == [4, 4, 1] * 2
        assert output.exists()
        write_rows(tmp_path / "in" / "b.jsonl", 1)
        with pytest.raises(ConfigError, match="other inputs"):
            run(model, files_of(tmp_path / "in"), to)
        (tmp_path / "in" / "b.jsonl").unlink()
    (tmp_path / "thesis.jsonl").write_text("three years")
    with pytest.raises(ConfigError, match="not by this job"):
        run(model, files, job(tmp_path / "thesis.jsonl"))


def test_a_damaged_file_is_said_when_the_rest_is_scored(model: Path, here: list[int], tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "b.jsonl", 4)
    whole = gzip.compress("".join(json.dumps({"prompt": f"{i}", "completions": ["a" * i]}) + "\n" for i in range(50)).encode())
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(whole[:-20])
    to = job(tmp_path / "out", output_format="jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged"):
        run(model, files_of(tmp_path / "in"), to)
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(whole)
    before = len(here)
    done = run(model, files_of(tmp_path / "in"), to)
    assert done.rows == 54
    assert sum(here[before:]) == 50, "the file that was whole is not scored again"


def test_no_rows_are_no_scores(model: Path, here: list[int], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        run(model, files_of(tmp_path / "a.jsonl"), job(tmp_path / "out"))
    assert (tmp_path / "out" / JOB_FILE).exists()


def test_parts_are_cut_by_rows_and_by_bytes_whatever_is_done_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayward.scoring import part_work as module

    write_rows(tmp_path / "a.jsonl", 10)
    ((_, unit),) = name_units(files_of(tmp_path / "a.jsonl")).items()

    def numbers(done: set[int]) -> list[tuple[int, list[int]]]:
        *parts, end = (table.to_pylist()[0] for table in read_parts(("u", unit, frozenset(done)), rows_per_part=4))
        assert (end["parts"], end["rows"]) == (3 if module.PART_BYTES > 1000 else 5, 10)
        return [(part["part"], part["numbers"]) for part in parts]

    assert numbers(set()) == [(0, [1, 2, 3, 4]), (1, [5, 6, 7, 8]), (2, [9, 10])]
    assert numbers({0, 2}) == [(1, [5, 6, 7, 8])]
    monkeypatch.setattr(module, "PART_BYTES", 100)
    assert numbers({1}) == [(0, [1, 2]), (2, [5, 6]), (3, [7, 8]), (4, [9, 10])]


def test_the_output_says_what_is_written(tmp_path: Path) -> None:
    rules = RowRules()
    assert Job.of(str(tmp_path / "d"), rules).output_format == "parquet"
    found = Job.of(str(tmp_path / "s.jsonl"), rules)
    assert (found.place, found.target, found.output_format) == (str(tmp_path / ".s.jsonl.parts"), str(tmp_path / "s.jsonl"), "jsonl")
    assert Job.of("s3://b/s.parquet?region=x", rules).place == "s3://b/.s.parquet.parts?region=x"
    with pytest.raises(ConfigError, match="output-format"):
        Job.of(str(tmp_path / "s.jsonl"), rules, output_format="parquet")


def test_a_model_is_told_from_any_other_one_without_loading_it(model: Path, tmp_path: Path) -> None:
    again = make_export(tmp_path / "again")
    assert model_identity(model) == model_identity(again)
    assert model_identity(model) != model_identity(make_export(tmp_path / "other", seed=1))
    EnsembleRule(rule="mean", members=(str(model), str(again))).save(tmp_path)
    both = model_identity(tmp_path)
    EnsembleRule(rule="mean", members=(str(model), str(tmp_path / "other"))).save(tmp_path)
    assert model_identity(tmp_path) != both
    for seed in (1, 2):
        make_model(make_tokenizer(tmp_path / f"foreign{seed}"), seed=seed).save_pretrained(tmp_path / f"foreign{seed}")
    assert model_identity(tmp_path / "foreign1") != model_identity(tmp_path / "foreign2")
    with pytest.raises(ModelLoadError):
        model_identity(tmp_path / "absent")


def test_results_may_lie_wherever_a_filesystem_is_known(model: Path, here: list[int], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", 9)
    files = files_of(tmp_path / "a.jsonl")
    for output in ("memory://scores/dir", "memory://scores/one.jsonl"):
        here.clear()
        to = Job.of(output, RowRules(), output_format="jsonl", rows_per_part=4)

        def kill(progress: Any) -> None:
            raise Killed

        with pytest.raises(Killed):
            run(model, files, to, notify=kill)
        done = run(model, files, to)
        assert (here, run(model, files, to)) == ([4, 4, 1], done)
        filesystem, path = storage.resolve(to.target or to.place)
        names = [path] if to.target else [f"{path}/{name}" for name in done.files]
        found = [json.loads(line) for name in names for line in storage.read_text(filesystem, name).splitlines()]
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        _, place = storage.resolve(to.place)
        left = [
            info.base_name for info in filesystem.get_file_info(pafs.FileSelector(place, recursive=True)) if info.base_name.startswith(".")
        ]
        assert left == []
