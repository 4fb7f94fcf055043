"""Data, checkpoints, exports and evaluations whose place is an object store: it has no rename, and no process sees it as a path."""

from __future__ import annotations

import gzip
import json
import logging
import math
import uuid
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from tests.helpers.jobs import make_job, make_prepared, run_session
from tests.helpers.prepared import make_manifest, prepared_row, write_prepared
from tests.helpers.ranks import Group, PartitionedEngine, State
from tests.helpers.training import draft

from rayward import storage
from rayward.config.data import DataConfig
from rayward.data.prepare import write
from rayward.data.prepare.rows import ENCODED_SCHEMA
from rayward.data.prepared import MANIFEST_FILE, PREPARED_SCHEMA, PreparedData, ShardEntry
from rayward.data.sources.find import find_files
from rayward.data.sources.fingerprint import content_hash
from rayward.data.sources.read import plan_units, read_unit
from rayward.errors import CheckpointError, DataError, StreamOrderError
from rayward.evaluation.held_out import read_prepared, read_raw
from rayward.scoring.scorer import Scorer
from rayward.training.checkpoints.format import COMMIT_FILE
from rayward.training.checkpoints.store import CheckpointStore, choose_checkpoint
from rayward.training.engines.protocol import STATE_KINDS
from rayward.workflows import evaluate
from rayward.workflows.export import export

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.fixture
def bucket() -> str:
    """An empty place, as a URI."""
    return f"memory://{uuid.uuid4().hex}"


def put(uri: str, content: bytes) -> None:
    write.write_file(uri, content)


def json_lines(count: int) -> bytes:
    return "".join(json.dumps({**PAIR, "id": f"p{i}"}) + "\n" for i in range(count)).encode()


def test_raw_data_is_found_and_read_by_file_folder_and_pattern(bucket: str, tmp_path: Path) -> None:
    put(f"{bucket}/set/a.jsonl", json_lines(3))
    put(f"{bucket}/set/deep/b.jsonl.gz", gzip.compress(json_lines(2)))
    pq.write_table(pa.Table.from_pylist([{**PAIR, "id": "p0"}] * 4), tmp_path / "c.parquet")
    put(f"{bucket}/set/c.parquet", (tmp_path / "c.parquet").read_bytes())
    put(f"{bucket}/set/readme.md", b"#")

    def found(location: str) -> list[str]:
        return [file.uri.removeprefix(bucket) for file in find_files([location], "train")[0]]

    assert found(f"{bucket}/set/a.jsonl") == ["/set/a.jsonl"]
    assert found(f"{bucket}/set/") == ["/set/a.jsonl", "/set/c.parquet", "/set/deep/b.jsonl.gz"]
    assert found(f"{bucket}/*/?.jsonl") == ["/set/a.jsonl"]
    files, ignored = find_files([f"{bucket}/set"], "train")
    assert [other.uri for other in ignored] == [f"{bucket}/set/readme.md"]
    assert [sum(len(list(read_unit(unit))) for unit in plan_units(file)) for file in files] == [3, 4, 2]
    (tmp_path / "a.jsonl").write_bytes(json_lines(3))
    assert content_hash(files[0]) == content_hash(find_files([str(tmp_path / "a.jsonl")], "train")[0][0])
    with pytest.raises(DataError, match=rf"{bucket}/absent does not exist"):
        find_files([f"{bucket}/absent"], "train")


def test_files_keep_the_options_of_the_uri_that_named_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data/set").mkdir(parents=True)
    (tmp_path / "data/set/a.jsonl").write_bytes(json_lines(1))
    tree = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda location: (tree, storage.split_options(location)[0].removeprefix("s3://")))
    (file,) = find_files(["s3://data/set?region=eu-west-1"], "train")[0]
    assert file.uri == "s3://data/set/a.jsonl?region=eu-west-1"
    assert len(list(read_unit(plan_units(file)[0]))) == 1


def test_prepared_data_is_committed_in_place_by_its_manifest(bucket: str) -> None:
    directory = f"{bucket}/prepared/abc"
    rows = [{**prepared_row(number), "order": f"train {number}", "truncated": False} for number in range(3)]
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "row"} for row in rows], schema=ENCODED_SCHEMA)
    entry = ShardEntry(file="train/part-00000.parquet", num_rows=3)
    manifest = make_manifest({"train": [entry]})
    with write.open_workspace(directory) as workspace:
        with pytest.raises(DataError, match="not visible here"):
            write.check_shared(workspace, manifest)
        write._write_shard(table, 0, storage.join(workspace, entry.file))
        write.check_shared(workspace, manifest)
        assert PreparedData.find(directory) is None
        write.write_file(storage.join(workspace, MANIFEST_FILE), manifest.model_dump_json().encode())
        write.publish(workspace, directory)
    prepared = PreparedData.load(directory)
    assert prepared.manifest == manifest
    (written,) = prepared.tables("train", PREPARED_SCHEMA.names)
    assert written.schema == PREPARED_SCHEMA
    assert written["row"].to_pylist() == [0, 1, 2]
    assert written["id"].to_pylist() == ["r0", "r1", "r2"]


def test_a_missing_or_damaged_shard_is_named_by_its_uri(bucket: str) -> None:
    prepared = write_prepared(f"{bucket}/prepared", {"train": [[prepared_row(0)], [prepared_row(1)]]})
    assert [table["id"].to_pylist() for table in prepared.tables("train", ["id"])] == [["r0"], ["r1"]]
    put(f"{bucket}/prepared/train/part-00001.parquet", b"PAR1")
    with pytest.raises(DataError, match=rf"{bucket}/prepared/train/part-00001\.parquet cannot be read"):
        list(prepared.tables("train", ["id"]))
    filesystem, path = storage.resolve(f"{bucket}/prepared/train/part-00000.parquet")
    filesystem.delete_file(path)
    with pytest.raises(DataError, match=r"part-00000\.parquet is missing"):
        next(prepared.tables("train", ["id"]))
    with pytest.raises(DataError, match="holds no manifest"):
        PreparedData.load(f"{bucket}/elsewhere")


def test_held_out_rows_come_from_prepared_and_from_raw_data(bucket: str, tmp_path: Path) -> None:
    write_prepared(f"{bucket}/prepared", {"validation": [[prepared_row(number) for number in range(5)]]})
    held_out = read_prepared(f"{bucket}/prepared")
    assert [table.num_rows for table in held_out.tables] == [5]
    put(f"{bucket}/raw.jsonl", json_lines(2) + b"{\n")
    raw = read_raw([f"{bucket}/raw.jsonl"], DataConfig(), download_to=str(tmp_path))
    assert (raw.num_rows, [table.num_rows for table in raw.tables], list(raw.rejected)) == (3, [2], [2])


def test_a_prepared_directory_is_recognised_by_its_manifest_wherever_it_is(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prepared(f"{bucket}/prepared", {"validation": [[prepared_row(0)]]})
    put(f"{bucket}/raw.jsonl", json_lines(2))
    asked: list[tuple[object, object]] = []
    monkeypatch.setattr(evaluate, "connect", lambda: None)
    monkeypatch.setattr("rayward.evaluation.run.evaluate", lambda *, data, prepared, **_: asked.append((data, prepared)))
    monkeypatch.setattr("rayward.evaluation.report.print_table", lambda _: None)
    for name in ("prepared", "raw.jsonl"):
        evaluate.evaluate_pipeline("model", [f"{bucket}/{name}"], "out", data_config=DataConfig())
    assert asked == [(None, f"{bucket}/prepared"), ([f"{bucket}/raw.jsonl"], None)]


def test_checkpoints_are_written_pruned_damaged_and_loaded(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(f"{bucket}/run/checkpoints")
    assert store.latest() is None
    shapes: dict[str, tuple[int, ...]] = {"matrix": (7, 5), "vector": (11,)}
    state: State = {(name, kind): torch.randn(math.prod(shape)) for name, shape in shapes.items() for kind in STATE_KINDS}
    for step in (1, 2, 3):
        group = Group(2)
        saved = group.run(lambda rank: store.save(PartitionedEngine(group, rank, shapes, state), draft(step, keep_last=2)))  # noqa: B023
        assert saved == [None, None]
    assert [checkpoint.commit.step for checkpoint in store.committed()] == [3, 2]
    assert not storage.exists(store.filesystem, f"{store.root}/step_00000001")

    latest = store.latest()
    assert latest is not None
    group = Group(3)
    engines = [PartitionedEngine(group, rank, shapes, None) for rank in range(3)]
    group.run(lambda rank: store.load(engines[rank], latest))
    for key, expected in state.items():
        assert torch.equal(torch.cat([engine.local[key] for engine in engines]), expected)

    file = f"{latest.directory}/rank_00001.safetensors"
    with store.filesystem.open_input_stream(file) as stream:
        content = bytearray(stream.read())
    content[-1] ^= 1
    with store.filesystem.open_output_stream(file) as stream:
        stream.write(bytes(content))
    with pytest.raises(CheckpointError, match="not what was committed"):
        group.run(lambda rank: store.load(engines[rank], latest))
    with caplog.at_level(logging.WARNING):
        assert [checkpoint.commit.step for checkpoint in store.committed()] == [2]
    store.filesystem.delete_file(f"{store.root}/step_00000002/{COMMIT_FILE}")
    assert store.latest() is None


def test_a_run_in_a_bucket_is_resumed_and_exported_to_the_model_of_a_local_run(bucket: str, tmp_path: Path) -> None:
    local = make_prepared(tmp_path / "prepared")
    filesystem, root = storage.resolve(f"{bucket}/prepared")
    pafs.copy_files(local.directory, root, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
    job = make_job(tmp_path, local)
    run_session(job, local)
    remote = replace(job, location=f"{bucket}/run")
    with pytest.raises(StreamOrderError):  # it dies after the checkpoint of step 2
        run_session(remote, local, stop_after=3)
    run_session(remote, local)
    prepared = PreparedData.load(f"{bucket}/prepared")
    for each, data, name in ((job, local, "a"), (remote, prepared, "b")):
        export(each.config, data, choose_checkpoint(each.store, "last"), each.store, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert Scorer.load(tmp_path / "b", verify=True).version == Scorer.load(tmp_path / "a").version
    lines = storage.read_text(*storage.resolve(f"{bucket}/run/metrics.jsonl")).splitlines()
    assert [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
