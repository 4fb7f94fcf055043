"""Data sets of the hub; one in a local folder of the same layout stands for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayward.data.sources import hub
from rayward.data.sources.find import SourceFile
from rayward.data.sources.hub import download, parse_hub_name
from rayward.data.sources.read import read_file
from rayward.errors import DataError

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner/pairs").mkdir(parents=True)
    return tmp_path / "owner/pairs"


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(files: list[SourceFile]) -> list[dict[str, Any]]:
    return [json.loads(row.raw) for file in files for row in read_file(file)]


def test_a_data_set_is_streamed_once_into_shards(owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lines(owner / "train.jsonl", [{**PAIR, "id": number} for number in range(2500)])
    _lines(owner / "test.jsonl", [PAIR])
    monkeypatch.setattr(hub, "SHARD_BYTES", 20_000)
    files = download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")
    assert len(files) == 3
    assert [row["id"] for row in _rows(files)] == list(range(2500))
    assert {(file.kind, file.source, file.role) for file in files} == {("arrow", "pairs", "train")}
    assert all(Path(file.uri).stat().st_size == file.size for file in files)
    monkeypatch.setattr(hub, "_tables", lambda *_: pytest.fail("it is there already"))
    assert download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train") == files


def test_another_revision_is_another_download(owner: Path, tmp_path: Path) -> None:
    _lines(owner / "train.jsonl", [PAIR])
    first = download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")
    _lines(owner / "train.jsonl", [PAIR, {**PAIR, "prompt": "new"}])
    second = download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")
    assert (len(_rows(first)), len(_rows(second))) == (1, 2)


def test_splits_and_slices(owner: Path, tmp_path: Path) -> None:
    _lines(owner / "train.jsonl", [{**PAIR, "id": number} for number in range(10)])
    _lines(owner / "test.jsonl", [{**PAIR, "id": 100}])

    def ids(name: str) -> list[int]:
        return [row["id"] for row in _rows(download(parse_hub_name(name, "train"), str(tmp_path / "downloads"), "train"))]

    assert ids("hf:owner/pairs@test") == [100]
    assert ids("hf:owner/pairs@train[:30%]") == [0, 1, 2]
    assert ids("hf:owner/pairs@train+test") == [*range(10), 100]


def test_columns_of_json_are_decoded_and_types_may_change_along_the_rows(
    owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pa.table({"meta": pa.array(['{"a": [1]}'], pa.json_()), "note": pa.nulls(1), "of": pa.array([1])})
    second = pa.table({"meta": pa.array(['"x"'], pa.json_()), "note": ["text"], "of": pa.array(["one"])})
    third = pa.table({"meta": pa.array([None], pa.json_()), "of": pa.array(["two"])})
    pq.write_table(first, owner / "train.parquet")
    assert _rows(download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")) == [
        {"meta": {"a": [1]}, "note": None, "of": 1}
    ]
    monkeypatch.setattr(hub, "_tables", lambda *_: iter([first, second, third]))
    files = download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "other"), "train")
    assert len(files) == 2
    assert _rows(files) == [
        {"meta": {"a": [1]}, "note": None, "of": 1},
        {"meta": "x", "note": "text", "of": "one"},
        {"meta": None, "note": None, "of": "two"},
    ]


def test_a_download_that_breaks_off_leaves_nothing(owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lines(owner / "train.jsonl", [PAIR])

    def broken(*_: object) -> Iterator[pa.Table]:
        yield pa.table({"a": ["x" * 1000]})
        yield pa.table({"b": ["x" * 1000]})
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_tables", broken)
        with pytest.raises(DataError, match="the network is gone"):
            download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")
    assert [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()] == []
    assert _rows(download(parse_hub_name("hf:owner/pairs", "train"), str(tmp_path / "downloads"), "train")) == [PAIR]


@pytest.mark.parametrize("name", ["hf:owner/absent", "hf:owner/pairs@absent", "hf:owner/pairs/absent"])
def test_what_is_not_there_is_an_error_that_names_it(owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _lines(owner / "train.jsonl", [PAIR])
    with pytest.raises(DataError, match=name):
        download(parse_hub_name(name, "train"), str(tmp_path / "downloads"), "train")
