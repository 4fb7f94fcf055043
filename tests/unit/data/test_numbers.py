"""Numbers far from all others, and the distribution that says so."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayward.contract.conversation import Message
from rayward.data.formats.table import SourceOptions
from rayward.data.prepare.numbers import Sketch, bound_of, bounds_of, described, has_outliers, quarantine_outliers, sketches_of, value_of
from rayward.data.prepare.report import most_frequent
from rayward.data.prepare.rows import ENCODED_SCHEMA, READ_SCHEMA, Adaptation, adapt
from rayward.data.prepare.tally import Tally
from rayward.data.record import LARGEST_NUMBER, BadRow, Comparison, RowRejected, validate


def table(*rows: dict[str, Any]) -> pa.Table:
    defaults = {"kind": "row", "split": "train", "weight": 1.0, "source": "s"}
    return pa.Table.from_pylist([{**defaults, "number": n, **row} for n, row in enumerate(rows, 1)], schema=ENCODED_SCHEMA)


def sketch(*values: float) -> Sketch:
    return sketches_of(table(*({"strength": value} for value in values)))["strength"]


def test_the_sketch_of_the_whole_is_the_sum_of_its_parts_in_any_order() -> None:
    values = [*np.random.default_rng(0).normal(0, 50, 300).tolist(), 0.0, 0.0, 1e30, -1e-30]
    whole = sketch(*values)
    random.Random(1).shuffle(values)
    parts = [sketch(*values[start : start + 7]) for start in range(0, len(values), 7)]
    carried = [Sketch.from_json(json.loads(json.dumps(part.as_json()))) for part in parts]
    assert reduce(add, carried) == whole
    assert (whole.smallest, whole.largest) == (float(np.min(np.array(values, np.float32))), float(np.float32(1e30)))
    tallies = [Tally.of(table({"strength": value})) for value in values]
    assert Tally.merged(tallies).numbers["strength"] == whole


@pytest.mark.parametrize("value", [1.0, -1.0, 2.0, 0.3, -7.5, 1e30, 1e-30, 12345.678])
def test_a_bin_is_named_by_its_end_nearer_to_zero(value: float) -> None:
    (key,) = sketch(value).bins
    assert value_of(key) == pytest.approx(value, rel=0.045)
    assert abs(value_of(key)) <= abs(value) * (1 + 1e-6)
    assert value_of(next(iter(sketch(1.0).bins))) == 1.0


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([1.0] * 10, 1000.0),
        ([1.0] * 9 + [1e8], 1000.0),
        ([-2.0] * 5 + [2.0] * 4, 2000.0),
        # Nothing is far from the others where all are large.
        ([65536.0] * 10, 65_536_000.0),
        # Zeros say nothing of the size of the others, unless there are hardly any.
        ([0.0] * 5 + [64.0] * 5, 64_000.0),
        ([0.0] * 9 + [1e6], 1000.0),
        ([0.0] * 97 + [1e6] * 3, 1000.0),
        ([1.0, 1e6], LARGEST_NUMBER),
        ([1e8] * 5, LARGEST_NUMBER),
    ],
)
def test_the_bound_by_hand(values: list[float], largest: float) -> None:
    assert bound_of(sketch(*values), 1000.0).largest == pytest.approx(largest, rel=1e-6)
    assert bound_of(sketch(*values), None).largest == LARGEST_NUMBER


def quarantined(rows: list[dict[str, Any]], factor: float | None = 1000.0) -> dict[int, str]:
    encoded = table(*rows)
    sketches = sketches_of(encoded)
    bounds = {name: bound_of(each, factor) for name, each in sketches.items()}
    after = quarantine_outliers(encoded, bounds)
    out = {row["number"]: row["detail"] for row in after.to_pylist() if row["reason"] == "outlier"}
    assert bool(out) == has_outliers(sketches, bounds)
    assert all((row["split"] is None) == (row["number"] in out) for row in after.to_pylist())
    untouched = [name for name in encoded.column_names if name not in ("split", "reason", "detail")]
    assert str(after.select(untouched).to_pylist()) == str(encoded.select(untouched).to_pylist())
    return out


@pytest.mark.parametrize("column", ["margin", "strength", "weight"])
def test_a_number_far_from_all_others_is_quarantined(column: str) -> None:
    rows: list[dict[str, Any]] = [{column: 1.0} for _ in range(9)]
    assert quarantined(rows) == {}
    assert quarantined([*rows, {column: 1000.0}]) == {}
    out = quarantined([*rows, {column: 1e6}, {column: 1.0}])
    assert list(out) == [10]
    assert f"{column} 1e+06" in out[10]
    assert "1000 times (data.outlier_factor) 1" in out[10]
    assert quarantined([*rows, {column: 1e6}], factor=None) == {}
    assert quarantined([*rows, {column: 1e6}], factor=1e7) == {}


def test_a_rating_far_from_all_others_is_quarantined_by_its_column() -> None:
    rows = [{"attributes": [[1.0, 5e5], [2.0, math.nan]]} for _ in range(5)]
    assert quarantined(rows) == {}
    out = quarantined([*rows, {"attributes": [[1.0, 1.0], [-3e5, 2.0]]}])
    assert list(out) == [6]
    assert "rating 0 -300000" in out[6]


def test_a_range_of_ratings_is_their_bound() -> None:
    sketches = sketches_of(table(*({"attributes": [[value], [value]], "margin": value} for value in (1.0, 1.0, 1.0, 1e5))))
    assert bounds_of(sketches, 1000.0)["rating 0"].largest == 1000.0
    ranged = bounds_of(sketches, 1000.0, rated=False)
    assert (ranged["rating 0"].largest, ranged["margin"].largest) == (LARGEST_NUMBER, 1000.0)


def test_rows_that_are_out_already_stay_what_they_are() -> None:
    encoded = table(*({"weight": 1.0} for _ in range(5)), {"weight": 1e8, "split": None, "reason": "tie", "detail": "d"})
    sketches = sketches_of(encoded)
    assert sketches["weight"].largest == 1.0
    bounds = {name: bound_of(each, 1000.0) for name, each in sketches.items()}
    assert quarantine_outliers(encoded, bounds) == encoded


@pytest.mark.parametrize(
    "row",
    [
        {"margin": 1e30}, {"margin": -1e30}, {"strength": 1e10}, {"weight": 3e38}, {"attributes": [{"a": 1e30}, {"a": 1}]},
    ],
)  # fmt: skip
def test_a_number_beyond_any_use_is_refused_where_the_row_is_read(row: dict[str, Any]) -> None:
    raw = {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], **row}
    read = pa.Table.from_pylist([{"kind": "row", "role": "train", "file": "f", "number": 1, "raw": json.dumps(raw)}], schema=READ_SCHEMA)
    (draft,) = adapt(read, Adaptation({"f": ("ranking", SourceOptions("set", attributes=("a",)))}, "quarantine"))
    assert draft.reason == "outlier"
    assert "1e+09" in (draft.detail or "")
    base = Comparison("x", "s", (Message(role="user", content="q"),), ("a", "b"), (0.0, 1.0))
    validate(base, ties="quarantine")
    with pytest.raises(RowRejected) as caught:
        validate(Comparison("x", "s", base.prompt, base.completions, base.ranks, weight=1e30), ties="quarantine")
    assert caught.value.reason is BadRow.OUTLIER


def test_the_distribution_by_hand() -> None:
    values = [float(value) for value in range(1, 101)]
    rows = table(*({"strength": value, "attributes": [[value], [-value]]} for value in values))
    sketches = sketches_of(rows)
    bounds = {name: bound_of(each, 1000.0) for name, each in sketches.items()}
    facts = described(sketches, bounds, ("helpfulness",))
    assert list(facts) == ["rating helpfulness", "strength", "weight"]
    assert (facts["strength"]["values"], facts["strength"]["smallest"], facts["strength"]["largest"]) == (100, 1.0, 100.0)
    shown = [facts["strength"][name] for name in ("p1", "p50", "p99")]
    assert shown == pytest.approx([1, 50, 99], rel=0.045)
    assert (facts["rating helpfulness"]["values"], facts["rating helpfulness"]["smallest"]) == (200, -100.0)


def test_the_most_frequent_reasons_have_an_example_each() -> None:
    counts = Counter({"unparsable": 2, "tie": 50, "outlier": 7, "missing_field": 9, "too_long": 1})
    examples = {
        reason: [{"file": f"{reason}.jsonl", "row": 3, "detail": f"about {reason}"}, {"file": "other", "row": 4, "detail": "second"}]
        for reason in ("missing_field", "outlier", "tie")
    }
    text = most_frequent(counts, examples, ("tie",))
    assert [line.strip().split(" ")[0] for line in text.splitlines()[1:] if not line.strip().startswith("for example")] == [
        "missing_field", "outlier", "unparsable",
    ]  # fmt: skip
    assert "for example row 3 of missing_field.jsonl: about missing_field" in text
    assert "data.outlier_factor" in text
    assert "second" not in text
    assert "tie.jsonl" not in text
