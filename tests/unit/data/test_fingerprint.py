"""What makes two files the same input."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from rayward.data.prepare import write
from rayward.data.sources import fingerprint
from rayward.data.sources.find import SourceFile, find_files
from rayward.data.sources.fingerprint import SAMPLE_BYTES, SAMPLES, content_hashes
from rayward.data.sources.streams import open_plain

SIZE = 3 * SAMPLES * SAMPLE_BYTES


def _files(*paths: Path) -> list[SourceFile]:
    return [find_files([str(path)], "train").files[0] for path in paths]


def _make(path: Path, *, change: int | None = None, time: int = 1_000_000_000) -> Path:
    content = bytearray(b"0123456789abcdef" * (SIZE // 16))
    if change is not None:
        content[change] ^= 1
    path.write_bytes(content)
    os.utime(path, (time, time))
    return path


def test_small_inputs_are_known_by_every_byte_and_nothing_else(tmp_path: Path) -> None:
    first, copy = _make(tmp_path / "a.jsonl"), _make(tmp_path / "b.jsonl", time=1_700_000_000)
    others = [_make(tmp_path / f"{place}.jsonl", change=place) for place in (0, SIZE // 2 + 7, SIZE - 1)]
    hashes = content_hashes(_files(first, copy, *others))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_large_inputs_are_known_by_samples_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", SIZE)
    read = 0
    real = open_plain

    class Counting:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def seek(self, place: int) -> None:
            self.stream.seek(place)

        def read(self, size: int) -> bytes:
            nonlocal read
            found = bytes(self.stream.read(size))
            read += len(found)
            return found

    monkeypatch.setattr(fingerprint, "open_plain", lambda file: Counting(real(file)))
    hidden = SAMPLE_BYTES + 1  # between two samples
    first, same, later = _make(tmp_path / "a.jsonl"), _make(tmp_path / "b.jsonl"), _make(tmp_path / "c.jsonl", time=1_700_000_000)
    edges = [_make(tmp_path / f"{place}.jsonl", change=place) for place in (0, SIZE - 1)]
    unseen = _make(tmp_path / "d.jsonl", change=hidden, time=1_700_000_000)
    files = _files(first, same, later, *edges, unseen)
    hashes = content_hashes(files)
    assert read == len(files) * SAMPLES * SAMPLE_BYTES
    assert hashes[0] == hashes[1]
    assert len({hashes[0], hashes[2], *hashes[3:5]}) == 4
    assert hashes[5] != hashes[0], "the pieces miss the change, the time does not"


def test_large_objects_of_a_store_are_known_by_what_it_says_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    uri = f"memory://{uuid.uuid4().hex}/a.jsonl"
    content = bytearray(b"x" * SIZE)
    write.write_file(uri, bytes(content))
    (file,) = find_files([uri], "train").files
    before = content_hashes([file])
    assert content_hashes([file]) == before
    content[SAMPLE_BYTES + 1] = 0
    write.write_file(uri, bytes(content))
    assert content_hashes([file]) != before


def test_many_small_files_are_hashed_whole_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    for name, time in (("a.jsonl", 1_000_000_000), ("b.jsonl", 1_700_000_000)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (time, time))
    first, second = content_hashes(_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert first == second
