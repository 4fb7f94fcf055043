"""Rows of files as items, and results as rows."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.models import make_export

from rayward.data.formats.table import SourceOptions
from rayward.data.record import BadRow
from rayward.data.sources.find import find_files
from rayward.data.sources.read import plan_units, read_unit
from rayward.data.sources.rows import RawRow
from rayward.scoring.rows import (
    FileRow,
    FormatAdapter,
    RowRules,
    dump_line,
    line_of,
    read_row,
    result_schema,
    score_chunks,
    score_given,
    table_of,
)
from rayward.scoring.scorer import Scorer
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem

FILE = "/data/items.jsonl"
GOOD: dict[str, Any] = {"prompt": "Hi", "completions": ["Hello", "Hey"]}
PLAIN = RowRules()
ITEM = ScoreItem(({"role": "user", "content": "Hi"},), ("Hello", "Hey"))


def read(value: object, rules: RowRules = PLAIN) -> FileRow:
    return read_row(RawRow(3, value if isinstance(value, str) else json.dumps(value)), FILE, rules)


def error(value: object, rules: RowRules = PLAIN) -> str:
    found = read(value, rules).given.item
    assert isinstance(found, ItemError)
    return f"{found.code}: {found.message}"


def test_columns_that_are_no_part_of_an_item_are_named() -> None:
    row = read({**GOOD, "id": 4, "source": "web", "ranks": [1, 2], "empty": None, "none": [], "nan": math.nan})
    assert (row.given.item, row.given.echo, row.number) == (ITEM, {"id": 4}, 3)
    assert row.unused == ("source", "ranks", "nan")
    assert row.columns is None


@pytest.mark.parametrize("name", ["system", "images", "instruction", "question", "history", "conversations", "input"])
def test_a_column_that_would_change_the_text_is_an_error_unless_it_is_ignored_or_empty(name: str) -> None:
    row = {**GOOD, name: "You are a pirate.", "id": "a"}
    assert f"invalid_item: unknown_field: nothing reads the column {name!r}" in error(row)
    assert read(row).given.echo == {"id": "a"}
    assert read(row, RowRules(ignore=(name[:3] + "*",))).given.item == ITEM
    assert read({**row, name: ""}).given.item == ITEM


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("{broken", "unparsable"),
        ('{"prompt": "a", "completions": ["b"]}, {"prompt": "c", "completions": ["d"]}', "unparsable"),
        ("[1]", "unparsable"),
        ("[" * 100_000, "unparsable"),
        ('{"prompt": "a\\ud800", "completions": ["b"]}', "invalid_item: lone_surrogate"),
        ('{"prompt": "a", "completions": [null]}', "invalid_item: wrong_type"),
        ('{"prompt": NaN, "completions": ["b"]}', "invalid_item: wrong_type"),
        ('{"completions": ["b"]}', "invalid_item: missing_field"),
    ],
)
def test_what_is_no_item_has_an_error_of_its_own(raw: str, says: str) -> None:
    assert error(raw).startswith(says)
    assert error(raw, RowRules(keep=True)).startswith(says)


def test_what_the_reader_found_stays() -> None:
    found = read_row(RawRow(9, "", BadRow.UNPARSABLE, "the line is not UTF-8"), FILE, RowRules()).given.item
    assert found == ItemError("unparsable", "the line is not UTF-8")


def test_what_a_table_writes_for_nothing_is_nothing(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi", "name": None}]
    rows: list[dict[str, Any]] = [
        {"id": 1.0, "prompt": turns, "completion": [{"role": "assistant", "content": "Hello", "name": None}], "temperature": None},
        {"id": math.nan, "prompt": turns, "completion": [{"role": "assistant", "content": "Hey", "name": "x"}], "temperature": 0.5},
    ]
    pq.write_table(
        pa.Table.from_pylist([{**row, "n_critiques": number} for row, number in zip(rows, (math.nan, 2.0), strict=True)]),
        tmp_path / "a.parquet",
    )
    ((file,), _) = find_files([str(tmp_path)], "validation")
    first, second = (read_row(raw, file.uri, RowRules()) for unit in plan_units(file) for raw in read_unit(unit))
    assert first.given.item == ScoreItem(ITEM.prompt, ("Hello",))
    assert first.given.echo == {"id": 1}
    assert second.given.echo == {}
    assert isinstance(second.given.item, ScoreItem)
    assert second.given.item.completions == (({"role": "assistant", "content": "Hey", "name": "x"},),)


def test_turns_lists_and_tools_that_a_table_keeps_as_text_are_read() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completions": [[call], "Hello"], "tools": tools}
    texts = {"prompt": json.dumps(row["prompt"]), "completions": json.dumps([json.dumps([call]), "Hello"]), "tools": json.dumps(tools)}
    for given in (row, texts):
        found = read({**given, "chat_template_kwargs": None}).given.item
        assert isinstance(found, ScoreItem), found
        assert found.prompt == ITEM.prompt
        assert found.completions[1] == "Hello"
        assert "tool_calls" in found.completions[0][0]
        assert found.tools == tuple(tools)
    assert error({"prompt": "Hi", "completion": '[{"role": broken]'}).startswith("wrong_type")
    assert read({"prompt": "[1, 2]", "completion": "{x}"}).given.item == ScoreItem(({"role": "user", "content": "[1, 2]"},), ("{x}",))


def test_what_a_template_is_given_may_be_kept_as_json() -> None:
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    given = {"tools": json.dumps(tools), "chat_template_kwargs": '{"enable_thinking": false}'}
    found = read({**GOOD, **given}).given.item
    assert found == ScoreItem(ITEM.prompt, ITEM.completions, tools=tuple(tools), chat_template_kwargs={"enable_thinking": False})
    assert read({**GOOD, "tools": "", "chat_template_kwargs": None}).given.item == ITEM
    assert error({**GOOD, "tools": "[broken"}).startswith("invalid_item: wrong_type")


def test_a_row_asks_for_itself() -> None:
    rules = RowRules(asked=Asked(weights="w", temperature=0.5))
    found = read({**GOOD, "n_critiques": 2}, rules).given.item
    assert isinstance(found, ScoreItem)
    assert found.asked == Asked("w", "raw", 2, 0.5)


def test_completions_of_preference_data_are_scored_whatever_training_would_say_of_them() -> None:
    rules = RowRules(Asked(weights="w"), adapters={FILE: FormatAdapter("trl", SourceOptions("s", "prompt", "chosen", "rejected"))})
    found = read({"id": "p", "prompt": "Hi", "chosen": "same", "rejected": "same"}, rules)
    assert found.given.item == ScoreItem(({"role": "user", "content": "Hi"},), ("same", "same"), Asked(weights="w"))
    assert found.given.echo == {"id": "p"}
    assert error({"prompt": "Hi", "chosen": "a"}, rules).startswith("missing_field")
    assert error({"prompt": "Hi", "chosen": "a", "rejected": " "}, rules).startswith("empty_completion")


# ---- results ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    directory = make_export(tmp_path_factory.mktemp("models") / "export", outputs=("a", "b.c"), reward_weights=(1.0, -1.0))
    return Scorer.load(directory, device="cpu")


ROWS = [
    {**GOOD, "id": 7, "source": "ü", "rewards": [1], "input_rewards": 2},
    {**GOOD, "id": "x", "weight": math.nan},
    {"prompt": "", "completions": ["a"], "id": None},
    {"prompt": "Hi", "completions": ["word " * 300]},
    {**GOOD, "junk": "\ud800"},
]


def test_results_stand_in_lines_and_in_tables_alike(scorer: Scorer) -> None:
    rows = [read(row, RowRules(keep=True, ignore=("input_rewards",))) for row in ROWS]
    results = score_given(scorer, [row.given for row in rows])
    lines = [json.loads(line_of(row, result, FILE, scorer)) for row, result in zip(rows, results, strict=True)]
    table = table_of(rows, results, FILE, scorer, keep=True)
    assert table.schema == result_schema(("a", "b.c"), keep=True)
    (alone,) = scorer.score([ITEM])
    for line, cells in zip(lines[:2], table.to_pylist()[:2], strict=True):
        assert line["rewards"] == cells["rewards"] == pytest.approx(alone.rewards)
        assert line["outputs"] == cells["outputs"]
        assert list(line["outputs"][0]) == ["a", "b.c"]
        assert (line["file"], line["row"], line["version"]) == (cells["file"], cells["row"], cells["version"]) == (FILE, 3, scorer.version)
        assert "error" not in line
        assert cells["error"] is None
    assert [line.get("id", "none") for line in lines] == [7, "x", None, "none", "none"]
    assert table["id"].to_pylist() == ["7", "x", None, None, None]
    assert [line.get("error", {}).get("code") for line in lines] == [None, None, "invalid_item", "too_long", None]
    assert [cells["error"] and cells["error"]["code"] for cells in table.to_pylist()] == [None, None, "invalid_item", "too_long", None]
    # Nothing of the input is lost, not even under a name that a result has.
    assert (lines[0]["input_input_rewards"], lines[0]["input_rewards"], lines[0]["source"]) == ([1], 2, "ü")
    assert lines[1]["weight"] is None
    assert json.loads(table["input_json"][0].as_py()) == ROWS[0]
    assert json.loads(table["input_json"][4].as_py())["junk"] == "\ud800"


def test_parts_have_one_schema_whatever_they_hold(scorer: Scorer) -> None:
    failed = [read("{broken")]
    table = table_of(failed, [ItemResult(error=ItemError("unparsable", "\ud800"))], FILE, scorer, keep=False)
    assert table.schema == result_schema(("a", "b.c"), keep=False)
    assert table["error"].to_pylist() == [{"code": "unparsable", "message": "\\ud800", "retryable": False}]


def test_the_next_chunk_is_tokenized_while_one_goes_through_the_model(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [read({**GOOD, "completions": ["a" * (i % 5 + 1)]} if i % 7 else {"prompt": i}) for i in range(40)]
    chunks = [[row.given for row in rows[start : start + 10]] for start in range(0, 40, 10)]
    expected = [score_given(scorer, chunk) for chunk in chunks]
    begun = [threading.Event() for _ in chunks]
    encode, compute, order = Scorer.encode, Scorer.compute, iter(range(4))
    computed: list[bool] = []

    def encoding(self: Scorer, items: Any) -> Any:
        begun[next(order)].set()
        return encode(self, items)

    def computing(self: Scorer, given: Any) -> Any:
        number = len(computed)
        computed.append(number == 3 or begun[number + 1].wait(20))
        return compute(self, given)

    monkeypatch.setattr(Scorer, "encode", encoding)
    monkeypatch.setattr(Scorer, "compute", computing)
    found = list(score_chunks(scorer, iter(chunks)))
    assert computed == [True] * 4
    for given, wanted in zip(found, expected, strict=True):
        assert [result.error for result in given] == [result.error for result in wanted]
        for one, other in zip(given, wanted, strict=True):
            assert one.rewards == (None if other.rewards is None else pytest.approx(other.rewards, abs=1e-6))
    assert list(score_chunks(scorer, iter([]))) == []


def test_every_json_value_can_be_written_again() -> None:
    assert dump_line({"a": math.inf, "b": ["\ud800", {"c": math.nan}]}) == b'{"a": null, "b": ["\\ud800", {"c": null}]}\n'
    deep = json.loads("[" * 900 + "]" * 900)
    row = read({**GOOD, "deep": deep}, RowRules(keep=True))
    assert isinstance(row.given.item, ItemError) or dump_line(row.columns or {})
