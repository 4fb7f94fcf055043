"""Which files a location stands for, and what is said of those that are not read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import datasets
import pytest

from rayward.data.sources.find import find_files, report_passed_over, without
from rayward.data.sources.globs import expand_braces
from rayward.data.sources.kinds import Role, kind_of, source_name, split_of
from rayward.data.sources.read import read_file
from rayward.errors import DataError


def _make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n")


def _found(root: Path, role: Role, *locations: str) -> tuple[list[str], dict[str, str]]:
    files, passed_over = find_files([str(root / location) for location in locations], role)
    return [str(Path(f.uri).relative_to(root)) for f in files], {str(Path(p.uri).relative_to(root)): p.reason for p in passed_over}


HUB = ["data__train-00000-of-00001.jsonl", "data__test-00000-of-00001.jsonl", "README.md"]


def test_a_file_whose_name_says_test_is_not_trained_on_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _make(tmp_path, *HUB)
    files, passed_over = _found(tmp_path, "train", ".")
    assert files == [HUB[0]]
    assert set(passed_over) == {HUB[1], "README.md"}
    assert "says test" in passed_over[HUB[1]]
    assert "suffix" in passed_over["README.md"]
    with caplog.at_level(logging.WARNING):
        report_passed_over(find_files([str(tmp_path)], "train").passed_over)
    assert HUB[1] in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "test.parquet",
        "test/part-0.jsonl",
        "a/Validation/x.jsonl.gz",
        "pairs_valid.csv",
        "val-00001.arrow",
        "eval/deep/x.jsonl",
        "pairs.dev.jsonl",
        "held_out.jsonl",
        "heldout/x.jsonl",
        "test_prefs-00000-of-00001.parquet",
        "dev2.jsonl",
        "train_test.jsonl",
        "evaluation.tsv",
        "testset.jsonl",
    ],
)
def test_names_of_held_out_data(tmp_path: Path, name: str) -> None:
    _make(tmp_path, "train.jsonl", name)
    assert _found(tmp_path, "train", ".")[0] == ["train.jsonl"]
    assert _found(tmp_path, "train", ".", name)[0] == sorted(["train.jsonl", name])
    assert list(_found(tmp_path, "train", ".")[1]) == [name]
    assert _found(tmp_path, "validation", ".")[0] == [name]
    assert _found(tmp_path, "train", name) == ([name], {})


@pytest.mark.parametrize(
    "name", ["latest.jsonl", "contest/x.jsonl", "validity.jsonl", "device.jsonl", "eval/train-0001.jsonl", "greatest-hits.csv"]
)
def test_names_that_say_nothing_of_the_kind(tmp_path: Path, name: str) -> None:
    _make(tmp_path, name)
    assert _found(tmp_path, "train", ".") == ([name], {})


def test_the_folders_above_what_was_named_say_nothing(tmp_path: Path) -> None:
    _make(tmp_path, "test/a.jsonl", "test/b/c.jsonl")
    assert _found(tmp_path, "train", "test")[0] == ["test/a.jsonl", "test/b/c.jsonl"]
    assert _found(tmp_path, "train", "test/*.jsonl")[0] == ["test/a.jsonl"]
    with pytest.raises(DataError, match=r"test/a\.jsonl: its name says test"):
        find_files([str(tmp_path)], "train")


def test_a_pattern_that_says_test_names_test_files(tmp_path: Path) -> None:
    _make(tmp_path, *HUB, "x/test/a.jsonl", "x/validation/a.jsonl")
    assert _found(tmp_path, "train", "*.jsonl")[0] == [HUB[0]]
    assert _found(tmp_path, "train", "*test*.jsonl")[0] == [HUB[1]]
    assert _found(tmp_path, "train", "data__{train,test}-*")[0] == sorted(HUB[:2])
    assert _found(tmp_path, "train", "*/{test,validation}/*")[0] == ["x/test/a.jsonl", "x/validation/a.jsonl"]
    assert _found(tmp_path, "train", "*/test/*", "**")[0] == [HUB[0], "x/test/a.jsonl"]


def test_train_files_are_held_out_only_where_nothing_else_is(tmp_path: Path) -> None:
    _make(tmp_path, "train.jsonl", "more.jsonl")
    assert _found(tmp_path, "validation", ".")[0] == ["more.jsonl", "train.jsonl"]
    _make(tmp_path, "test.jsonl")
    files, passed_over = _found(tmp_path, "validation", ".")
    assert (files, list(passed_over)) == (["more.jsonl", "test.jsonl"], ["train.jsonl"])
    train, others = find_files([str(tmp_path / "train.jsonl")], "train").files, find_files([str(tmp_path)], "validation").passed_over
    assert without(others, train) == []


def test_a_caller_may_take_every_split(tmp_path: Path) -> None:
    _make(tmp_path, *HUB)
    files, passed_over = find_files([str(tmp_path)], "validation", every_split=True)
    assert [Path(file.uri).name for file in files] == sorted(HUB[:2])
    assert [Path(other.uri).name for other in passed_over] == ["README.md"]


def test_hidden_data_is_named_once_a_folder(tmp_path: Path) -> None:
    _make(tmp_path, "a.jsonl", "_tmp/b.jsonl", "_tmp/c.jsonl", ".git/config", "_SUCCESS", "_d.csv")
    files, passed_over = _found(tmp_path, "train", ".")
    assert (files, passed_over) == (["a.jsonl"], {"_tmp": "its name begins with _", "_d.csv": "its name begins with _"})
    assert _found(tmp_path, "train", "_*.csv")[0] == ["_d.csv"]
    assert _found(tmp_path, "train", "_tmp")[0] == ["_tmp/b.jsonl", "_tmp/c.jsonl"]


@pytest.mark.parametrize("name", ["notes.txt", "x.parquet.gz", "x.jsonl.zip", "x.tar", "x", "x.arrow.zst"])
def test_a_suffix_that_cannot_be_read_is_told_which_can(tmp_path: Path, name: str) -> None:
    _make(tmp_path, name)
    for location in (name, "."):
        with pytest.raises(DataError) as caught:
            find_files([str(tmp_path / location)], "train")
        for suffix in (".jsonl", ".csv", ".parquet", ".arrow", ".zst", ".xz", ".bz2", "save_to_disk"):
            assert suffix in caught.value.remedy
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("{a,b}.jsonl", ["a.jsonl", "b.jsonl"]),
        ("{a,b{1,2}}/{c,}d", ["a/cd", "a/d", "b1/cd", "b1/d", "b2/cd", "b2/d"]),
        ("x-{08..10}.jsonl", ["x-08.jsonl", "x-09.jsonl", "x-10.jsonl"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{a}{b", ["{a}{b"]),
        ("{a}{b,c}", ["{a}b", "{a}c"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


def test_globs_with_braces_and_deep_folders(tmp_path: Path) -> None:
    _make(tmp_path, "a/x/1.jsonl", "a/y/z/2.jsonl", "b/3.csv", "b/{q,r}.jsonl", "c[1].jsonl")
    assert _found(tmp_path, "train", "{a,b}/**")[0] == ["a/x/1.jsonl", "a/y/z/2.jsonl", "b/3.csv", "b/{q,r}.jsonl"]
    assert _found(tmp_path, "train", "**/[xz]/*.jsonl")[0] == ["a/x/1.jsonl", "a/y/z/2.jsonl"]
    assert _found(tmp_path, "train", "*/*/*.jsonl")[0] == ["a/x/1.jsonl"]
    assert _found(tmp_path, "train", "b/{q,r}.jsonl")[0] == ["b/{q,r}.jsonl"]
    assert _found(tmp_path, "train", "c[1].jsonl")[0] == ["c[1].jsonl"]
    with pytest.raises(DataError, match=r"a/x/2\.jsonl does not exist"):
        find_files([str(tmp_path / "a/x/{1,2}.jsonl")], "train")
    with pytest.raises(DataError, match=r"c/\*\.csv"):
        find_files([str(tmp_path / "{b,c}/*.csv")], "train")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set of three splits as `datasets` stores it."""
    splits = {name: datasets.Dataset.from_dict({"split": [name] * 4}) for name in ("train", "test", "validation")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "helpful"), num_shards={"train": 2, "test": 1, "validation": 1})
    return tmp_path / "helpful"


def _splits(location: Path, role: Role) -> list[str]:
    return [json.loads(row.raw)["split"] for file in find_files([str(location)], role).files for row in read_file(file)]


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_directories_of_save_to_disk_are_read_by_split(saved: Path) -> None:
    assert _splits(saved, "train") == ["train"] * 4
    assert _splits(saved, "validation") == ["test"] * 4 + ["validation"] * 4
    assert _splits(saved / "test", "train") == ["test"] * 4
    assert {file.source for file in find_files([str(saved)], "train").files} == {"helpful"}
    assert {Path(other.uri).name for other in find_files([str(saved)], "train").passed_over} == {"data-00000-of-00001.arrow"}


def test_files_that_are_no_part_of_a_saved_data_set_are_passed_over(saved: Path) -> None:
    (saved / "train/cache-1a2b.arrow").write_bytes((saved / "test/data-00000-of-00001.arrow").read_bytes())
    for location in (saved / "train", saved / "train/*.arrow"):
        found = find_files([str(location)], "train")
        assert [Path(file.uri).name for file in found.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        (other,) = found.passed_over
        assert (Path(other.uri).name, other.reason) == ("cache-1a2b.arrow", "it is not among the data files that state.json lists")


def _without_a_shard(folder: Path) -> None:
    (folder / "data-00001-of-00002.arrow").unlink()


def _not_json(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def _indexed(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))


@pytest.mark.parametrize(("damage", "problem"), [(_without_a_shard, "is missing"), (_not_json, "not the state"), (_indexed, "an index")])
def test_a_damaged_saved_data_set_is_an_error(saved: Path, damage: object, problem: str) -> None:
    assert callable(damage)
    damage(saved / "train")
    with pytest.raises(DataError, match=problem):
        find_files([str(saved)], "train")


def test_descriptions_of_data_sets_are_no_data(tmp_path: Path) -> None:
    _make(tmp_path, "dataset_infos.json", "a.jsonl")
    assert _found(tmp_path, "train", ".") == (["a.jsonl"], {"dataset_infos.json": "it describes a data set and holds no rows"})


KINDS: Mapping[str, tuple[str, str | None] | None] = {
    "a.JSONL.GZ": ("json", "gzip"),
    "a.tsv.zst": ("csv", "zstd"),
    "a.ndjson.lz4": ("json", "lz4"),
    "a.json.xz": ("json", "xz"),
    "a.csv.bz2": ("csv", "bz2"),
    "a.feather": ("arrow", None),
    "a.pq": ("parquet", None),
    "a.gz": None,
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_by_suffix(name: str) -> None:
    assert kind_of(name) == KINDS[name]


def test_names_say_a_source_and_a_split() -> None:
    assert source_name("/d/pairs.csv.zst") == "pairs"
    assert source_name("/d/my-set/train/data-00000-of-00003.arrow") == "my-set"
    assert split_of(("a", "test", "part-0.jsonl")) == ("held out", frozenset({"test"}))
    assert split_of(("test", "train.jsonl")) == ("train", frozenset({"train"}))
    assert split_of(("a", "b.jsonl")) is None
