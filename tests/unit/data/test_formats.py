from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayward.config.data import DataConfig
from rayward.data.formats.table import FORMATS, SourceOptions, choose_format
from rayward.data.record import BadRow, RowRejected, validate
from rayward.data.sources.find import SourceFile, find_files
from rayward.data.sources.fingerprint import content_hash
from rayward.data.sources.hub import HubName, parse_hub_name
from rayward.data.sources.kinds import source_name
from rayward.data.sources.read import ReadUnit, plan_units, read_unit, sample_rows
from rayward.errors import DataError, DataFormatError

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
OTHER = {"role": "user", "content": "3+3?"}
FIVE = {"role": "assistant", "content": "5"}
EXPLICIT = SourceOptions("set", prompt_key="prompt")
IMPLICIT = SourceOptions("set")

GOOD: dict[str, tuple[str, SourceOptions, dict[str, Any]]] = {
    "trl explicit text": ("trl", EXPLICIT, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
    "trl explicit messages": ("trl", EXPLICIT, {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}),
    "trl prompt repeated": ("trl", EXPLICIT, {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
    "trl implicit text": ("trl", IMPLICIT, {"chosen": "2+2? 4", "rejected": "2+2? 5"}),
    "trl implicit messages": ("trl", IMPLICIT, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
    "openrlhf": ("openrlhf", SourceOptions("set", "q", "good", "bad"), {"q": "2+2?", "good": "4", "bad": "5"}),
    "hh_rlhf": (
        "hh_rlhf",
        IMPLICIT,
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    ),
    "ultrafeedback": ("ultrafeedback_binarized", IMPLICIT, {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
    "helpsteer2": (
        "helpsteer2_preference",
        IMPLICIT,
        {"prompt": "2+2?", "response_1": "4", "response_2": "5", "preference_strength": -2},
    ),
    "helpsteer3": (
        "helpsteer3_preference",
        IMPLICIT,
        {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -1},
    ),
    "ranking": ("ranking", IMPLICIT, {"prompt": "2+2?", "completions": ["4", [FIVE]], "ranks": [1, 2]}),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_format_yields_the_same_comparison(case: str) -> None:
    name, options, row = GOOD[case]
    comparison = FORMATS[name].adapt({**row, "id": 7, "source": "mine", "weight": 0.5}, options)
    validate(comparison, ties="quarantine")
    assert comparison.prompt == (USER,)
    assert comparison.completions == ("4", "5")
    assert comparison.ranks is not None
    assert comparison.ranks[0] < comparison.ranks[1]
    assert (comparison.id, comparison.source, comparison.weight) == ("7", "mine", 0.5)


@pytest.mark.parametrize("case", [case for case in GOOD if case != "openrlhf"])
def test_detection_finds_the_format_that_the_row_was_written_in(case: str) -> None:
    name, options, row = GOOD[case]
    assert choose_format([row], DataConfig(), where="f", source="set")[0] == name
    assert choose_format([row], DataConfig(), where="f", source="set")[1].prompt_key == options.prompt_key


def test_detection_of_renamed_columns_needs_the_names() -> None:
    row = GOOD["openrlhf"][2]
    with pytest.raises(DataFormatError, match=r"(?s)fits no known format.*q.*candidates.*helpsteer2_preference.*data\.format="):
        choose_format([row], DataConfig(), where="f", source="set")
    named = DataConfig(prompt_key="q", chosen_key="good", rejected_key="bad")
    assert choose_format([row], named, where="f", source="set") == ("openrlhf", GOOD["openrlhf"][1])


def test_columns_of_two_formats_are_ambiguous_until_one_is_chosen() -> None:
    row = GOOD["trl explicit text"][2] | GOOD["ranking"][2]
    with pytest.raises(DataFormatError, match=r"(?s)fits 2 formats.*trl:.*ranking:"):
        choose_format([row], DataConfig(), where="f", source="set")
    assert choose_format([row], DataConfig(format="ranking"), where="f", source="set")[0] == "ranking"


def test_one_odd_row_does_not_make_a_file_ambiguous() -> None:
    rows = [GOOD["trl explicit text"][2]] * 9 + [GOOD["helpsteer2"][2]]
    assert choose_format(rows, DataConfig(), where="f", source="set")[0] == "trl"


def test_a_row_without_prompt_in_a_file_with_prompts_is_not_read_as_implicit() -> None:
    rows = [{"chosen": "yes it is", "rejected": "yes no"}, GOOD["trl explicit text"][2]]
    name, options = choose_format(rows, DataConfig(), where="f", source="set")
    with pytest.raises(RowRejected, match="missing"):
        FORMATS[name].adapt(rows[0], options)


BAD: list[tuple[str, SourceOptions, dict[str, Any], BadRow]] = [
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b"}, BadRow.MISSING_FIELD),
    ("trl", EXPLICIT, {"prompt": None, "chosen": "b", "rejected": "c"}, BadRow.MISSING_FIELD),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": 3, "rejected": "c"}, BadRow.WRONG_TYPE),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, BadRow.WRONG_TYPE),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, BadRow.WRONG_TYPE),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, BadRow.NON_FINITE_MARGIN),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39}, BadRow.NON_FINITE_MARGIN),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}, BadRow.WRONG_TYPE),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b", "rejected": "c", "id": "\ud800"}, BadRow.BAD_TEXT),
    ("trl", EXPLICIT, {"prompt": " ", "chosen": "b", "rejected": "c"}, BadRow.EMPTY_PROMPT),
    ("trl", EXPLICIT, {"prompt": [], "chosen": "b", "rejected": "c"}, BadRow.EMPTY_PROMPT),
    ("trl", EXPLICIT, {"prompt": [USER, FOUR], "chosen": "b", "rejected": "c"}, BadRow.WRONG_TYPE),
    ("trl", EXPLICIT, {"prompt": [{"role": "wizard", "content": "a"}], "chosen": "b", "rejected": "c"}, BadRow.UNKNOWN_ROLE),
    ("trl", EXPLICIT, {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, BadRow.MISSING_FIELD),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "", "rejected": "c"}, BadRow.EMPTY_COMPLETION),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": [], "rejected": [FIVE]}, BadRow.EMPTY_COMPLETION),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b\x00", "rejected": "c"}, BadRow.BAD_TEXT),
    ("trl", EXPLICIT, {"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, BadRow.BAD_TEXT),
    ("trl", EXPLICIT, {"prompt": [USER], "chosen": [OTHER, FIVE, USER, FOUR], "rejected": [FIVE]}, BadRow.NO_SHARED_PROMPT),
    ("trl", IMPLICIT, {"chosen": "cat", "rejected": "car"}, BadRow.NO_SHARED_PROMPT),
    ("trl", IMPLICIT, {"chosen": "same words", "rejected": "same words"}, BadRow.IDENTICAL_COMPLETIONS),
    ("trl", IMPLICIT, {"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, BadRow.IDENTICAL_COMPLETIONS),
    ("trl", IMPLICIT, {"chosen": [USER, FOUR, USER, FOUR], "rejected": [OTHER, FIVE, USER, FOUR]}, BadRow.NO_SHARED_PROMPT),
    ("trl", IMPLICIT, {"chosen": [FOUR], "rejected": [FIVE]}, BadRow.EMPTY_PROMPT),
    ("hh_rlhf", IMPLICIT, {"chosen": "hello", "rejected": "\n\nHuman: a\n\nAssistant: b"}, BadRow.UNPARSABLE),
    ("hh_rlhf", IMPLICIT, {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"}, BadRow.EMPTY_COMPLETION),
    ("ultrafeedback_binarized", IMPLICIT, GOOD["ultrafeedback"][2] | {"score_chosen": 3, "score_rejected": 3}, BadRow.TIE),
    ("ultrafeedback_binarized", IMPLICIT, GOOD["ultrafeedback"][2] | {"score_chosen": 2, "score_rejected": 3}, BadRow.BAD_RANKING),
    ("helpsteer2_preference", IMPLICIT, GOOD["helpsteer2"][2] | {"preference_strength": 0}, BadRow.TIE),
    ("helpsteer2_preference", IMPLICIT, GOOD["helpsteer2"][2] | {"preference_strength": None}, BadRow.MISSING_FIELD),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, BadRow.BAD_RANKING),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b", "c"], "ranks": [1, math.nan]}, BadRow.BAD_RANKING),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b"], "ranks": [1]}, BadRow.BAD_RANKING),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": [], "ranks": []}, BadRow.EMPTY_COMPLETION),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b", "c"]}, BadRow.MISSING_FIELD),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b", "b"], "ranks": [1, 2]}, BadRow.IDENTICAL_COMPLETIONS),
    ("ranking", IMPLICIT, {"prompt": "a", "completions": ["b", "c"], "attributes": [[1, 2], [1, 2]]}, BadRow.MISSING_FIELD),
]


@pytest.mark.parametrize(("name", "options", "row", "reason"), BAD)
def test_a_bad_row_is_rejected_with_its_reason(name: str, options: SourceOptions, row: dict[str, Any], reason: BadRow) -> None:
    with pytest.raises(RowRejected) as caught:
        validate(FORMATS[name].adapt(row, options), ties="quarantine")
    assert caught.value.reason is reason


@pytest.mark.parametrize(("strength", "ranks", "margin"), [(-3, (0.0, 1.0), 3.0), (1, (1.0, 0.0), 1.0), (0, (0.0, 0.0), 0.0)])
def test_helpsteer_strength_gives_order_and_strength(strength: int, ranks: tuple[float, float], margin: float) -> None:
    comparison = FORMATS["helpsteer2_preference"].adapt(GOOD["helpsteer2"][2] | {"preference_strength": strength}, IMPLICIT)
    assert (comparison.ranks, comparison.strength, comparison.margin) == (ranks, margin, None)


def test_ultrafeedback_strength_is_the_score_gap() -> None:
    row = GOOD["ultrafeedback"][2] | {"score_chosen": 8.5, "score_rejected": 6}
    assert FORMATS["ultrafeedback_binarized"].adapt(row, IMPLICIT).strength == 2.5
    assert FORMATS["ultrafeedback_binarized"].adapt(GOOD["ultrafeedback"][2], IMPLICIT).strength is None


def test_hh_transcript_keeps_the_dialogue_as_turns() -> None:
    before = "\n\nHuman: hi\n\nAssistant: hello\nthere\n\nHuman: 2+2?"
    row = {"chosen": f"{before}\n\nAssistant: 4", "rejected": f"{before}\n\nAssistant: 5"}
    prompt = FORMATS["hh_rlhf"].adapt(row, IMPLICIT).prompt
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
    assert prompt[1]["content"] == "hello\nthere"


def test_missing_attributes_become_nan() -> None:
    row = {"prompt": "a", "completions": ["b", "c"], "attributes": [[1, None], [2, 3]]}
    attributes = FORMATS["ranking"].adapt(row, SourceOptions("set", attributes=("x", "y"))).attributes
    assert attributes is not None
    assert attributes[1] == (2.0, 3.0)
    assert math.isnan(attributes[0][1])


def test_an_id_is_made_from_the_content_whatever_the_order_of_the_completions() -> None:
    row = GOOD["helpsteer2"][2]
    swapped = row | {"response_1": "5", "response_2": "4", "preference_strength": 2}
    adapt = FORMATS["helpsteer2_preference"].adapt
    assert adapt(row, IMPLICIT).id == adapt(swapped, SourceOptions("other")).id
    assert adapt(row, IMPLICIT).id != adapt(row | {"preference_strength": 2}, IMPLICIT).id


# ---- files ------------------------------------------------------------------------------------------------------


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _file(path: Path, text: bytes | str) -> SourceFile:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_files([str(path)], "train")[0][0]


def test_globs_and_directories_find_data_files_once_and_name_what_they_pass_over(tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/b.json.gz", "deep/c.parquet", "deep/README.md", "deep/.hidden.jsonl", "deep/_tmp/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")

    def names(*locations: str) -> list[str]:
        return [str(Path(file.uri).relative_to(tmp_path)) for file in find_files([str(tmp_path / p) for p in locations], "train")[0]]

    assert names(".", "a.jsonl") == ["a.jsonl", "deep/b.json.gz", "deep/c.parquet"]
    assert names("*.jsonl") == ["a.jsonl"]
    assert names("**/*.json*") == ["a.jsonl", "deep/b.json.gz"]
    assert names("deep/[bc].*") == ["deep/b.json.gz", "deep/c.parquet"]
    assert [str(Path(other.uri).relative_to(tmp_path)) for other in find_files([str(tmp_path)], "train").passed_over] == [
        "deep/.hidden.jsonl",
        "deep/README.md",
        "deep/_tmp",
    ]
    assert [file.uri for file in find_files([f"file://{tmp_path}/a.jsonl"], "train")[0]] == [f"file://{tmp_path}/a.jsonl"]


@pytest.mark.parametrize("location", ["nowhere.jsonl", "nothing-*.jsonl", "empty", "notes.txt", "nowhere/*.jsonl"])
def test_a_location_without_data_is_an_error_that_names_it(tmp_path: Path, location: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / location)], "train")
    assert location in str(caught.value)


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(DataError, match="gopher://x/y"):
        find_files(["gopher://x/y"], "train")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/d/pairs.jsonl.gz", "pairs"), ("/d/my-set/train-00000-of-00003.parquet", "my-set"), ("/d/set/part-00001.parquet", "set")],
)
def test_source_name_is_that_of_the_data_set(path: str, name: str) -> None:
    assert source_name(path) == name


def test_hub_names() -> None:
    assert parse_hub_name("hf:a/b", "train") == HubName("a/b", None, "train")
    assert parse_hub_name("hf:a/b", "validation") == HubName("a/b", None, "validation")
    assert parse_hub_name("hf:a/b/c@test[:5]", "train") == HubName("a/b", "c", "test[:5]")
    with pytest.raises(DataError, match="hf:b"):
        parse_hub_name("hf:b", "train")


def test_json_lines_keep_line_numbers_and_bad_bytes(tmp_path: Path) -> None:
    file = _file(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xff"}\n{broken\n{"a": 2}')
    rows = list(read_unit(ReadUnit(file)))
    assert [row.number for row in rows] == [1, 3, 4, 5]
    assert [row.reason for row in rows] == [None, BadRow.UNPARSABLE, None, None]
    assert json.loads(rows[0].raw) == {"a": 1}
    assert rows[2].raw == "{broken"


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_every_kind_of_file_reads_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{"a": "é", "b": [1, 2]}, {"a": "z", "b": [3]}]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    else:
        text = json.dumps(rows, indent=1) if ".jsonl" not in name else _lines(*rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    file = find_files([str(path)], "train")[0][0]
    found = [raw for unit in plan_units(file) for raw in read_unit(unit)]
    assert [json.loads(raw.raw) for raw in found] == rows
    assert [raw.number for raw in found] == [1, 2]
    assert sample_rows(file) == (rows, 2)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "y.json.gz", "x.parquet", "x.json"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    rows = [{"a": str(i) * 50} for i in range(200)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        content = (tmp_path / name).read_bytes()
    elif name.endswith(".gz"):
        content = gzip.compress(_lines(*rows).encode())
    else:
        content = json.dumps(rows).encode()
    file = _file(tmp_path / name, content[: len(content) // 2])
    with pytest.raises(DataError, match=name):
        list(row for unit in plan_units(file) for row in read_unit(unit))


def test_one_unreadable_parquet_value_costs_one_row(tmp_path: Path) -> None:
    values = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"a": values}), tmp_path / "x.parquet")
    rows = list(read_unit(plan_units(find_files([str(tmp_path / "x.parquet")], "train")[0][0])[0]))
    assert [row.reason for row in rows] == [None, BadRow.UNPARSABLE, None]


def test_content_hash_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    first, same, other = (_file(tmp_path / name, text) for name, text in [("a.jsonl", "x"), ("b.jsonl", "x"), ("c.jsonl", "y")])
    assert content_hash(first) == content_hash(same) != content_hash(other)
