"""Labels of steps and critiques: where the formats carry them, when they are read, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rayward.config.data import DataConfig
from rayward.data.formats.table import FORMATS, SourceOptions, choose_format
from rayward.data.record import BadRow, RowRejected, dump_record, joined, load_record, validate

PLAIN = SourceOptions("set")
CRITICISED = SourceOptions("set", critiques=True)
STEPPED = SourceOptions("set", step_separator="|")
STEPWISE = {"prompt": "2+2?", "completions": ["2 is 1+1.", "So 4."], "labels": [True, 0.5]}
CRITIQUE = {"prompt": "2+2?", "completion": "4", "critique": "Right."}
RANKING: dict[str, Any] = {
    "prompt": "2+2?", "completions": ["a|b", "c"], "ranks": [0, 1], "step_labels": [[1, 0], [None]], "critiques": ["Good.", "Bad."],
}  # fmt: skip
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_feedback": "Right.", "rejected_feedback": "Wrong."}
ULTRAFEEDBACK = {
    "instruction": "2+2?",
    "completions": [
        {"response": "4", "critique": "Right.", "overall_score": 9},
        {"response": "5", "critique": "Wrong.", "overall_score": 1},
    ],
}


@pytest.mark.parametrize(("name", "row"), [("stepwise", STEPWISE), ("critique", CRITIQUE), ("ranking", RANKING), ("trl", PAIR)])
def test_detection(name: str, row: dict[str, Any]) -> None:
    assert choose_format([row], DataConfig(), where="f", source="set")[0] == name


def test_the_steps_of_a_completion_are_joined_by_the_separator() -> None:
    comparison = FORMATS["stepwise"].adapt(STEPWISE, PLAIN)
    validate(comparison, ties="quarantine")
    assert comparison.completions == ("2 is 1+1.\n\nSo 4.",)
    assert comparison.step_labels == ((1.0, 0.5),)
    assert FORMATS["stepwise"].adapt(STEPWISE, STEPPED).completions == ("2 is 1+1.|So 4.",)


def test_a_ranking_carries_labels_and_critiques_that_are_read_when_asked_for() -> None:
    plain = FORMATS["ranking"].adapt(RANKING, PLAIN)
    assert (plain.step_labels, plain.critiques) == (None, None)
    stepped = FORMATS["ranking"].adapt(RANKING, STEPPED)
    validate(stepped, ties="quarantine")
    assert stepped.step_labels is not None
    assert stepped.step_labels[0] == (1.0, 0.0)
    assert math.isnan(stepped.step_labels[1][0])
    assert FORMATS["ranking"].adapt(RANKING, CRITICISED).critiques == ("Good.", "Bad.")


@pytest.mark.parametrize(("name", "row"), [("trl", PAIR), ("ultrafeedback", ULTRAFEEDBACK)])
def test_other_formats_with_critiques(name: str, row: dict[str, Any]) -> None:
    options = replace(CRITICISED, attributes=("overall_score",), rank_by="overall_score", prompt_key="prompt")
    comparison = FORMATS[name].adapt(row, options)
    validate(comparison, ties="quarantine")
    assert comparison.critiques == ("Right.", "Wrong.")
    assert FORMATS[name].adapt(row, replace(options, critiques=False)).critiques is None


@pytest.mark.parametrize(
    ("name", "options", "row", "reason", "detail"),
    [
        ("stepwise", PLAIN, {**STEPWISE, "labels": [True]}, BadRow.BAD_STEPS, "1 labels of steps, and split at .* it has 2"),
        ("stepwise", PLAIN, {**STEPWISE, "completions": ["a\n\nb"], "labels": [True]}, BadRow.BAD_STEPS, "it has 2; the rule is as many"),
        ("stepwise", PLAIN, {**STEPWISE, "completions": ["a", " "]}, BadRow.BAD_STEPS, "it has 1"),
        ("stepwise", PLAIN, {**STEPWISE, "completions": [], "labels": []}, BadRow.BAD_STEPS, "0 labels"),
        ("stepwise", PLAIN, {**STEPWISE, "labels": [2, 0]}, BadRow.BAD_STEPS, "label of step 0 is 2; the rule is 0 to 1"),
        ("stepwise", PLAIN, {**STEPWISE, "labels": ["yes", 0]}, BadRow.WRONG_TYPE, "label 0' is a text"),
        ("ranking", STEPPED, {**RANKING, "step_labels": [[1, 0]]}, BadRow.BAD_STEPS, "1 rows of step_labels for 2"),
        ("ranking", STEPPED, {**RANKING, "step_labels": [[1, 0], [1, 1]]}, BadRow.BAD_STEPS, "completion 1: 2 labels"),
        ("ranking", CRITICISED, {**RANKING, "critiques": ["Good."]}, BadRow.NO_CRITIQUE, "1 critiques for 2 completions"),
        ("ranking", CRITICISED, {**RANKING, "critiques": ["Good.", None]}, BadRow.NO_CRITIQUE, "has no critique"),
        ("ranking", CRITICISED, {**RANKING, "critiques": ["Good.", " "]}, BadRow.NO_CRITIQUE, "critique of completion 1 is empty"),
        ("ranking", CRITICISED, {**RANKING, "critiques": ["Good.", 3]}, BadRow.WRONG_TYPE, "critique 1' is a number"),
        ("ranking", CRITICISED, {**RANKING, "critiques": ["Good.", "a\x00"]}, BadRow.BAD_TEXT, "NUL"),
        ("trl", CRITICISED, {k: v for k, v in PAIR.items() if k != "chosen_feedback"}, BadRow.NO_CRITIQUE, "data.critique_lead_in is set"),
        ("critique", PLAIN, CRITIQUE, BadRow.MISSING_FIELD, "neither a ranking nor"),
    ],
)
def test_what_does_not_fit_is_rejected(name: str, options: SourceOptions, row: dict[str, Any], reason: BadRow, detail: str) -> None:
    with pytest.raises(RowRejected, match=detail) as raised:
        validate(FORMATS[name].adapt(row, replace(options, prompt_key="prompt")), ties="quarantine")
    assert raised.value.reason is reason


def test_records_travel_and_join_with_their_labels() -> None:
    first, second = (FORMATS["stepwise"].adapt({**STEPWISE, "completions": [text, "So."]}, PLAIN) for text in ("x", "y"))
    assert load_record(dump_record(first)) == first
    whole = joined([first, second])
    assert whole.step_labels == ((1.0, 0.5), (1.0, 0.5))
    assert (whole.attributes, whole.critiques) == (None, None)
    assert joined([first, replace(second, step_labels=None)]).step_labels is None
    criticised = FORMATS["critique"].adapt(CRITIQUE, CRITICISED)
    assert load_record(dump_record(criticised)) == criticised
    assert joined([criticised, replace(criticised, completions=("5",), critiques=("Wrong.",))]).critiques == ("Right.", "Wrong.")


def test_other_labels_of_the_same_steps_are_a_contradiction() -> None:
    one, other = (FORMATS["stepwise"].adapt({**STEPWISE, "labels": labels}, PLAIN) for labels in ([1, 0.5], [0, 0.5]))
    assert one.content_key() == other.content_key()
    assert one.judgement_key() != other.judgement_key()
