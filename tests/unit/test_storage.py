from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs
import pytest

from rayward import storage


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
