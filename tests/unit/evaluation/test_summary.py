from __future__ import annotations

import math

import numpy as np
import pytest
from tests.unit.evaluation.table import evaluation_of, make_records, pair

from rayward.errors import DataError
from rayward.evaluation.records import Evaluation, Record
from rayward.evaluation.summary import summarise


def test_small_table_by_hand() -> None:
    records = [
        pair("a", rewards=(2.0, 1.0), lengths=(10, 4)),  # right, and the longer one
        pair("b", rewards=(0.0, 1.0), lengths=(10, 4)),  # wrong
        pair("c", rewards=(1.0, 1.0), lengths=(4, 4)),  # tie of scores and of lengths
        pair("d", rewards=(1.0, 3.0), lengths=(7, 30), ranks=(1.0, 0.0)),  # right, the better one is second
    ]
    evaluation = evaluation_of(records)
    model, longer, coin = evaluation.rows
    assert (model.num_pairs, model.num_ties, model.accuracy.value, model.accuracy_ties_half) == (4, 1, 0.5, 0.625)
    assert (longer.num_pairs, longer.num_ties, longer.accuracy.value, longer.accuracy_ties_half) == (4, 1, 0.75, 0.875)
    assert (coin.num_pairs, coin.num_ties, coin.accuracy.value, coin.accuracy_ties_half) == (4, 0, 0.5, 0.5)
    assert evaluation.over_longer.value == -0.25
    assert evaluation.margin.mean == pytest.approx((1 - 1 + 0 + 2) / 4)
    assert evaluation.chosen.mean == pytest.approx((2 + 0 + 1 + 3) / 4)
    assert evaluation.rejected.mean == pytest.approx((1 + 1 + 1 + 1) / 4)
    assert evaluation.num_rankings == 0
    assert evaluation.kendall_tau.value is None


def test_every_row_is_scored_or_named_as_an_error() -> None:
    records = [
        pair("a", rewards=(2.0, 1.0)),
        Record(id="bad", source="s", prompt_key="p", ranks=(0, 1), lengths=(1, 2), rewards=None, error_code="too_long", error="9,000"),
        Record(id="worse", source="s", prompt_key="", ranks=None, lengths=(), rewards=None, error_code="unparsable", error="not JSON"),
        Record(id="rated", source="s", prompt_key="r", ranks=None, lengths=(3,), rewards=(0.5,)),
        pair("even", rewards=(0.1, 0.2), ranks=(1.0, 1.0)),
    ]
    evaluation = evaluation_of(records)
    assert (evaluation.num_rows, evaluation.num_scored, evaluation.num_errors) == (5, 3, 2)
    assert evaluation.errors == {"too_long": 1, "unparsable": 1}
    assert [(example.id, example.message) for example in evaluation.first_errors] == [("bad", "9,000"), ("worse", "not JSON")]
    assert (evaluation.num_unranked, evaluation.num_tied, evaluation.overall.num_pairs) == (1, 1, 1)
    assert (evaluation.chosen.count, evaluation.rejected.count) == (1, 1)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [Record(id="x", source="s", prompt_key="p", ranks=(0, 1), lengths=(1, 2), rewards=None, error_code="too_long", error="")],
        [pair("even", rewards=(0.1, 0.2), ranks=(1.0, 1.0))],
    ],
)
def test_nothing_to_measure_is_an_error(records: list[Record]) -> None:
    with pytest.raises(DataError, match="no scored pair"):
        evaluation_of(records)


def test_sources_and_length_buckets_partition_the_pairs() -> None:
    evaluation = evaluation_of(make_records(300))
    for groups in (evaluation.by_source, evaluation.by_length):
        assert sum(group.num_pairs for group in groups) == evaluation.overall.num_pairs
        assert sum(group.num_ties for group in groups) == evaluation.overall.num_ties
        right = sum((group.accuracy.value or 0) * group.num_pairs for group in groups)
        assert right == pytest.approx((evaluation.overall.accuracy.value or 0) * evaluation.overall.num_pairs)
    assert sum(b.num_pairs for b in evaluation.calibration.bins) == evaluation.overall.num_pairs
    assert sum(evaluation.margin_histogram.counts["margin"]) == evaluation.overall.num_pairs
    assert sum(evaluation.reward_histogram.counts["chosen"]) == evaluation.chosen.count


def test_length_buckets_by_hand() -> None:
    gaps = [-90, -9, -1, 0, 1, 9, 90]
    records = [pair(f"r{gap}", rewards=(1.0, 0.0), lengths=(100 + gap, 100)) for gap in gaps]
    names = [(group.name, group.num_pairs) for group in evaluation_of(records).by_length]
    # Terciles of |gap| over the six unequal pairs 1, 1, 9, 9, 90, 90 are 6.33 and 36, rounded 6 and 36.
    assert names == [
        ("shorter by more than 36", 1),
        ("shorter by 7-36", 1),
        ("shorter by 1-6", 1),
        ("same length", 1),
        ("longer by 1-6", 1),
        ("longer by 7-36", 1),
        ("longer by more than 36", 1),
    ]


def test_length_buckets_do_not_depend_on_the_model() -> None:
    records = make_records(200)
    other = [r if r.rewards is None else r.model_copy(update={"rewards": tuple(-x for x in r.rewards)}) for r in records]
    first, second = evaluation_of(records), evaluation_of(other)
    buckets = [[(g.name, g.num_pairs, g.longer_wins) for g in evaluation.by_length] for evaluation in (first, second)]
    assert buckets[0] == buckets[1]
    assert (first.overall.accuracy.value or 0) + (second.overall.accuracy.value or 0) == pytest.approx(
        1 - first.overall.num_ties / first.overall.num_pairs
    )


def test_a_model_that_only_counts_characters_is_the_longer_wins_baseline() -> None:
    scored = [record for record in make_records(200) if record.rewards is not None]
    records = [record.model_copy(update={"rewards": tuple(float(n) for n in record.lengths)}) for record in scored]
    evaluation = evaluation_of(records)
    model, longer, _ = evaluation.rows
    assert model.accuracy == longer.accuracy
    assert model.num_ties == longer.num_ties
    assert evaluation.over_longer.value == 0.0
    assert evaluation.spearman_length == pytest.approx(1.0)
    assert evaluation.spearman_length_within == pytest.approx(1.0)


def test_within_prompt_correlation_ignores_what_a_reward_owes_to_the_prompt() -> None:
    # Long prompts' answers are long and get +100, but inside each pair the shorter one scores higher.
    records = [pair(f"r{i}", rewards=(100.0 * i, 100.0 * i + 1), lengths=(50 * i + 20, 50 * i + 10)) for i in range(20)]
    evaluation = evaluation_of(records)
    assert evaluation.spearman_length is not None
    assert evaluation.spearman_length > 0.9
    assert evaluation.spearman_length_within == pytest.approx(-1.0)


def test_rankings_of_more_than_two() -> None:
    perfect = Record(id="a", source="s", prompt_key="a", ranks=(0, 1, 2), lengths=(1, 1, 1), rewards=(3.0, 2.0, 1.0))
    reverse = perfect.model_copy(update={"id": "b", "prompt_key": "b", "rewards": (1.0, 2.0, 3.0)})
    silent = perfect.model_copy(update={"id": "c", "prompt_key": "c", "rewards": (1.0, 1.0, 1.0)})
    evaluation = evaluation_of([perfect, reverse, silent, perfect.model_copy(update={"prompt_key": "d"})])
    assert evaluation.num_rankings == 4
    assert evaluation.kendall_tau.value == pytest.approx((1 - 1 + 0 + 1) / 4)
    assert (evaluation.overall.num_pairs, evaluation.overall.num_comparisons, evaluation.overall.num_ties) == (12, 4, 3)


def test_intervals_are_drawn_over_prompts() -> None:
    rng = np.random.default_rng(0)
    records = []
    for prompt in range(40):
        margin = float(rng.normal())
        records += [pair(f"r{prompt}-{i}", rewards=(margin, 0.0), key=f"p{prompt}") for i in range(10)]
    clustered = evaluation_of(records).overall.accuracy
    independent = evaluation_of([record.model_copy(update={"prompt_key": record.id}) for record in records]).overall.accuracy
    assert clustered.value == independent.value
    widths = [(estimate.high or math.nan) - (estimate.low or math.nan) for estimate in (clustered, independent)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.2)


def test_same_records_and_seed_give_the_same_result_and_json_holds_all_of_it() -> None:
    records = make_records(120)
    evaluation = evaluation_of(records)
    assert evaluation_of(records) == evaluation
    assert evaluation_of(records, seed=1) != evaluation
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_constant_model_knows_nothing_but_breaks_nothing() -> None:
    records = [pair(f"r{i}", rewards=(0.5, 0.5), lengths=(i, i)) for i in range(5)]
    evaluation = summarise(records, model="m", model_version="v", data=["d"])
    assert evaluation.overall.accuracy.value == 0.0
    assert evaluation.overall.accuracy_ties_half == 0.5
    assert evaluation.spearman_length is None
    assert evaluation.calibration.log_loss == pytest.approx(math.log(2))
