"""Lines of a stream: bounded, unpacked, and answered without waiting for more."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import threading
from collections.abc import Iterator

import pytest

from rayward.errors import DataError
from rayward.scoring.lines import CHUNK_BYTES, CHUNK_ROWS, chunks, numbered, read_lines, ready_chunks

TEXT = b'{"a": 1}\r\n\n{"b": "\xff"}\n{"c": 3}'


def lines(data: bytes, max_bytes: int = 1000) -> list[bytes]:
    return list(read_lines(io.BytesIO(data), max_bytes))


def test_lines_come_without_their_ends_and_the_last_one_needs_none() -> None:
    assert lines(TEXT) == [b'{"a": 1}', b"", b'{"b": "\xff"}', b'{"c": 3}']
    assert lines(b"") == []
    assert lines(gzip.compress(TEXT)) == lines(TEXT)
    assert lines(gzip.compress(b"a\n") + gzip.compress(b"b\n")) == [b"a", b"b"]


def test_numbers_are_those_of_all_lines_and_blank_ones_are_passed_over() -> None:
    given: list[str | bytes] = [b"\xef\xbb\xbfa\r\n", "  \n", "b\u2028\x85", b"\xef\xbb\xbf", "\ud800"]
    assert list(numbered(given)) == [(1, b"a"), (3, "b\u2028\x85".encode()), (5, b"\xed\xa0\x80")]


@pytest.mark.parametrize("size", [999, 1000, 1001, 1002, 5000, 3 * 1024 * 1024])
def test_a_line_without_an_end_in_sight_is_cut_and_does_not_hide_the_next(size: int) -> None:
    first, second = lines(b"x" * size + b"\nnext\n", 1000)
    assert (len(first), len(first) > 1000) == (min(size, len(first)), size > 1000)
    assert len(first) <= 1000 + 1024 * 1024 + 2
    assert second == b"next"


def test_random_bytes_are_cut_at_their_line_feeds_alone() -> None:
    draw = random.Random(1)
    for _ in range(300):
        data = b"{" + bytes(draw.choices(b"\n\r\x0b\x0c\x1c\x85\xc2\xe2 a", k=draw.randint(0, 60)))
        expected = data.split(b"\n")
        assert lines(data) == [line.rstrip(b"\r") for line in (expected if expected[-1] else expected[:-1])]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lzma.compress(TEXT), "xz"),
        (bz2.compress(TEXT), "bzip2"),
        (b"PAR1....", "Parquet"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        (gzip.compress(TEXT)[:-9], "cannot be read"),
        (gzip.compress(b"a" * 500)[:12] + b"\xff" * 40, "cannot be read"),
    ],
)
def test_what_holds_no_lines_is_said(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        lines(data)


def test_chunks_are_bounded_by_lines_and_by_bytes() -> None:
    many = [(number, b"x") for number in range(2 * CHUNK_ROWS + 1)]
    assert [len(chunk) for chunk in chunks(many)] == [CHUNK_ROWS, CHUNK_ROWS, 1]
    large = [(number, b"x" * (CHUNK_BYTES // 2)) for number in range(5)]
    for cut in (chunks(large), ready_chunks(large)):
        found = list(cut)
        assert max(map(len, found)) <= 2
        assert [line for chunk in found for line in chunk] == large
    assert [line for chunk in ready_chunks(many) for line in chunk] == many


def test_who_writes_a_line_and_waits_is_answered() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb", buffering=0) as sender:
        found = ready_chunks(numbered(read_lines(stream, 1000)))
        answers: list[list[tuple[int, bytes]]] = []
        for number in (1, 2, 3):
            sender.write(b"line\n")
            worker = threading.Thread(target=lambda: answers.append(next(found)), daemon=True)
            worker.start()
            worker.join(10)
            assert not worker.is_alive(), "nothing more comes before the answer"
            assert answers[-1] == [(number, b"line")]
        sender.close()
        assert list(found) == []


def test_what_reading_raises_comes_after_the_lines_before_it() -> None:
    def broken() -> Iterator[tuple[int, bytes]]:
        yield 1, b"a"
        raise DataError("gone", remedy="none")

    found = ready_chunks(broken())
    assert next(found) == [(1, b"a")]
    with pytest.raises(DataError, match="gone"):
        next(found)
