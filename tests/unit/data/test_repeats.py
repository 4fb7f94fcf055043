"""Sources that are used more than once, in part, or in shares; and the columns that nothing reads, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.config.sources import SourceConfig
from rayward.data.prepare.inputs import plan_reads
from rayward.data.prepare.leftover import Leftovers, unused_columns
from rayward.data.prepare.repeats import repeated, repeats_of
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation, adapt, read
from rayward.data.prepared import UnusedColumn
from rayward.data.sources.find import find_files
from rayward.errors import DataError


def rows(number: int, *, file: str = "f", split: str | None = "train") -> list[dict[str, Any]]:
    return [{"file": file, "split": split, "order": f"{split} {index:04d} {file}"} for index in range(number)]


def table(*groups: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([("file", pa.string()), ("split", pa.string()), ("order", pa.string())])
    return pa.Table.from_pylist([row for group in groups for row in group], schema)


def source(**settings: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": settings.pop("path", "f"), **settings})


def test_training_rows_are_repeated_each_copy_at_its_own_place() -> None:
    found = repeated(table(rows(200), rows(10, split="validation"), rows(5, split=None), rows(7, file="g")), {"f": 2.5})
    by_file = {
        file: sum(1 for f, s in zip(found["file"].to_pylist(), found["split"].to_pylist(), strict=True) if f == file and s == "train")
        for file in ("f", "g")
    }
    assert by_file["g"] == 7
    assert 480 <= by_file["f"] <= 520
    assert found["split"].to_pylist().count("validation") == 10
    assert None not in found["split"].to_pylist()
    orders = found["order"].to_pylist()
    assert len(set(orders)) == len(orders)
    assert all(order.startswith("train ") for order, split in zip(orders, found["split"].to_pylist(), strict=True) if split == "train")


def test_how_rows_are_cut_into_blocks_does_not_matter() -> None:
    whole = repeated(table(rows(100)), {"f": 1.3})["order"].to_pylist()
    parts = [repeated(table(rows(100)).slice(start, 7), {"f": 1.3})["order"].to_pylist() for start in range(0, 100, 7)]
    assert sorted(order for part in parts for order in part) == sorted(whole)


def test_shares_repeat_what_is_used_too_rarely() -> None:
    sources = {
        "a1": source(path="a", share=0.5),
        "a2": source(path="a", share=0.5),
        "b": source(path="b", share=0.3),
        "c": source(path="c", share=0.2),
    }
    rows_of = {"a1": 60, "a2": 40, "b": 300, "c": 10}
    times = {**dict.fromkeys(sources, 1.0), **repeats_of(sources, rows_of)}
    used = {name: sum(rows_of[uri] * times[uri] for uri in sources if uri.startswith(name)) for name in "abc"}
    total = sum(used.values())
    assert {name: round(count / total, 6) for name, count in used.items()} == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert min(times.values()) == 1.0  # nothing is left out
    assert repeats_of({"f": source(repeat=3), "g": source(path="g"), "v": source(path="v", role="validation")}, {}) == {"f": 3.0}


def test_a_limit_takes_the_first_rows_of_the_files_in_order(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 4), ("c", 2)):
        lines = [json.dumps({"prompt": f"{name}{index}", "chosen": "x", "rejected": "y"}) for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines))
    config = parse_config({"sources": [{"path": str(tmp_path), "limit": 5}]}, DataConfig)
    files = find_files([str(tmp_path)], "train")[0]
    run = Config().model_copy(update={"data": config})
    _, units = plan_reads(files, run, dict.fromkeys((file.uri for file in files), config.sources[0]))
    taken = [
        json.loads(raw)["prompt"]
        for unit in units
        for part in read(unit)
        for raw in part.filter(pa.compute.equal(part["kind"], "row"))["raw"].to_pylist()
    ]
    assert taken == ["a0", "a1", "a2", "b0", "b1"]


def test_columns_that_nothing_reads_are_counted_over_all_rows() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    given = [
        {**pair, "magnitude": 1, "note": ""},
        {**pair, "magnitude": "big", "chosen_feedback": "good"},
        {**pair, "magnitude": 2},
        {**pair},
    ]
    from rayward.data.formats.table import SourceOptions

    counts: dict[str, int] = {}
    for block in (given[:2], given[2:]):
        raw = [{"kind": "row", "role": "train", "file": "f", "number": n, "raw": json.dumps(row)} for n, row in enumerate(block)]
        leftovers = Leftovers()
        adapt(pa.Table.from_pylist(raw, READ_SCHEMA), Adaptation({"f": ("trl", SourceOptions("set", "prompt"))}, "quarantine"), leftovers)
        for key, count in json.loads(leftovers.dump() or "{}").items():
            counts[key] = counts.get(key, 0) + count
    found = unused_columns(counts, {"set": 4}, {"set": {"chosen_feedback": "data.critique_lead_in"}})
    assert found == (
        UnusedColumn(source="set", column="magnitude", type="number or text", num_rows=3, share=0.75),
        UnusedColumn(source="set", column="chosen_feedback", type="text", num_rows=1, share=0.25, setting="data.critique_lead_in"),
    )
    assert str(found[0]) == "magnitude (number or text, 75 % of rows)"
    assert "data.critique_lead_in would have it read" in str(found[1])


def test_a_file_of_two_sources_is_an_error(tmp_path: Path) -> None:
    from rayward.data.prepare.inputs import inspect_inputs

    (tmp_path / "a.jsonl").write_text("{}")
    named = {"path": str(tmp_path / "a.jsonl")}
    run = Config()
    for others, message in (
        ([named, named], "named by two"),
        ([named, {**named, "role": "validation"}], "in data.train and in data.validation"),
    ):
        config = parse_config({"sources": others}, DataConfig)
        with pytest.raises(DataError, match=message):
            inspect_inputs(run.model_copy(update={"data": config}))
