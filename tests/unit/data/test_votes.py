"""Several judges of the same completions: majority, shares, and what becomes of margin, strength, ratings and weight."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.tokenizer import make_tokenizer

from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.data.formats.table import SourceOptions
from rayward.data.prepare.combine import settle
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.tally import Tally
from rayward.data.record import BadRow, Comparison, RowRejected, dump_record, load_record, pairwise_in_order, validate
from rayward.data.votes import judgement, merged

BASE = Comparison(id="x", source="s", prompt=(Message(role="user", content="q"),), completions=("a", "b"), ranks=(0.0, 1.0))


def vote(ranks: tuple[float, ...] | None, completions: str = "ab", **others: Any) -> Comparison:
    return replace(BASE, completions=tuple(completions), ranks=ranks, **others)


FOR_A, FOR_B, EQUAL = vote((0.0, 1.0)), vote((1.0, 0.0)), vote((0.0, 0.0))


@pytest.mark.parametrize(
    ("counts", "equal", "majority", "shares"),
    [
        ((3, 2), 0, (0, 1), (0.6,)),
        ((1, 4), 0, (1, 0), (0.2,)),
        ((2, 2), 0, (0, 0), None),
        ((5, 0), 0, (0, 1), None),
        ((2, 1), 2, (0, 1), (0.6,)),
        ((1, 0), 3, (0, 0), (0.625,)),
        ((0.5, 1.5), 0, (1, 0), (0.25,)),
        ((3, 1, 0), 0, (0, 1, 2), (0.75, 1.0, 1.0)),
        ((2, 2, 0, 0), 0, (0, 0, 1, 1), None),
    ],
)
def test_counts_by_hand(counts: tuple[float, ...], equal: float, majority: tuple[int, ...], shares: tuple[float, ...] | None) -> None:
    hard = judgement(counts, "majority", equal=equal)
    assert (hard.ranks, hard.vote_shares) == (majority, None)
    soft = judgement(counts, "soft", equal=equal)
    assert soft.vote_shares == (None if shares is None else pytest.approx(shares))
    validate(replace(BASE, completions=tuple("abcd"[: len(counts)]), ranks=soft.ranks, vote_shares=soft.vote_shares), ties="keep")


@pytest.mark.parametrize(
    ("counts", "equal", "says"),
    [
        ((1, -1), 0, "finite numbers of 0 or more"),
        ((1, math.nan), 0, "finite"),
        ((1, math.inf), 0, "finite"),
        ((0, 0), 0, "nobody voted"),
        ((1, 2, 3), 1, "say equal of 3"),
    ],
)
def test_counts_that_are_none(counts: tuple[float, ...], equal: float, says: str) -> None:
    with pytest.raises(RowRejected, match=says) as caught:
        judgement(counts, "soft", equal=equal)
    assert caught.value.reason is BadRow.BAD_RANKING


@pytest.mark.parametrize(
    ("rows", "majority", "soft", "shares"),
    [
        ([FOR_A, FOR_A, FOR_B], (0, 1), (0, 1), (2 / 3,)),
        ([FOR_A, FOR_B], (0, 0), (0, 0), None),
        ([FOR_A, EQUAL, EQUAL], (0, 0), (0, 1), (2 / 3,)),
        ([FOR_A, EQUAL], (0, 1), (0, 1), (0.75,)),
        ([FOR_B, FOR_B, FOR_B, FOR_A, EQUAL], (1, 0), (1, 0), (0.3,)),
        # A share that a row counted itself is one vote of so much.
        ([replace(FOR_A, vote_shares=(0.75,)), FOR_B], (0, 0), (1, 0), (0.375,)),
    ],
)
def test_rows_of_a_pair_by_hand(
    rows: list[Comparison], majority: tuple[int, ...], soft: tuple[int, ...], shares: tuple[float, ...] | None
) -> None:
    hard, _ = merged(rows, "majority")[1:]
    assert (hard.ranks, hard.vote_shares) == (majority, None)
    whole, _ = merged(rows, "soft")[1:]
    assert whole.ranks == soft
    assert whole.vote_shares == (None if shares is None else pytest.approx(shares))
    validate(whole, ties="keep")


def test_completions_in_another_order_are_the_same_votes() -> None:
    rows = [FOR_A, vote((0.0, 1.0), "ab"), vote((0.0, 1.0), "ba")]
    whole = merged(rows, "soft")[1]
    assert (whole.completions, whole.ranks) == (("a", "b"), (0, 1))
    assert whole.vote_shares == pytest.approx((2 / 3,))
    # What is the same may be written differently: then somebody else says which is which.
    spelled = [vote((0.0, 1.0), completions=texts) for texts in (["a", "b"], ["a ", "b"], ["b", " a"])]  # type: ignore[arg-type]
    whole = merged(spelled, "soft", [[0, 1], [0, 1], [1, 0]])[1]
    assert whole.ranks == (0, 1)
    assert whole.vote_shares == pytest.approx((2 / 3,))


@pytest.mark.parametrize("share", [0.6, 0.7, 2 / 3, 0.1])
def test_opposite_shares_of_two_rows_are_a_tie(share: float) -> None:
    rows = [replace(FOR_A, vote_shares=(share,)), replace(FOR_B, vote_shares=(1 - share,))]
    _, whole, _ = merged(rows, "soft")
    assert (whole.ranks, whole.vote_shares) == ((0.0, 0.0), None)
    validate(whole, ties="keep")


def test_of_more_than_two_the_mean_orders_and_every_pair_has_its_share() -> None:
    rows = [vote((0, 1, 2), "abc"), vote((0, 1, 2), "abc"), vote((1, 0, 2), "abc"), vote((2, 1, 0), "abc")]
    whole = merged(rows, "soft")[1]
    # (a, b): 2 of 4; (a, c): 3 of 4; (b, c): 3 of 4. Points: a 1.25, b 1.25, c 0.5.
    assert whole.vote_shares == (0.5, 0.75, 0.75)
    assert whole.ranks == (0, 0, 1)
    # A circle has no order, and is a tie of all.
    circle = [vote((0, 1, 2), "abc"), vote((1, 2, 0), "abc"), vote((2, 0, 1), "abc")]
    assert merged(circle, "majority")[1].ranks == (0, 0, 0)


def test_no_order_of_the_rows_changes_anything() -> None:
    rows = [
        vote((0.0, 1.0), id="1", margin=0.1, weight=0.7, strength=3.0, attributes=((1.0,), (2.0,))),
        vote((1.0, 0.0), id="2", margin=0.2, weight=0.1, strength=1.0, attributes=((4.0,), (math.nan,))),
        vote((0.0, 1.0), id="3", margin=0.4, weight=0.3, strength=2.0, attributes=((3.0,), (math.nan,))),
        vote((1.0, 0.0), "ba", id="0", margin=0.4, weight=0.3, strength=2.0, attributes=((0.0,), (5.0,))),
    ]
    for rule in ("majority", "soft"):
        results = {
            (rows[order[index]].id, dump_record(whole))
            for order in itertools.permutations(range(4))
            for index, whole, _ in [merged([rows[i] for i in order], rule)]  # type: ignore[arg-type]
        }
        assert len(results) == 1


def test_margin_and_strength_are_those_of_the_rows_that_agree_and_the_weight_is_the_mean() -> None:
    rows = [
        replace(FOR_A, id="1", margin=1.0, strength=1.0, weight=1.0, critiques=("good", "bad")),
        replace(FOR_A, id="2", margin=2.0, weight=1.0),
        replace(FOR_B, id="0", margin=9.0, strength=9.0, weight=4.0, critiques=("bad", "good")),
    ]
    index, whole, votes = merged(rows, "majority")
    assert (whole.id, whole.margin, whole.strength, whole.weight) == ("1", 1.5, 1.0, 2.0)
    assert rows[index].id == "1"
    assert whole.critiques == ("good", "bad")
    assert votes == "votes 2 to 1"
    tie = merged(rows[1:], "majority")[1]
    assert (tie.id, tie.ranks, tie.margin, tie.strength) == ("0", (0, 0), None, 0.0)


def test_ratings_and_steps_are_the_median_or_the_mean_of_what_is_known() -> None:
    rated = [vote(None, attributes=(values, (math.nan, 1.0))) for values in ((1.0, 0.0), (1.0, 0.0), (4.0, math.nan))]
    hard, soft = (merged(rated, rule)[1].attributes for rule in ("majority", "soft"))  # type: ignore[arg-type]
    assert hard is not None
    assert soft is not None
    assert (hard[0], hard[1][1]) == ((1.0, 0.0), 1.0)
    assert (soft[0], soft[1][1]) == ((2.0, 0.0), 1.0)
    assert math.isnan(hard[1][0])
    assert math.isnan(soft[1][0])
    steps = [vote(None, "a", step_labels=((label, 1.0),)) for label in (0.0, 0.0, 1.0)]
    assert merged(steps, "majority")[1].step_labels == ((0.0, 1.0),)
    labels = merged(steps, "soft")[1].step_labels
    assert labels is not None
    assert labels[0] == pytest.approx((1 / 3, 1.0))
    with pytest.raises(RowRejected, match="other numbers of steps"):
        merged([*steps, vote(None, "a", step_labels=((1.0,),))], "soft")


def test_shares_follow_the_order_of_completions_and_belong_to_the_judgement() -> None:
    assert pairwise_in_order([0.9, 0.8, 0.3], [2, 0, 1]) == pytest.approx([0.2, 0.7, 0.9])
    soft = replace(FOR_A, vote_shares=(0.75,))
    turned = vote((1.0, 0.0), "ba", vote_shares=(0.25,))
    assert soft.judgement_key() == turned.judgement_key() != FOR_A.judgement_key()
    assert load_record(dump_record(soft)) == soft


@pytest.mark.parametrize(
    ("ranks", "shares", "says"),
    [
        ((0, 1), (0.5,), "ranks are"),
        ((0, 1), (0.4,), "ranks are"),
        ((1, 0), (0.6,), "ranks are"),
        ((0, 0), (0.6,), "ranks are"),
        ((0, 1), (1.1,), "0 to 1"),
        ((0, 1), (math.nan,), "0 to 1"),
        ((0, 1), (0.6, 0.6), "2 shares of votes for 1 pairs"),
    ],
)
def test_shares_that_do_not_fit_are_refused(ranks: tuple[float, ...], shares: tuple[float, ...], says: str) -> None:
    with pytest.raises(RowRejected, match=says) as caught:
        validate(replace(BASE, ranks=ranks, vote_shares=shares), ties="keep")
    assert caught.value.reason is BadRow.BAD_RANKING


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Encoders.of(Contract.from_tokenizer(tokenizer, max_tokens=100), tokenizer)


def prepared(rows: list[dict[str, Any]], encoders: Encoders, **policy: Any) -> list[dict[str, Any]]:
    """The rows after all steps, with `role` of their own where they have one."""
    rule = Policy(0, 0.0, "truncate", **policy)
    raw = [
        {"kind": "row", "role": row.pop("role", "train"), "file": "f", "number": i, "raw": json.dumps(row)} for i, row in enumerate(rows, 1)
    ]
    read = pa.Table.from_pylist([*raw, {"kind": "total", "role": "train", "file": "f", "number": len(raw), "raw": ""}], schema=READ_SCHEMA)
    plan = Adaptation({"f": ("ranking", SourceOptions("set"))}, "keep" if rule.votes else rule.ties)
    table = settle(encode(read, plan, encoders, rule), rule)
    counts = Tally.merged([Tally.of(table)])
    assert counts.read == counts.splits.total() + counts.num_merged + counts.quarantined.total()
    return [row for row in table.to_pylist() if row["kind"] in ("row", "merged")]


def row(*ranks: float, completions: str = "ab", **others: Any) -> dict[str, Any]:
    return {"prompt": "q", "completions": list(completions), "ranks": list(ranks), **others}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    fates = [(row["number"], row["reason"] or row["split"] or row["kind"]) for row in rows]
    return [fate for _, fate in sorted(fates)]


def test_votes_become_one_row(encoders: Encoders) -> None:
    votes = [row(0, 1, id="1"), row(0, 1, completions="ba", id="2"), row(0, 1, id="3")]
    assert verdicts(prepared(votes, encoders)) == ["contradiction"] * 3
    for rule, shares in (("majority", None), ("soft", [pytest.approx(2 / 3)])):
        rows = prepared(votes, encoders, votes=rule)
        assert verdicts(rows) == ["train", "merged", "merged"]
        (used,) = [row for row in rows if row["split"]]
        assert (used["id"], json.loads(used["completions_json"]), used["ranks"]) == ("1", ["a", "b"], [0, 1])
        assert used["vote_shares"] == shares


def test_as_many_votes_for_each_are_a_tie(encoders: Encoders) -> None:
    votes = [row(0, 1), row(1, 0)]
    gone = prepared(votes, encoders, votes="majority")
    assert verdicts(gone) == ["tie", "tie"]
    assert all("votes 1 to 1; data.votes is 'majority'" in row["detail"] and "data.ties" in row["detail"] for row in gone)
    for rule in ("majority", "soft"):
        rows = prepared(votes, encoders, votes=rule, ties="keep")
        assert sorted(verdicts(rows)) == ["merged", "train"]
        assert [row["ranks"] for row in rows if row["split"]] == [[0, 0]]


def test_ties_are_votes_whatever_becomes_of_a_tie(encoders: Encoders) -> None:
    votes = [row(0, 1, id="1"), row(0, 0, id="2"), row(0, 0, id="3")]
    assert verdicts(prepared(votes, encoders)) == ["train", "tie", "tie"]
    assert verdicts(prepared(votes, encoders, votes="majority")) == ["tie"] * 3
    rows = prepared(votes, encoders, votes="soft")
    assert [row["vote_shares"] for row in rows if row["split"]] == [[pytest.approx(2 / 3)]]
    # A tie that nobody else judges stays one.
    assert verdicts(prepared([row(0, 0), row(0, 1, completions="cd")], encoders, votes="soft")) == ["tie", "train"]
    assert verdicts(prepared([row(0, 0)], encoders, votes="soft", ties="keep")) == ["train"]


def test_rows_that_agree_are_duplicates_as_ever(encoders: Encoders) -> None:
    assert sorted(verdicts(prepared([row(0, 1)] * 3, encoders, votes="soft"))) == ["duplicate", "duplicate", "train"]


def test_votes_are_counted_on_each_side_alone_and_validation_decides(encoders: Encoders) -> None:
    held = [row(0, 1, role="validation"), row(0, 1, role="validation", id="z"), row(1, 0, role="validation")]
    assert verdicts(prepared([*held, row(0, 1), row(1, 0)], encoders, votes="soft")).count("in_validation") == 2
    # What leaves validation as a tie holds no prompt there.
    tied = [row(0, 1, role="validation"), row(1, 0, role="validation"), row(0, 1)]
    assert verdicts(prepared(tied, encoders, votes="soft")) == ["tie", "tie", "train"]


def test_ratings_by_several_judges_are_votes(encoders: Encoders) -> None:
    labels = [row_of | {"prompt": "q", "completions": ["a"]} for row_of in ({"ranks": None, "step_labels": [[v]]} for v in (0, 1, 1))]
    rule = Policy(0, 0.0, "truncate", votes="soft")
    raw = [{"kind": "row", "role": "train", "file": "f", "number": i, "raw": json.dumps(each)} for i, each in enumerate(labels)]
    options = SourceOptions("set", step_separator="\n\n")
    plan = Adaptation({"f": ("ranking", options)}, "keep")
    table = settle(encode(pa.Table.from_pylist(raw, schema=READ_SCHEMA), plan, encoders, rule), rule)
    (used,) = [load_record(each["record"]) for each in table.to_pylist() if each["split"]]
    assert used.step_labels is not None
    assert used.step_labels[0] == pytest.approx((2 / 3,))
