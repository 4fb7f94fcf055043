"""Text kinds: compressions, ranges of bytes, JSON lists, CSV; what is damaged is an error with the file's name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayward.data.record import BadRow
from rayward.data.sources import lines, read
from rayward.data.sources.find import SourceFile, find_files
from rayward.data.sources.read import line_counts_needed, lines_in, numbered, plan_units, read_file, read_unit, sample_rows
from rayward.data.sources.streams import open_text
from rayward.errors import DataError


def _by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return bytes(sink.getvalue().to_pybytes())

    return compress


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _by_arrow("zstd"),
    ".lz4": _by_arrow("lz4"),
}


def _file(path: Path, content: bytes | str) -> SourceFile:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return find_files([str(path)], "train").files[0]


def _values(file: SourceFile) -> list[Any]:
    return [json.loads(row.raw) for row in read_file(file)]


ROWS = [{"a": "é" * i, "b": "x\ny,z" * (i % 3)} for i in range(1, 40)]


def _text(name: str) -> str:
    if ".jsonl" in name:
        return "".join(json.dumps(row) + "\n" for row in ROWS)
    if ".json" in name:
        return json.dumps(ROWS, indent=2)
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, ["a", "b"], delimiter="\t" if ".tsv" in name else ",")
    writer.writeheader()
    writer.writerows(ROWS)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv"])
def test_every_kind_reads_the_same_rows_in_every_compression(tmp_path: Path, name: str, suffix: str) -> None:
    content = _text(name).encode()
    file = _file(tmp_path / (name + suffix), COMPRESSIONS[suffix](content) if suffix else content)
    expected = [{"a": row["a"], "b": row["b"] or (None if "sv" in name else "")} for row in ROWS]
    assert _values(file) == expected
    assert [row.number for row in read_file(file)] == list(range(1, len(ROWS) + 1))
    assert sample_rows(file) == (expected, len(ROWS))
    assert [unit.file for unit in plan_units(file)] == [file]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_several_members_are_one_file_and_damage_is_an_error(tmp_path: Path, suffix: str) -> None:
    first, second = (COMPRESSIONS[suffix](_text("x.jsonl").encode()) for _ in range(2))
    assert _values(_file(tmp_path / f"x.jsonl{suffix}", first + second)) == ROWS * 2
    assert _values(_file(tmp_path / f"x.jsonl{suffix}", COMPRESSIONS[suffix](b""))) == []
    assert _values(_file(tmp_path / f"x.jsonl{suffix}", b"")) == []
    for content in (first[:-3], first + second[: len(second) // 2], first + b"garbage", b"garbage", b'{"a": 1}\n'):
        with pytest.raises(DataError, match=rf"x\.jsonl{suffix}"):
            list(read_file(_file(tmp_path / f"x.jsonl{suffix}", content)))


def test_padding_and_old_format_of_xz(tmp_path: Path) -> None:
    text = _text("x.jsonl").encode()
    assert _values(_file(tmp_path / "x.jsonl.xz", lzma.compress(text) + b"\0" * 8 + lzma.compress(text) + b"\0" * 4)) == ROWS * 2
    assert _values(_file(tmp_path / "x.jsonl.xz", lzma.compress(text, format=lzma.FORMAT_ALONE))) == ROWS


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b\n".encode("utf-16"), "UTF-16"),
        ("﻿a,b\n".encode("utf-16-be"), "UTF-16"),
        (gzip.compress(b"{}"), r"\.gz"),
        (lzma.compress(b"{}"), r"\.xz"),
        (b"PAR1....", r"\.parquet"),
    ],
)
def test_text_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    file = _file(tmp_path / name, content)
    with pytest.raises(DataError, match=problem) as caught:
        list(read_file(file))
    assert name in str(caught.value)


# ---- ranges of bytes ---------------------------------------------------------------------------------------------

PIECES = [
    b"",
    b"\n",
    b"\r\n",
    b" \n",
    b'{"a": 1}\n',
    b'{"a": "%s"}\n' % (b"x" * 70),
    b"\xff\n",
    b"\0\n",
    b"{\n",
    "é☃\n".encode(),
    b"\xef\xbb\xbf{}\n",
]


@pytest.mark.parametrize("seed", range(20))
def test_ranges_read_each_line_once_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random_ = random.Random(seed)
    content = random_.choice([b"", b"\xef\xbb\xbf"]) + b"".join(random_.choice(PIECES) for _ in range(random_.randint(0, 15)))
    if random_.random() < 0.5:
        content = content.rstrip(b"\n")
    file = _file(tmp_path / "x.jsonl", content)
    texts = [
        (number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()) for number, line in enumerate(content.split(b"\n"), 1)
    ]
    expected = [(number, text.decode("utf-8", "backslashreplace")) for number, text in texts if text]
    for size in (1, 2, 3, 7, 20, 64, 10_000):
        monkeypatch.setattr(read, "UNIT_BYTES", size)
        monkeypatch.setattr(lines, "CHUNK_BYTES", random_.choice([1, 5, 1000]))
        units = plan_units(file)
        assert len(units) == max(1, -(-len(content) // size))
        for planned in (units, numbered(units, {unit: lines_in(unit) for unit in line_counts_needed(units)})):
            assert [(row.number, row.raw) for unit in planned for row in read_unit(unit)] == expected


def test_numbering_needs_the_lines_of_all_ranges_but_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _file(tmp_path / "x.jsonl", b"{}\n" * 10), _file(tmp_path / "y.jsonl", b"{}\n" * 4)
    monkeypatch.setattr(read, "UNIT_BYTES", 12)
    units = plan_units(first) + plan_units(second)
    assert [(unit.start, unit.end, unit.size) for unit in units] == [(0, 12, 12), (12, 24, 12), (24, 30, 6), (0, None, 12)]
    needed = line_counts_needed(units)
    assert needed == units[:2]
    assert [unit.first_number for unit in numbered(units, {unit: lines_in(unit) for unit in needed})] == [1, 5, 9, 1]


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.jsonl.gz"])
def test_what_cannot_be_split_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 100)
    content = _text(name).encode()
    file = _file(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    (unit,) = plan_units(file)
    assert unit.size >= file.size
    assert len(list(read_unit(unit))) == len(ROWS)


def test_json_lines_named_json_are_split_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 100)
    file = _file(tmp_path / "x.json", _text("x.jsonl"))
    assert len(plan_units(file)) > 5
    assert [json.loads(row.raw) for unit in plan_units(file) for row in read_unit(unit)] == ROWS


def test_a_sample_reads_the_head_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    real = open_text

    def counting(file: SourceFile, start: int = 0) -> Any:
        nonlocal taken
        taken += 1
        return real(file, start)

    monkeypatch.setattr(lines, "open_text", counting)
    file = _file(tmp_path / "x.json", json.dumps([{"a": "x" * 1000}] * 30_000))
    tracemalloc.start()
    rows, seen = sample_rows(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(rows), seen, taken) == (100, 100, 2)
    assert peak < 15e6 < file.size


# ---- JSON lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 17, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "[]",
        " [ ] \n",
        "\ufeff[{}]",
        '[1, -2.5e-3, 12345678, "a\\"\\\\]", null, true, [], {"a": [{}]}]',
        '[{"a": "é\\u2028☃ ] , ["},\n\n {"b": NaN}\n]\n',
        '["\\ud83d\\ude00 \\ud800"]',
    ],
)
def test_a_list_is_parsed_element_by_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
    file = _file(tmp_path / "x.json", text)
    expected = json.loads(text.removeprefix("\ufeff"))
    assert [row.raw for row in read_file(file)] == [json.dumps(value) for value in expected]
    assert [row.number for row in read_file(file)] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1 2]", "[1,]", "[,1]", "[1]]", "[1] x", '[{"a": 1]', '["a', "[nul]", "[1}", '["\\x"]', "[" * 9999]
)
def test_a_damaged_list_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError, match=r"x\.json is damaged"):
        list(read_file(_file(tmp_path / "x.json", text)))


def test_a_list_is_read_in_bounded_memory(tmp_path: Path) -> None:
    row = json.dumps({"a": "x" * 1000})
    file = _file(tmp_path / "x.json", "[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_file(file)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6 < file.size


# ---- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("x.csv", 'p,q\n"a\nb","c""d"\ne,\n', [{"p": "a\nb", "q": 'c"d'}, {"p": "e", "q": None}]),
        ("x.csv", "\ufeffp,q\r\n\r\n1,2\r\n\r\n3,4", [{"p": "1", "q": "2"}, {"p": "3", "q": "4"}]),
        ("x.csv", "p;q\n1,5;2\n", [{"p": "1,5", "q": "2"}]),
        ("x.tsv", "p\tq\n1,2\t3 ; 4\n", [{"p": "1,2", "q": "3 ; 4"}]),
        ("x.csv", ",p\n0,a\n", [{"Unnamed: 0": "0", "p": "a"}]),
        ("x.csv", "p\n\0\n", [{"p": "\0"}]),
        ("x.csv", f"p,q\n{'y' * 300_000},1\n", [{"p": "y" * 300_000, "q": "1"}]),
        ("x.csv", "p,q\n", []),
        ("x.csv", "p,q", []),
        ("x.csv", "\n\n", []),
    ],
)
def test_csv(tmp_path: Path, name: str, text: str, rows: list[dict[str, Any]]) -> None:
    file = _file(tmp_path / name, text)
    assert _values(file) == rows
    assert [row.number for row in read_file(file)] == list(range(1, len(rows) + 1))


def test_bad_records_of_csv_cost_themselves(tmp_path: Path) -> None:
    file = _file(tmp_path / "x.csv", b'p,q\n1\n1,2,3\n"a"b,2\n\xe9,5\ngood,"yes"\n')
    rows = list(read_file(file))
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [row.reason for row in rows] == [BadRow.UNPARSABLE] * 4 + [None]
    assert "1 fields, the header 2" in rows[0].detail
    assert "line 4" in rows[2].detail
    assert rows[2].raw == '"a"b,2'
    assert "UTF-8" in rows[3].detail


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("p,p\n1,2\n", "'p' stands twice"),
        ("p,\n1,2\n", "has no name"),
        ('p,q\n1,2\n3,"4\n5,6\n', "a quote that opens in row 2 is never closed"),
        ("\x01\x02,q\n", "is no text"),
    ],
)
def test_csv_without_a_header_or_end_is_an_error(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        list(read_file(_file(tmp_path / "x.csv", text)))
    assert "x.csv" in str(caught.value)
