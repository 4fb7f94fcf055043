"""No column is left out in silence: what is read, what is named, what is refused, and detection by trial."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from rayward.config.data import DataConfig
from rayward.data.formats.columns import changes_meaning, described, is_metadata, present
from rayward.data.formats.table import FORMATS, SourceOptions, adapt, choose_format, columns_of
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.rows import adapt as adapt_rows
from rayward.data.record import RowRejected
from rayward.errors import DataFormatError

PAIR: dict[str, Any] = {"prompt": "Name a prime", "chosen": "Seven", "rejected": "Eight"}
USER = {"role": "user", "content": "Name a prime"}
SEVEN = {"role": "assistant", "content": "Seven"}
EIGHT = {"role": "assistant", "content": "Eight"}

MATTERS = """
sys preamble rejected_2 rejected2 Chosen-1 system_message img_path is_chosen_better helpfulness_score
instruction input question query history conversations messages context system system_prompt systemPrompt tools images
image_url video audio_path score_chosen chosen_score chosen-rating scoreChosen overall_score label labels is_tie
human_preference ratings rating1 Score chat_template_kwargs response_3 passages rank avg_rating grade votes margin
"""
HARMLESS = """
chosen_length num_votes rejected_model confidence
magnitude id prompt_id conversation_id chosen_model response_model question_type num_turns input_tokens language
timestamp dataset underscore generating topic annotator gold title
"""


def chosen(*rows: dict[str, Any], **settings: Any) -> str:
    return choose_format(list(rows), DataConfig(**settings), where="f.jsonl", source="set")[0]


@pytest.mark.parametrize(
    "name",
    MATTERS.split(),
)
def test_names_of_text_and_judgement_matter_in_any_spelling(name: str) -> None:
    assert changes_meaning(name)


@pytest.mark.parametrize(
    "name",
    HARMLESS.split(),
)
def test_other_names_do_not(name: str) -> None:
    assert not changes_meaning(name)


def test_metadata_is_told_by_the_last_word() -> None:
    assert is_metadata("prompt_id")
    assert is_metadata("num_responses")
    assert not is_metadata("topic")
    assert not is_metadata("image_id")


@pytest.mark.parametrize("value", [None, "", "  ", [], {}, [None, ""], {"a": None}])
def test_null_and_empty_are_no_use(value: object) -> None:
    assert not present(value)
    assert chosen(PAIR | {"images": value}) == "trl"


@pytest.mark.parametrize(
    "extra",
    [
        {"images": ["a.png"]},
        {"input": "hello"},
        {"overall-rating": 4.0},
        {"history": [["a", "b"]]},
        {"label": 0},
        {"query": "q"},
    ],
)
def test_an_unread_column_that_would_change_the_rows_is_an_error_until_it_is_ignored(extra: dict[str, Any]) -> None:
    rows = [PAIR, PAIR | extra]
    with pytest.raises(DataFormatError, match=rf"(?s)f\.jsonl: format trl does not read {next(iter(extra))} .*50%.*data\.ignore"):
        chosen(*rows)
    assert chosen(*rows, ignore=tuple(extra)) == "trl"
    assert chosen(*rows, ignore=("*",)) == "trl"


@pytest.mark.parametrize("column", ["task", "topic", "Frage"])
@pytest.mark.parametrize("value", ["What is 0*12?", [{"role": "user", "content": "What is 0*12?"}], ["What is 0*12?"], {"text": "0*12?"}])
def test_a_text_prompt_is_not_implied_beside_another_text_column(column: str, value: object) -> None:
    row = {column: value, "chosen": "Step 1: multiply. 0", "rejected": "Step 1: add. 12"}
    with pytest.raises(DataFormatError, match=rf"(?s)fits no known format.*trl: .*another text column: {column}.*describe"):
        chosen(row)
    assert chosen({"chosen": row["chosen"], "rejected": row["rejected"], "language": "en", "meta": {"a": "b"}, "n": [1]}) == "trl"


def test_that_holds_for_other_names_of_the_two_texts_too() -> None:
    row = {"task": "What is 0*12?", "good": "Step 1: multiply. 0", "bad": "Step 1: add. 12"}
    with pytest.raises(DataFormatError, match="fits no known format"):
        chosen(row, chosen_key="good", rejected_key="bad")
    assert chosen(row, chosen_key="good", rejected_key="bad", prompt_key="task") == "openrlhf"


def test_a_common_column_that_is_ignored_by_name_is_not_read() -> None:
    row = PAIR | {"system": "Answer in French.", "weight": "heavy"}
    name, options = choose_format([row], DataConfig(ignore=("system", "weight")), where="f", source="set")
    comparison = adapt(name, columns_of(name, options), row, options)
    assert (comparison.prompt, comparison.weight) == ((USER,), 1.0)


def test_a_prompt_column_that_the_conversations_do_not_hold_is_no_shared_prompt() -> None:
    turns = [[{"role": "user", "content": "other"}, answer] for answer in (SEVEN, EIGHT)]
    row = {"prompt": "Name a prime", "chosen": turns[0], "rejected": turns[1]}
    with pytest.raises(RowRejected, match="none of the turns"):
        FORMATS["ultrafeedback_binarized"].adapt(row, SourceOptions("set"))


def test_a_row_may_bring_a_system_turn() -> None:
    row = PAIR | {"system": "Answer in French."}
    name, options = choose_format([row], DataConfig(), where="f", source="set")
    comparison = adapt(name, columns_of(name, options), row, options)
    assert comparison.prompt == ({"role": "system", "content": "Answer in French."}, USER)
    twice = row | {"prompt": [{"role": "system", "content": "Answer in French."}, USER]}
    assert adapt(name, columns_of(name, options), twice, options).prompt == comparison.prompt


def test_what_appears_after_the_sample_costs_the_row() -> None:
    reading = choose_format([PAIR], DataConfig(), where="f", source="set")
    raw = [
        {"kind": "row", "role": "train", "file": "f", "number": number, "raw": json.dumps(row)}
        for number, row in enumerate([PAIR, PAIR | {"images": ["a.png"]}, PAIR | {"magnitude": 3}], 1)
    ]
    drafts = adapt_rows(pa.Table.from_pylist(raw, READ_SCHEMA), Adaptation({"f": reading}, "quarantine"))
    assert [draft.reason for draft in drafts] == [None, "unused_column", None]
    assert "images" in (drafts[1].detail or "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a prime", "chosen": [SEVEN], "rejected": [EIGHT]},
        {"prompt": [{"role": "system", "content": "x"}, USER], "chosen": "Seven", "rejected": "Eight"},
        {"prompt": [USER], "chosen": [SEVEN], "rejected": "Eight"},
    ],
)
def test_texts_and_messages_may_be_mixed(row: dict[str, Any]) -> None:
    name, options = choose_format([row], DataConfig(), where="f", source="set")
    assert name == "trl"
    comparison = adapt(name, columns_of(name, options), row, options)
    assert (comparison.prompt[-1], comparison.completions) == (USER, ("Seven", "Eight"))


def test_the_error_says_for_every_format_why_it_does_not_fit() -> None:
    with pytest.raises(DataFormatError) as caught:
        chosen({"frage": "q", "antwort": "a"})
    text = str(caught.value)
    assert "antwort, frage" in text
    for name in FORMATS:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}: "))
        assert "missing" in line


def test_columns_are_described_in_the_order_of_sight() -> None:
    found = described([{"a": None, "b": 1}, {"b": "x", "a": [1]}])
    assert found == {"a": ("list", 1, [1]), "b": ("number or text", 2, 1)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_declares_what_it_reads(name: str) -> None:
    entry = FORMATS[name]
    assert entry.consumed
    assert not entry.consumed & entry.metadata
