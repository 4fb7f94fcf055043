from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from rayward.batch.comparison import shared_prefix_length
from rayward.contract.conversation import Message
from rayward.data.prepare.judge import Policy, judge, side_of
from rayward.data.prepare.rows import KEYED_SCHEMA
from rayward.data.record import BadRow, Comparison, RowRejected, dense_ranks, dump_record, load_record, validate

BASE = Comparison(id="x", source="s", prompt=(Message(role="user", content="q"),), completions=("a", "b"), ranks=(0.0, 1.0))
POLICY = Policy(seed=0, validation_fraction=0.0, too_long="truncate")


def test_keys_ignore_the_order_of_completions_and_see_the_judgement() -> None:
    swapped = replace(BASE, completions=("b", "a"), ranks=(5.0, 2.0))
    reverse = replace(BASE, ranks=(1.0, 0.0))
    assert BASE.content_key() == swapped.content_key() == reverse.content_key()
    assert BASE.judgement_key() == swapped.judgement_key() != reverse.judgement_key()
    assert BASE.content_key() != replace(BASE, completions=("a", "c")).content_key()
    assert BASE.prompt_key() != replace(BASE, prompt=(Message(role="system", content="q"),)).prompt_key()


def test_dense_ranks() -> None:
    assert dense_ranks([10.0, 3.0, 10.0, 7.5]) == [2, 0, 2, 1]


@pytest.mark.parametrize(
    ("sequences", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[9], [8]], 0), ([[1, 2, 3]], 2), ([[1, 2, 3], [1, 2, 4], [1, 5, 6]], 1)],
)
def test_shared_prefix_leaves_every_sequence_a_token(sequences: list[list[int]], length: int) -> None:
    assert shared_prefix_length(sequences) == length


def test_ties_follow_the_policy_and_partial_ties_are_rankings() -> None:
    tied = replace(BASE, ranks=(1.0, 1.0))
    validate(tied, ties="keep")
    with pytest.raises(RowRejected) as caught:
        validate(tied, ties="quarantine")
    assert caught.value.reason is BadRow.TIE
    validate(replace(BASE, completions=("a", "b", "c"), ranks=(0.0, 1.0, 1.0)), ties="quarantine")


def test_a_record_survives_the_way_between_steps() -> None:
    full = replace(BASE, margin=0.5, weight=2.0, attributes=((1.0, 2.0), (3.0, 4.0)), completions=("a", "é\ud800"))
    assert load_record(dump_record(full)) == full


def _table(*rows: tuple[Comparison, str, int]) -> pa.Table:
    """(comparison, role, row number)."""
    records: list[dict[str, Any]] = [
        {
            "kind": "row", "role": role, "file": "f", "number": number, "source": "s", "record_key": dump_record(c), "split": role,
            "near_prompt": c.prompt_key(), "content": c.content_key(), "near_content": c.content_key(), "judgement": c.judgement_key(),
        }
        for c, role, number in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(records, schema=KEYED_SCHEMA)


def _verdicts(table: pa.Table) -> dict[int, str]:
    rows = [row for row in judge(table, POLICY).to_pylist() if row["kind"] == "row"]
    assert all((row["split"] is None) == (row["reason"] is not None) for row in rows)
    return {row["number"]: row["reason"] or row["split"] for row in rows}


def test_the_first_of_equal_rows_stays_whatever_the_order_of_the_table() -> None:
    rows = [(BASE, "train", n) for n in (1, 2, 3)]
    random.Random(3).shuffle(rows)
    assert _verdicts(_table(*rows)) == {1: "train", 2: "duplicate", 3: "duplicate"}


def test_of_rows_that_differ_in_id_the_smallest_stays_whatever_its_number() -> None:
    assert _verdicts(_table((replace(BASE, id="z"), "train", 1), (BASE, "train", 2))) == {1: "duplicate", 2: "train"}


def test_all_rows_of_a_contradiction_go() -> None:
    against = replace(BASE, ranks=(1.0, 0.0))
    assert set(_verdicts(_table((BASE, "train", 1), (against, "train", 2), (BASE, "train", 3))).values()) == {"contradiction"}


def test_a_train_prompt_that_stands_in_validation_leaves_train() -> None:
    other = replace(BASE, completions=("c", "d"))
    assert _verdicts(_table((BASE, "train", 1), (other, "validation", 2))) == {1: "in_validation", 2: "validation"}


def test_the_held_out_share_is_a_function_of_prompt_and_seed() -> None:
    keys = [str(n).encode() for n in range(2000)]
    sides = [[side_of("train", key, replace(POLICY, seed=seed, validation_fraction=0.2)) for key in keys] for seed in (0, 0, 1)]
    assert sides[0] == sides[1] != sides[2]
    # 400 expected, standard deviation 18.
    assert 320 < sides[0].count("validation") < 480


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"completions": ("a", "b\x00")}, BadRow.BAD_TEXT, "completion 1: "),
        (
            {"prompt": (Message(role="system", content="x"), Message(role="user", content="\ud800"))},
            BadRow.BAD_TEXT,
            "turn 1 of the prompt: ",
        ),
        ({"critiques": ("good", "\x00")}, BadRow.BAD_TEXT, "the critique of completion 1: "),
        ({"tools": ({"name": "\x00"},)}, BadRow.BAD_TEXT, "tools: "),
        ({"completions": ("a", "b", "a"), "ranks": (0.0, 1.0, 2.0)}, BadRow.IDENTICAL_COMPLETIONS, "completions 0 and 2 "),
        ({"margin": float("nan")}, BadRow.NON_FINITE_MARGIN, "margin is nan; the rule is a finite number"),
        ({"strength": -1.0}, BadRow.NON_FINITE_MARGIN, "strength is -1.0; the rule"),
        ({"weight": -1.0}, BadRow.WRONG_TYPE, "weight is -1.0; the rule"),
        ({"ranks": (0.0, float("inf"))}, BadRow.BAD_RANKING, "the rank of completion 1 is inf"),
        ({"ranks": (0.0,)}, BadRow.BAD_RANKING, "1 ranks for 2 completions; the rule"),
        ({"ranks": None}, BadRow.MISSING_FIELD, "data.attributes"),
        ({"ranks": (0.0, 0.0)}, BadRow.TIE, "data.ties is 'quarantine'"),
        ({"step_labels": ((0.0,), (1.0, 2.0))}, BadRow.BAD_STEPS, "completion 1: the label of step 1 is 2"),
    ],
)
def test_a_refusal_names_the_part_and_the_rule(change: dict[str, Any], reason: BadRow, says: str) -> None:
    with pytest.raises(RowRejected) as caught:
        validate(replace(BASE, **change), ties="quarantine")
    assert caught.value.reason is reason
    assert says in caught.value.detail
