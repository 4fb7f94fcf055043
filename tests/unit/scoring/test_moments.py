"""Mean and deviation of numbers that are never together, against the standard library."""

from __future__ import annotations

import random
import statistics

import pytest

from rayward.scoring.moments import Moments


@pytest.mark.parametrize(
    ("centre", "spread", "accuracy"),
    # A sum of squares less the square of the sum would have nothing left of the second and the third.
    [(0.0, 1.0, 1e-12), (1e9, 1e-3, 1e-5), (-3.5, 1e-12, 1e-3), (1e-100, 1e-100, 1e-12), (0.0, 1e150, 1e-12)],
)
def test_parts_in_any_order_give_what_all_together_give(centre: float, spread: float, accuracy: float) -> None:
    draw = random.Random(0)
    values = [draw.gauss(centre, spread) for _ in range(5000)]
    cuts = sorted(draw.sample(range(5000), 20))
    parts = [Moments.of(values[start:stop]) for start, stop in zip([0, *cuts], [*cuts, 5000], strict=True)]
    draw.shuffle(parts)
    whole = Moments()
    for part in parts:
        whole = whole.plus(Moments.model_validate_json(part.model_dump_json()))
    for found in (whole, Moments.of(values)):
        assert found.count == 5000
        assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-13, abs=1e-13 * spread)
        assert found.deviation == pytest.approx(statistics.pstdev(values), rel=accuracy)


def test_equal_numbers_have_no_spread_and_nothing_has_none_either() -> None:
    assert Moments.of([0.1] * 7).plus(Moments.of([0.1] * 3)).deviation == 0.0
    assert Moments.of([]).plus(Moments.of([])) == Moments()
    assert (Moments().deviation, Moments.of([3.0]).deviation) == (0.0, 0.0)
    assert Moments().plus(Moments.of([1.0, 3.0])) == Moments.of([1.0, 3.0]).plus(Moments())
