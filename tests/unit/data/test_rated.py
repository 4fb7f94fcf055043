"""Formats of rankings and ratings, and how rated rows of one prompt become one comparison."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.tokenizer import make_tokenizer

from rayward.config.data import DataConfig
from rayward.contract.contract import Contract
from rayward.data.formats.table import FORMATS, SourceOptions, choose_format
from rayward.data.prepare.combine import settle
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.tally import Tally
from rayward.data.record import BadRow, RowRejected, load_record, validate

PLAIN = SourceOptions("set")
HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rated(*attributes: str, **options: Any) -> SourceOptions:
    return SourceOptions("set", attributes=attributes, **options)


NECTAR = {
    "prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant: ",
    "answers": [{"answer": "five", "model": "a", "rank": 2.0}, {"answer": "4", "model": "b", "rank": 1.0}, {"answer": "fish", "rank": 3.0}],
    "turns": 2,
}
ULTRAFEEDBACK = {
    "instruction": "2+2?",
    "completions": [
        {"response": "4", "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "N/A"}}, "overall_score": 8.5},
        {"response": "5", "annotations": {"helpfulness": {"Rating": "2"}}, "overall_score": 3},
    ],
}
HELPSTEER = {"prompt": "2+2?", "response": "4", "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0}
SAFE = {
    "prompt": "how?", "response_0": "so", "response_1": "no", "is_response_0_safe": False, "is_response_1_safe": True,
    "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip
SCORED = {"prompt": "2+2?", "responses": ["5", "4", "fish"], "scores": [0.5, 2, -1]}
POINTWISE = {"prompt": "2+2?", "completion": "4", "label": True}
ROWS: dict[str, dict[str, Any]] = {
    "nectar": NECTAR, "ultrafeedback": ULTRAFEEDBACK, "helpsteer2": HELPSTEER, "safe_rlhf": SAFE, "scored": SCORED, "pointwise": POINTWISE,
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_detection_finds_the_format_that_the_row_was_written_in(name: str) -> None:
    assert choose_format([ROWS[name]], DataConfig(), where="f", source="set")[0] == name


def test_nectar_ranks_answers_to_a_dialogue() -> None:
    comparison = FORMATS["nectar"].adapt(NECTAR, PLAIN)
    validate(comparison, ties="quarantine")
    assert [turn["role"] for turn in comparison.prompt] == ["user", "assistant", "user"]
    assert comparison.completions == ("five", "4", "fish")
    assert comparison.ranks == (2.0, 1.0, 3.0)


def test_ultrafeedback_keeps_the_ratings_that_are_asked_for() -> None:
    comparison = FORMATS["ultrafeedback"].adapt(ULTRAFEEDBACK, rated("helpfulness", "honesty", "overall_score"))
    validate(comparison, ties="quarantine")
    assert comparison.ranks is None
    assert comparison.attributes is not None
    assert comparison.attributes[0][0] == 5.0
    assert math.isnan(comparison.attributes[0][1])
    assert comparison.attributes[0][2] == 8.5
    by_score = FORMATS["ultrafeedback"].adapt(ULTRAFEEDBACK, rated("overall_score", rank_by="overall_score"))
    assert (by_score.ranks, by_score.strength) == ((-8.5, -3.0), 5.5)


def test_helpsteer2_is_one_rated_completion_and_knows_inner_turns() -> None:
    comparison = FORMATS["helpsteer2"].adapt(HELPSTEER, rated(*HELPSTEER2))
    assert comparison.attributes == ((4.0, 4.0, 4.0, 1.0, 0.0),)
    long = HELPSTEER | {"prompt": "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n2+2?"}
    prompt = FORMATS["helpsteer2"].adapt(long, rated(*HELPSTEER2)).prompt
    assert [(turn["role"], turn["content"]) for turn in prompt] == [("user", "hi"), ("assistant", "hello"), ("user", "2+2?")]


def test_safe_rlhf_is_ordered_by_the_judgement_that_is_asked_for() -> None:
    assert FORMATS["safe_rlhf"].adapt(SAFE, rated("is_safe")).ranks == (0.0, 1.0)
    safer = FORMATS["safe_rlhf"].adapt(SAFE, rated("is_safe", preference="safer"))
    assert (safer.ranks, safer.attributes) == ((1.0, 0.0), ((0.0,), (1.0,)))


def test_scores_rank_and_rate() -> None:
    comparison = FORMATS["scored"].adapt(SCORED, rated("score"))
    assert (comparison.ranks, comparison.attributes, comparison.strength) == ((-0.5, -2.0, 1.0), ((0.5,), (2.0,), (-1.0,)), None)
    pair = FORMATS["scored"].adapt({"prompt": "a", "responses": ["b", "c"], "scores": [1, 4]}, PLAIN)
    assert (pair.ranks, pair.strength, pair.attributes) == ((-1.0, -4.0), 3.0, None)


def test_a_ranking_may_name_its_ratings_or_not() -> None:
    row = {"prompt": "a", "completions": ["b", "c"], "attributes": [{"y": 2, "x": 1}, {"x": 3}]}
    named = FORMATS["ranking"].adapt(row, rated("x", "y")).attributes
    assert named is not None
    assert (named[0], named[1][0], math.isnan(named[1][1])) == ((1.0, 2.0), 3.0, True)
    assert FORMATS["ranking"].adapt(row | {"attributes": [[1, 2], [3, 4]]}, rated("x", "y")).attributes == ((1.0, 2.0), (3.0, 4.0))


BAD: list[tuple[str, SourceOptions, dict[str, Any], BadRow]] = [
    ("nectar", PLAIN, NECTAR | {"answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}, BadRow.BAD_RANKING),
    ("nectar", PLAIN, NECTAR | {"answers": [{"answer": "a", "rank": 1}, "b"]}, BadRow.WRONG_TYPE),
    ("ranking", PLAIN, {"prompt": "a", "completions": ["b", "c"], "ranks": [1, None]}, BadRow.BAD_RANKING),
    ("ranking", rated("x"), {"prompt": "a", "completions": ["b", "c"], "attributes": [[1], [1, 2]]}, BadRow.BAD_RATING),
    ("ranking", rated("x"), {"prompt": "a", "completions": ["b", "c"], "attributes": [[1]]}, BadRow.BAD_RATING),
    ("ranking", rated("x"), {"prompt": "a", "completions": ["b", "c"], "attributes": [[1], [math.inf]]}, BadRow.BAD_RATING),
    ("ultrafeedback", rated("honesty"), ULTRAFEEDBACK, BadRow.NO_RATING),
    (
        "ultrafeedback", rated("honesty"),
        {"instruction": "a", "completions": [{"response": "b", "annotations": {"honesty": {"Rating": "good"}}}]}, BadRow.BAD_RATING,
    ),
    ("ultrafeedback", rated("helpfulness", "honesty", rank_by="honesty"), ULTRAFEEDBACK, BadRow.BAD_RANKING),
    ("helpsteer2", rated(*HELPSTEER2, attribute_range=(0, 4)), HELPSTEER | {"verbosity": 5}, BadRow.BAD_RATING),
    ("helpsteer2", rated(*HELPSTEER2), HELPSTEER | {"verbosity": "much"}, BadRow.WRONG_TYPE),
    ("helpsteer2", rated("toxicity"), HELPSTEER, BadRow.NO_RATING),
    ("helpsteer2", PLAIN, HELPSTEER, BadRow.MISSING_FIELD),
    ("helpsteer2", rated(*HELPSTEER2), HELPSTEER | {"prompt": "a<extra_id_1>Wizard\nb"}, BadRow.UNKNOWN_ROLE),
    ("helpsteer2", rated(*HELPSTEER2), HELPSTEER | {"prompt": "a<extra_id_1>Assistant\nb"}, BadRow.WRONG_TYPE),
    ("safe_rlhf", PLAIN, SAFE | {"better_response_id": 2}, BadRow.BAD_RANKING),
    ("safe_rlhf", PLAIN, SAFE | {"better_response_id": None}, BadRow.MISSING_FIELD),
    ("scored", PLAIN, SCORED | {"scores": [1, 2]}, BadRow.BAD_RANKING),
    ("scored", PLAIN, SCORED | {"scores": [1, 2, None]}, BadRow.BAD_RANKING),
    ("scored", PLAIN, SCORED | {"scores": [1, 2, math.nan]}, BadRow.BAD_RANKING),
    ("scored", PLAIN, {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}, BadRow.TIE),
    ("pointwise", rated("label"), POINTWISE | {"label": "yes"}, BadRow.WRONG_TYPE),
    ("pointwise", rated("label"), POINTWISE | {"label": None}, BadRow.MISSING_FIELD),
    ("trl", SourceOptions("s", "prompt"), {"prompt": "a", "chosen": "b", "rejected": "c", "strength": -1}, BadRow.NON_FINITE_MARGIN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "row", "reason"), BAD)
def test_a_bad_row_is_rejected_with_its_reason(name: str, options: SourceOptions, row: dict[str, Any], reason: BadRow) -> None:
    with pytest.raises(RowRejected) as caught:
        validate(FORMATS[name].adapt(row, options), ties="quarantine")
    assert caught.value.reason is reason


# ---- rows of one prompt ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Encoders.of(Contract.from_tokenizer(tokenizer, max_tokens=100), tokenizer)


def settled(rows: list[dict[str, Any]], options: SourceOptions, encoders: Encoders, **policy: Any) -> pa.Table:
    raw = [{"kind": "row", "role": "train", "file": "f", "number": i, "raw": json.dumps(row)} for i, row in enumerate(rows, 1)]
    total = {"kind": "total", "role": "train", "file": "f", "number": len(rows), "raw": ""}
    table, rule = pa.Table.from_pylist([*raw, total], schema=READ_SCHEMA), Policy(0, 0.0, "truncate", **policy)
    return settle(encode(table, Adaptation({"f": ("helpsteer2", options)}, "quarantine"), encoders, rule), rule)


def judged(rows: list[dict[str, Any]], options: SourceOptions, encoders: Encoders, **policy: Any) -> list[dict[str, Any]]:
    return [row for row in settled(rows, options, encoders, **policy).to_pylist() if row["kind"] in ("row", "merged")]


def row(prompt: str, response: str, helpfulness: float | None, verbosity: float = 1) -> dict[str, Any]:
    return HELPSTEER | {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity}


TWO = rated("helpfulness", "verbosity")


def test_rated_rows_of_one_prompt_become_one_comparison(encoders: Encoders) -> None:
    rows = judged([row("p", "a", 4), row("q", "x", 2), row("p", "b", 1, 3), row("p", "c", 3)], TWO, encoders, merge_prompts=True)
    assert sorted(r["kind"] for r in rows) == ["merged", "merged", "row", "row"]
    assert all((r["split"] == "train") == (r["kind"] == "row") for r in rows)
    comparisons = {c.prompt[0]["content"]: c for c in (load_record(r["record"]) for r in rows if r["kind"] == "row")}
    found = dict(zip(comparisons["p"].completions, comparisons["p"].attributes or (), strict=True))
    assert found == {"a": (4.0, 1.0), "b": (1.0, 3.0), "c": (3.0, 1.0)}
    assert comparisons["p"].ranks is None
    assert comparisons["q"].completions == ("x",)


def test_merged_rows_are_ranked_by_an_attribute(encoders: Encoders) -> None:
    rows = judged([row("p", "a", 4), row("p", "b", 1)], TWO, encoders, merge_prompts=True, rank_by=(0, "helpfulness"))
    (record,) = [load_record(r["record"]) for r in rows if r["kind"] == "row"]
    assert record.ranks is not None
    assert dict(zip(record.completions, record.ranks, strict=True)) == {"a": -4.0, "b": -1.0}
    assert record.strength == 3.0


def test_the_result_does_not_depend_on_the_order_of_the_rows(encoders: Encoders) -> None:
    rows = [row("p", "a", 4), row("p", "b", 1), row("p", "c", 2)]
    first, second = (judged(r, TWO, encoders, merge_prompts=True) for r in (rows, rows[::-1]))
    assert {r["record"] for r in first if r["kind"] == "row"} == {r["record"] for r in second if r["kind"] == "row"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("p", "a", 4)], BadRow.BAD_RANKING),  # alone
        ([row("p", "a", 4), row("p", "b", None)], BadRow.BAD_RANKING),  # one without the rating
        ([row("p", "a", 4), row("p", "b", 4)], BadRow.TIE),
        ([row("p", "a", 4), row("p", "a", 3)], BadRow.CONTRADICTION),
    ],
)
def test_what_cannot_be_ranked_is_quarantined_row_by_row(rows: list[dict[str, Any]], reason: BadRow, encoders: Encoders) -> None:
    found = judged(rows, TWO, encoders, merge_prompts=True, rank_by=(0, "helpfulness"))
    assert [(r["kind"], r["split"], r["reason"]) for r in found] == [("row", None, reason.value)] * len(rows)


def test_a_duplicate_is_dropped_before_rows_are_merged(encoders: Encoders) -> None:
    found = judged([row("p", "a", 4), row("p", "a", 4), row("p", "b", 1)], TWO, encoders, merge_prompts=True)
    assert sorted((r["kind"], r["reason"] or "") for r in found) == [("merged", ""), ("row", ""), ("row", "duplicate")]


def test_counts_add_up_with_merged_rows(encoders: Encoders) -> None:
    rows = [row("p", "a", 4), row("p", "b", 1), row("p", "b", 1), row("q", "x", 2)]
    columns = settled(rows, TWO, encoders, merge_prompts=True)
    tally = Tally.merged([Tally.of(columns)])
    assert (tally.read, tally.num_merged, tally.splits.total(), tally.quarantined.total()) == (4, 1, 2, 1)
