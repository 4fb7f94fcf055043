"""The verbs of storage on a local path, a file URI and an object store in memory."""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from rayward import storage
from rayward.errors import DataError


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    return {"path": f"{tmp_path}/new", "file": f"file://{tmp_path}/new", "memory": f"memory://{uuid.uuid4().hex}/new"}[request.param]


def test_a_small_file_is_written_whole_and_read_back(location: str) -> None:
    filesystem, path = storage.resolve(storage.join(location, "a", "b.txt"))
    storage.write_text(filesystem, path, "first")
    storage.write_text(filesystem, path, "zwölf\n")
    assert storage.read_text(filesystem, path) == "zwölf\n"
    folder = pafs.FileSelector(path.rpartition("/")[0])
    assert [info.base_name for info in filesystem.get_file_info(folder)] == ["b.txt"]


def test_bytes_are_never_compressed_by_the_suffix_of_their_name(location: str) -> None:
    filesystem, path = storage.resolve(storage.join(location, "a.jsonl.gz"))
    storage.write_text(filesystem, path, "plain")
    assert storage.read_text(filesystem, path) == "plain"
    with storage.localized(location, "a.jsonl.gz") as directory:
        assert (directory / "a.jsonl.gz").read_bytes() == b"plain"


def test_what_is_not_there_is_no_file(location: str) -> None:
    filesystem, path = storage.resolve(location)
    assert not storage.exists(filesystem, path)
    storage.delete_dir(filesystem, path)
    with pytest.raises(FileNotFoundError):
        storage.read_text(filesystem, path)


def test_a_directory_is_deleted_with_all_it_holds(location: str) -> None:
    filesystem, path = storage.resolve(location)
    storage.write_text(filesystem, f"{path}/a/b.txt", "x")
    assert storage.exists(filesystem, f"{path}/a")
    storage.delete_dir(filesystem, path)
    assert not storage.exists(filesystem, f"{path}/a/b.txt")


def test_files_and_folders_come_to_where_transformers_can_read_them(location: str) -> None:
    filesystem, path = storage.resolve(location)
    texts = ("one.json", "folder/two.json", "folder/deep/three.json")
    for name in (*texts, "left.json"):
        storage.write_text(filesystem, f"{path}/{name}", name)
    with storage.localized(location, "one.json", "folder", "absent") as directory:
        assert [(directory / name).read_text() for name in texts] == list(texts)
        assert not (directory / "absent").exists()


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, path = storage.resolve(str(tmp_path / "state.json"))
    storage.write_text(filesystem, path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_text(filesystem, path, "new")
    assert storage.read_text(filesystem, path) == "old"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nowhere://bucket/x", "Protocol not known"),
        ("s3:///", "no filesystem can be opened"),
        ("adl://lake/x", "no filesystem can be opened"),  # its package is not installed
    ],
)
def test_a_uri_that_nothing_opens_is_named_with_a_remedy(uri: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        storage.resolve(uri)
    assert str(caught.value).startswith(uri)


@pytest.mark.parametrize(
    ("location", "parts", "joined"),
    [
        ("/data/", ("a",), "/data/a"),
        ("/data/odd?name", ("a", "b"), "/data/odd?name/a/b"),
        ("s3://bucket/data/", ("a",), "s3://bucket/data/a"),
        ("s3://bucket/data?region=eu-west-1", ("a", "b"), "s3://bucket/data/a/b?region=eu-west-1"),
        ("memory://bucket/odd?name", ("a",), "memory://bucket/odd?name/a"),
    ],
)
def test_parts_are_appended_to_the_path_and_not_to_the_options(location: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(location, *parts) == joined
    if joined != "s3://bucket/data/a":  # without a region pyarrow would ask the network for it
        assert storage.resolve(joined)[1].endswith("/".join(parts))


def test_local_paths_are_made_absolute_and_uris_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute("~/runs") == f"{tmp_path}/runs"
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert storage.resolve("runs")[1] == f"{tmp_path}/runs"


def test_a_remote_directory_is_a_local_copy_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = tmp_path / "bucket"
    (bucket / "run" / "tokenizer").mkdir(parents=True)
    (bucket / "run" / "contract.json").write_text("{}")
    (bucket / "run" / "tokenizer" / "vocab.json").write_text("[]")
    (bucket / "run" / "huge.bin").write_text("not asked for")
    remote = pafs.SubTreeFileSystem(str(bucket), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda location: (remote, location.removeprefix("s3://")))
    names = ("contract.json", "tokenizer", "missing.json")
    with storage.localized("s3://run", *names) as directory:
        found = {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}
        assert found == {"contract.json": "{}", "tokenizer/vocab.json": "[]"}
    assert not directory.exists()
    with pytest.raises(ZeroDivisionError), storage.localized("s3://run", *names) as directory:
        raise ZeroDivisionError
    assert not directory.exists()


def test_a_local_directory_is_itself_and_stays(tmp_path: Path) -> None:
    with storage.localized(str(tmp_path), "anything") as directory:
        assert directory == tmp_path
    assert tmp_path.is_dir()
