"""Hand-worked values, independent references in plain Python, and partition invariance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rayward.errors import ScoringError
from rayward.evaluation.statistics import (
    Interval,
    PairSums,
    average_ranks,
    bootstrap_ratio,
    kendall_tau,
    pair_differences,
    pair_indices,
    random_scorer_interval,
    random_scorer_variance,
    spearman,
    sum_by_cluster,
    wilson_interval,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairs_are_all_completions_with_different_ranks() -> None:
    better, worse = pair_indices([2.0, 0.0, 2.0, 1.0])
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)}


def test_differences_are_better_minus_worse() -> None:
    # ranks 1, 0: the second completion is the better one.
    assert pair_differences([0.25, 1.5], [1, 0]).tolist() == [1.25]
    assert pair_differences([1.0, 2.0], [3, 3]).size == 0


@pytest.mark.parametrize("rewards", [[1.0, math.nan], [1.0, math.inf], [1.0], [1.0, 2.0, 3.0]])
def test_differences_refuse_what_is_not_one_finite_reward_per_completion(rewards: list[float]) -> None:
    with pytest.raises(ScoringError, match="one finite reward per completion"):
        pair_differences(rewards, [0, 1])


def test_accuracy_counts_ties_as_wrong_and_reports_them() -> None:
    sums = PairSums.of([2.0, 0.0, -1.0, 0.5])
    assert (sums.num_pairs, sums.num_ties) == (4, 1)
    assert sums.accuracy == 0.5
    assert sums.accuracy_ties_half == 0.625
    assert sums.mean_margin == pytest.approx(0.375)


def test_losses_at_hand_worked_differences() -> None:
    assert PairSums.of([1.5]).log_loss == pytest.approx(0.2014132780, abs=1e-10)
    assert PairSums.of([-1.5]).log_loss == pytest.approx(1.7014132780, abs=1e-10)
    assert PairSums.of([1.0]).brier == pytest.approx(0.2689414214**2, abs=1e-10)  # 1 - sigma(1)
    assert PairSums.of([-1000.0]).log_loss == 1000.0
    assert PairSums.of([-1000.0]).brier == 1.0
    assert PairSums.of([1000.0]).log_loss == 0.0


def test_constant_model_is_calibrated_and_knows_nothing() -> None:
    sums = PairSums.of(np.zeros(7))
    assert sums.accuracy == 0.0
    assert sums.accuracy_ties_half == 0.5
    assert sums.log_loss == pytest.approx(math.log(2))
    assert sums.brier == pytest.approx(0.25)
    assert sums.ece == pytest.approx(0.0)


def test_calibration_table_by_hand() -> None:
    # sigma(0.2) = 0.5498 falls into [0.5, 0.55); sigma(3) = 0.9526 into [0.95, 1); one of the two confident pairs is wrong.
    sums = PairSums.of([0.2, 3.0, -3.0], num_bins=10)
    table = sums.reliability()
    assert [row.num_pairs for row in table] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert table[0].confidence == pytest.approx(sigmoid(0.2))
    assert (table[0].low, table[0].high) == pytest.approx((0.5, 0.55))
    assert table[0].accuracy == 1.0
    assert table[9].accuracy == 0.5
    assert math.isnan(table[4].accuracy)
    expected = (abs(1.0 - sigmoid(0.2)) + 2 * abs(0.5 - sigmoid(3.0))) / 3
    assert sums.ece == pytest.approx(expected)
    assert PairSums.of([1e9]).reliability()[-1].num_pairs == 1  # confidence exactly 1 stays in the last bin


def test_no_pairs_is_undefined_not_zero() -> None:
    sums = PairSums.zero()
    for value in (sums.accuracy, sums.accuracy_ties_half, sums.mean_margin, sums.log_loss, sums.brier, sums.ece):
        assert math.isnan(value)


@pytest.mark.parametrize("cuts", [(), (1,), (5, 5, 60), (10, 50, 99), tuple(range(1, 100))])
def test_sums_of_any_partition_merge_to_the_whole(cuts: tuple[int, ...]) -> None:
    differences = np.random.default_rng(3).normal(0.4, 2.0, 100)
    differences[::9] = 0.0
    merged = PairSums.zero()
    for part in np.split(differences, cuts):
        merged = merged + PairSums.of(part)
    whole = PairSums.of(differences)
    np.testing.assert_allclose(merged.totals, whole.totals, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(merged.bins, whole.bins, rtol=1e-13, atol=1e-13)
    assert merged.accuracy == int((differences > 0).sum()) / 100
    assert merged.ece == pytest.approx(whole.ece, abs=1e-13)


def reference_average_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def test_average_ranks_and_spearman_against_a_reference() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40).astype(float).tolist(), rng.normal(size=40).tolist()
    assert average_ranks(x).tolist() == reference_average_ranks(x)
    a, b = reference_average_ranks(x), reference_average_ranks(y)
    mean = 41 / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    spread = math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))
    assert spearman(x, y) == pytest.approx(covariance / spread)


def test_spearman_by_hand() -> None:
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)); d = 1, -1, 0, 0 gives 1 - 12 / 60.
    assert spearman([1, 2, 3, 4], [20, 10, 30, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1.0)
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))
    assert math.isnan(spearman([1], [1]))


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([4, 3, 2, 1], [0, 1, 2, 3]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [0, 1, 2, 3]) == -1.0
    # One of six pairs is discordant: (5 - 1) / 6.
    assert kendall_tau([3, 4, 2, 1], [0, 1, 2, 3]) == pytest.approx(4 / 6)
    # Ranks tie two completions: 5 pairs remain on that side, all concordant: 5 / sqrt(6 * 5).
    assert kendall_tau([4, 3, 2, 1], [0, 1, 1, 2]) == pytest.approx(5 / math.sqrt(30))
    assert math.isnan(kendall_tau([1, 1, 1], [0, 1, 2]))


def test_wilson_by_hand() -> None:
    # 8 of 10: the textbook value.
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10).high == pytest.approx(1.0)


def test_bootstrap_of_independent_pairs_matches_the_normal_approximation() -> None:
    correct = np.zeros(1000)
    correct[:700] = 1
    interval = bootstrap_ratio(correct, np.ones(1000), samples=4000, seed=1)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert interval == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)


def test_bootstrap_draws_prompts_not_pairs() -> None:
    # 50 prompts of 20 pairs each; all pairs of one prompt agree, so there are 50 observations, not 1000.
    correct = np.repeat([1.0, 0.0], 25) * 20
    wide = bootstrap_ratio(correct, np.full(50, 20.0), seed=0)
    narrow = bootstrap_ratio(np.repeat([1.0, 0.0], 500), np.ones(1000), seed=0)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(math.sqrt(20), rel=0.1)


def test_bootstrap_agrees_with_plain_resampling() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 7, 60)
    correct = rng.binomial(sizes, 0.6)
    ratios = []
    for _ in range(3000):
        drawn = rng.integers(0, 60, 60)
        ratios.append(correct[drawn].sum() / sizes[drawn].sum())
    expected = np.quantile(ratios, [0.025, 0.975])
    assert bootstrap_ratio(correct, sizes, samples=3000, seed=2) == pytest.approx(tuple(expected), abs=0.012)


def test_bootstrap_is_seeded_and_ignores_cluster_order_and_empty_clusters() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 200)
    correct = rng.binomial(sizes, 0.5)
    first = bootstrap_ratio(correct, sizes, seed=7)
    assert bootstrap_ratio(correct, sizes, seed=7) == first
    assert bootstrap_ratio(correct, sizes, seed=8) != first
    assert bootstrap_ratio(correct[::-1], sizes[::-1], seed=7) == first
    assert bootstrap_ratio([*correct, 0, 0], [*sizes, 0, 0], seed=7) == first


def test_bootstrap_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=300)
    whole = bootstrap_ratio(values, np.ones(300), samples=500)
    monkeypatch.setattr("rayward.evaluation.statistics._CELLS_PER_CHUNK", 3000)
    assert bootstrap_ratio(values, np.ones(300), samples=500) == pytest.approx(whole)


def test_bootstrap_never_claims_certainty() -> None:
    assert bootstrap_ratio(np.ones(10), np.ones(10)) == wilson_interval(10, 10)
    assert bootstrap_ratio([3.0], [4.0]) == wilson_interval(0.75, 1)
    low, high = bootstrap_ratio(np.ones(10), np.ones(10), bounds=(-1.0, 1.0))
    assert (low, high) == pytest.approx((2 * wilson_interval(10, 10).low - 1, 1.0))
    assert all(math.isnan(end) for end in bootstrap_ratio([0.0], [0.0]))


def test_sum_by_cluster() -> None:
    assert sum_by_cluster([2, 0, 2], [1.0, 5.0, 2.5]).tolist() == [5.0, 0.0, 3.5]


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2], [0, 1, 1], [0, 0, 1, 2], [3, 1, 2, 0], [1, 1, 1]])
def test_random_scorer_variance_equals_enumeration(ranks: list[float]) -> None:
    counts = [sum(p[i] > p[j] for i, j in zip(*pair_indices(ranks), strict=True)) for p in itertools.permutations(range(len(ranks)))]
    assert random_scorer_variance(ranks) == pytest.approx(float(np.var(counts)))


def test_random_scorer_interval_by_hand() -> None:
    # 100 single pairs: variance 25, standard deviation of the share 0.05.
    assert random_scorer_interval(25.0, 100) == pytest.approx((0.5 - 0.098, 0.5 + 0.098), abs=1e-4)
    assert random_scorer_interval(0.25, 1) == Interval(0.0, 1.0)
