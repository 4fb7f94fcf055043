"""Parquet and Arrow: typed columns become plain JSON values, files are split, what is cut off is an error."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayward.data.record import BadRow
from rayward.data.sources import columnar, read
from rayward.data.sources.find import SourceFile, find_files
from rayward.data.sources.read import plan_units, read_file, read_unit, sample_rows
from rayward.data.sources.rows import RawRow
from rayward.errors import DataError

MESSAGES = [
    {"role": "user", "content": "hi", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [{"n": {"x": [1.5]}}]},
]


def _write(path: Path, table: pa.Table, *, rows: int = 1000) -> SourceFile:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return find_files([str(path)], "train").files[0]


def _values(file: SourceFile) -> list[Any]:
    return [json.loads(row.raw) for unit in plan_units(file) for row in read_unit(unit)]


@pytest.fixture(params=["x.parquet", "x.arrow", "x.feather"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_columns_of_json_type_are_parsed(path: Path) -> None:
    texts = [json.dumps(MESSAGES), "not JSON", None]
    inside = pa.StructArray.from_arrays([pa.array(["[1]"], pa.json_()), pa.array(["[1]"])], names=["a", "b"])
    table = pa.table(
        {
            "whole": pa.array(texts, pa.json_()),
            "large": pa.array(texts, pa.json_(pa.large_string())),
            "inside": pa.ListArray.from_arrays(pa.array([0, 1, 1, 1], pa.int32()), inside, mask=pa.array([False, False, True])),
        }
    )
    first, second, third = _values(_write(path, table))
    assert first == {"whole": MESSAGES, "large": MESSAGES, "inside": [{"a": [1], "b": "[1]"}]}
    assert second == {"whole": "not JSON", "large": "not JSON", "inside": []}
    assert third == {"whole": None, "large": None, "inside": None}


def test_json_features_of_datasets_are_parsed(tmp_path: Path) -> None:
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "meta": datasets.Json(), "n": {"m": datasets.Json()}})
    rows: dict[str, list[Any]] = {"messages": [MESSAGES, []], "meta": [{"a": [1, "b"]}, 5], "n": [{"m": {"a": 1}}, {"m": "text"}]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "x.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    # As written by what knows the features of `datasets` and no extension types.
    stored = made.data.table
    plain = [pa.array(column.to_pylist(), _without_extensions(column.type)) for column in stored.columns]
    pq.write_table(pa.table(plain, names=stored.column_names).replace_schema_metadata(stored.schema.metadata), tmp_path / "plain.parquet")
    expected = [{name: values[index] for name, values in rows.items()} for index in range(2)]
    for location in ("x.parquet", "saved", "plain.parquet"):
        (file,) = find_files([str(tmp_path / location)], "train").files
        assert _values(file) == expected


def _without_extensions(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    if pa.types.is_struct(kind):
        return pa.struct({field.name: _without_extensions(field.type) for field in kind})
    return pa.list_(_without_extensions(kind.value_type)) if pa.types.is_list(kind) else kind


def test_values_that_json_has_no_word_for(path: Path) -> None:
    moment = datetime.datetime(2024, 2, 29, 12, 30, 1, 500)
    columns: dict[str, tuple[pa.Array, object]] = {
        "score": (pa.array([decimal.Decimal("-1.50")], pa.decimal128(6, 2)), -1.5),
        "count": (pa.array([decimal.Decimal(12)], pa.decimal128(6, 0)), 12),
        "day": (pa.array([moment.date()]), "2024-02-29"),
        "time": (pa.array([moment.time()]), "12:30:01.000500"),
        "at": (pa.array([moment], pa.timestamp("us")), "2024-02-29T12:30:01.000500"),
        "zone": (pa.array([moment], pa.timestamp("ms", "UTC")), "2024-02-29T12:30:01+00:00"),
        "nano": (pa.array([1_000_000_001], pa.timestamp("ns")), "1970-01-01T00:00:01.000000001"),
        "lasts": (pa.array([datetime.timedelta(seconds=90)]), 90.0),
        "large": (pa.array([["a"]], pa.large_list(pa.large_string())), ["a"]),
        "fixed": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
        "category": (pa.array(["a"]).dictionary_encode(), "a"),
        "map": (pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())), {"a": 1, "b": None}),
        "pairs": (pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())), [[1, "x"]]),
        "half": (pa.array(np.array([0.5], np.float16)), 0.5),
        "yes": (pa.array([True]), True),
        "image": (pa.array([{"bytes": b"\x89PNG", "path": None}]), {"bytes": {"unsupported": "bytes"}, "path": None}),
    }
    table = pa.table({name: array for name, (array, _) in columns.items()})
    assert _values(_write(path, table)) == [{name: value for name, (_, value) in columns.items()}]


def test_one_value_that_cannot_be_read_costs_one_row(path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")])
    file = _write(path, pa.table({"a": text, "b": pa.array([0, 0, 600_000_000_000], pa.timestamp("s"))}))
    rows = list(read_file(file))
    assert [(row.number, row.reason) for row in rows] == [(1, None), (2, BadRow.UNPARSABLE), (3, BadRow.UNPARSABLE)]


def test_a_file_is_split_and_its_rows_keep_their_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(path, pa.table({"a": [f"{number}" * 50 for number in range(100)]}), rows=7)
    monkeypatch.setattr(columnar, "BATCH_ROWS", 3)
    assert len(plan_units(file)) == 1
    monkeypatch.setattr(read, "UNIT_BYTES", 2000)
    units = plan_units(file)
    assert len(units) > 3
    rows = [row for unit in units for row in read_unit(unit)]
    assert [row.number for row in rows] == list(range(1, 101))
    assert [json.loads(row.raw)["a"] for row in rows] == [f"{number}" * 50 for number in range(100)]
    assert rows == list(read_file(file))
    assert sample_rows(file)[1] == 100


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_files_are_read_as_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 2000)
    table = pa.table({"a": ["x" * 100] * 200})
    for name, new in (("x.arrow", pa.ipc.new_stream), ("y.ipc", pa.ipc.new_file)):
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=10)
        (file,) = find_files([str(tmp_path / name)], "train").files
        assert len(plan_units(file)) == 1
        assert [row.number for row in read_file(file)] == list(range(1, 201))


def test_a_file_cut_off_anywhere_is_an_error(path: Path) -> None:
    content = Path(_write(path, pa.table({"a": ["x" * 10] * 9}), rows=3).uri).read_bytes()
    # At eight bytes an Arrow stream is cut off between two batches as well.
    for size in range(0, len(content), 8):
        path.write_bytes(content[:size])
        (file,) = find_files([str(path)], "train").files
        with pytest.raises(DataError, match=path.name):
            list(read_file(file))


def test_an_offset_that_points_outside_costs_its_rows_and_not_the_process(tmp_path: Path) -> None:
    offsets = np.array([0, 1, 2, 3], np.int32)
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"abc")])
    file = _write(tmp_path / "x.arrow", pa.table({"a": column}))
    content = Path(file.uri).read_bytes()
    assert content.count(offsets.tobytes()) == 1
    Path(file.uri).write_bytes(content.replace(offsets.tobytes(), np.array([0, 1, 2**30, 3], np.int32).tobytes()))
    assert [row.reason for row in read_file(file)] == [None, BadRow.UNPARSABLE, BadRow.UNPARSABLE]


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_changed_cost_rows_or_are_an_error_of_the_file(path: Path, seed: int) -> None:
    table = pa.table({"a": [f"abc{i}" for i in range(30)], "b": [[{"r": "x", "n": i}] * (i % 3) for i in range(30)]})
    content = Path(_write(path, table, rows=7).uri).read_bytes()
    random_ = random.Random(seed)
    outcomes = Counter[str]()
    for _ in range(60):
        damaged = bytearray(content)
        damaged[random_.randrange(len(content))] = random_.choice([0, 255, random_.randrange(256)])
        path.write_bytes(damaged)
        try:
            outcomes.update(row.reason or "row" for row in _rows_of(path))
        except DataError as exc:
            outcomes[f"error {path.name in str(exc)}"] += 1
    assert set(outcomes) <= {"row", BadRow.UNPARSABLE, "error True"}
    assert outcomes["error True"]


def _rows_of(path: Path) -> list[RawRow]:
    (file,) = find_files([str(path)], "train").files
    return [row for unit in plan_units(file) for row in read_unit(unit)]


def test_a_column_that_stands_twice_is_an_error(path: Path) -> None:
    file = _write(path, pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]))
    with pytest.raises(DataError, match="the column a stands twice"):
        list(read_file(file))


def test_no_rows(path: Path) -> None:
    file = _write(path, pa.table({"a": pa.array([], pa.string())}))
    assert list(read_file(file)) == []
    assert _values(file) == []
