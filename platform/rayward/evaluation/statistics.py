"""How good a reward model ranks: pure functions over numpy arrays, and sums that merge.

Legend: K completions of one comparison, P pairs, C clusters (prompts), B calibration bins.

A *pair* is two completions of one comparison with different ranks; its *difference* is reward(better) - reward(worse), so
positive is correct. Equal rewards are a *tie*: wrong in `accuracy`, half right in `accuracy_ties_half` and in calibration
(a tie says "one half"). Undefined values (no pairs, no spread) are NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from rayward.errors import ScoringError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NUM_BINS = 10
"""Calibration bins of equal width over the confidences 0.5 … 1."""

ELO_PER_REWARD = 400.0 / math.log(10.0)
"""Elo points per unit of a Bradley-Terry reward: both say how often one completion wins against another (arXiv 2204.05862)."""

_NORMAL_975 = 1.959963984540054
_CELLS_PER_CHUNK = 4_000_000


class Interval(NamedTuple):
    """Lower and upper end of a 95 % interval."""

    low: float
    high: float


class ReliabilityBin(NamedTuple):
    """Pairs whose confidence lies in [low, high): how sure the model was, and how often it was right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    accuracy: float


def pair_indices(ranks: Sequence[float]) -> tuple[Ints, Ints]:
    """Indices (better, worse), each int64 [P], of every two completions with different ranks; lower ranks are better."""
    values = np.asarray(ranks, dtype=np.float64)
    better, worse = np.nonzero(values[:, None] < values[None, :])
    return better.astype(np.int64), worse.astype(np.int64)


def pair_differences(rewards: Sequence[float], ranks: Sequence[float]) -> Floats:
    """reward(better) - reward(worse) for every pair of one comparison, float64 [P].

    Raises:
        ScoringError: a reward is not finite, or there are not as many rewards as ranks.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(ranks),) or not np.isfinite(values).all():
        raise ScoringError(
            f"rewards {list(rewards)} for {len(ranks)} ranked completions; the rule is one finite reward per completion",
            remedy="count the comparison as an error instead of measuring it",
        )
    better, worse = pair_indices(ranks)
    return values[better] - values[worse]


@dataclass(frozen=True, eq=False)
class PairSums:
    """Everything that averages over pairs, as sums: `a + b` equals the sums over both sets of pairs.

    Attributes:
        totals: float64 [6]: pairs, correct, ties, difference, log loss, Brier.
        bins: float64 [B, 3]: pairs, confidence, correct (ties half) by confidence sigma(|difference|).
    """

    totals: Floats
    bins: Floats

    @classmethod
    def zero(cls, num_bins: int = NUM_BINS) -> Self:
        """The sums over no pairs."""
        return cls(np.zeros(6), np.zeros((num_bins, 3)))

    @classmethod
    def of(cls, differences: npt.ArrayLike, num_bins: int = NUM_BINS) -> Self:
        """Sums over pairs given by their reward differences [P]."""
        delta = np.asarray(differences, dtype=np.float64)
        correct, tie = delta > 0, delta == 0
        # softplus instead of log(sigmoid): a difference of -1000 costs 1000, not infinity.
        wrong_probability = np.exp(-np.logaddexp(0.0, delta))
        totals = np.array(
            [
                delta.size,
                correct.sum(),
                tie.sum(),
                delta.sum(),
                np.logaddexp(0.0, -delta).sum(),
                np.square(wrong_probability).sum(),
            ],
            dtype=np.float64,
        )
        confidence = np.exp(-np.logaddexp(0.0, -np.abs(delta)))
        index = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)
        columns = (np.ones_like(delta), confidence, correct + 0.5 * tie)
        bins = np.stack([np.bincount(index, column, num_bins) for column in columns], axis=1).astype(np.float64)
        return cls(totals, bins)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.totals + other.totals, self.bins + other.bins)

    @property
    def num_pairs(self) -> int:
        return int(self.totals[0])

    @property
    def num_ties(self) -> int:
        return int(self.totals[2])

    @property
    def accuracy(self) -> float:
        """Share of pairs with a positive difference; ties are wrong."""
        return self._mean(self.totals[1])

    @property
    def accuracy_ties_half(self) -> float:
        """Like `accuracy`, with a tie worth one half."""
        return self._mean(self.totals[1] + 0.5 * self.totals[2])

    @property
    def mean_margin(self) -> float:
        """Mean difference."""
        return self._mean(self.totals[3])

    @property
    def log_loss(self) -> float:
        """Mean softplus(-difference): the Bradley-Terry loss in nats; log 2 for a constant model."""
        return self._mean(self.totals[4])

    @property
    def brier(self) -> float:
        """Mean (1 - sigma(difference))^2; 0.25 for a constant model."""
        return self._mean(self.totals[5])

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |confidence - accuracy| over bins, weighted by their pairs."""
        return self._mean(float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()))

    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """The calibration table, one row per bin; confidence and accuracy of an empty bin are NaN."""
        edges = np.linspace(0.5, 1.0, len(self.bins) + 1).tolist()
        return tuple(
            ReliabilityBin(low, high, int(count), confidence / count if count else math.nan, correct / count if count else math.nan)
            for low, high, (count, confidence, correct) in zip(edges[:-1], edges[1:], self.bins.tolist(), strict=True)
        )

    def _mean(self, total: float) -> float:
        return float(total / self.totals[0]) if self.totals[0] else math.nan


def average_ranks(values: npt.ArrayLike) -> Floats:
    """1-based ranks from small to large, float64 [N]; equal values share the mean of their places."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2.0)[inverse]
    return ranks


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation with averaged ties; NaN when either side has no spread."""
    a, b = average_ranks(x), average_ranks(y)
    if a.size < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def kendall_tau(rewards: Sequence[float], ranks: Sequence[float]) -> float:
    """Kendall's tau-b between rewards and (negated) ranks of one comparison; NaN when either side is all ties.

    1 means that the rewards give exactly the ranking, -1 exactly its reverse.
    """
    values, order = np.asarray(rewards, dtype=np.float64), -np.asarray(ranks, dtype=np.float64)
    upper = np.triu_indices(len(values), 1)
    signs = np.sign(values[:, None] - values[None, :])[upper]
    order_signs = np.sign(order[:, None] - order[None, :])[upper]
    scale = math.sqrt(float(np.abs(signs).sum()) * float(np.abs(order_signs).sum()))
    return float(signs @ order_signs) / scale if scale else math.nan


def wilson_interval(successes: float, trials: float) -> Interval:
    """Wilson's 95 % interval of a share; (0, 1) without trials."""
    if trials <= 0:
        return Interval(0.0, 1.0)
    z2 = _NORMAL_975**2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _NORMAL_975 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    return Interval(low, 1.0 if successes == trials else min(centre + half, 1.0))


def sum_by_cluster(clusters: npt.ArrayLike, values: npt.ArrayLike) -> Floats:
    """Sums of values [N] by cluster number [N], float64 [largest number + 1]."""
    return np.bincount(np.asarray(clusters, dtype=np.int64), np.asarray(values, dtype=np.float64)).astype(np.float64)


def bootstrap_ratio(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    *,
    samples: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """95 % percentile interval of sum(numerators) / sum(denominators) when the clusters are drawn again with replacement.

    Pairs of one prompt are not independent, so prompts are drawn, not pairs. The statistic depends only on how often each
    distinct (numerator, denominator) is drawn; hence one multinomial over distinct clusters gives the exact
    bootstrap in time that does not grow with the number of prompts. Where all clusters agree (one prompt, or
    all correct) resampling would claim certainty; Wilson's interval over the clusters is returned instead.

    Args:
        numerators, denominators: sums per cluster [C]; clusters with denominator 0 carry nothing and are left out.
        samples: number of resamples.
        seed: the same seed gives the same interval.
        bounds: the range of the ratio, for Wilson's interval.
    """
    table = np.stack([np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1)
    table = table[table[:, 1] > 0]
    num_clusters = len(table)
    low, high = bounds
    if num_clusters == 0:
        return Interval(math.nan, math.nan)
    ratios = table[:, 0] / table[:, 1]
    if np.ptp(ratios) < 1e-12:
        share = (float(ratios[0]) - low) / (high - low)
        wilson = wilson_interval(share * num_clusters, num_clusters)
        return Interval(low + wilson.low * (high - low), low + wilson.high * (high - low))
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    chunk = max(_CELLS_PER_CHUNK // len(kinds), 1)
    drawn = [
        rng.multinomial(num_clusters, counts / num_clusters, size=min(chunk, samples - start)) @ kinds for start in range(0, samples, chunk)
    ]
    sums = np.concatenate(drawn)
    ends = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return Interval(float(ends[0]), float(ends[1]))


def random_scorer_variance(ranks: Sequence[float]) -> float:
    """Variance of the number of correct pairs of one comparison under independent random rewards.

    A pair is correct with variance 1/4. Two pairs with a common better (or a common worse) completion have covariance
    1/3 - 1/4, two pairs that chain (the worse of one is the better of the other) 1/6 - 1/4. Without ties
    this is Kendall's K (K - 1) (2 K + 5) / 72.
    """
    better, worse = pair_indices(ranks)
    above = np.bincount(better, minlength=len(ranks)).astype(np.float64)
    below = np.bincount(worse, minlength=len(ranks)).astype(np.float64)
    shared = (above * (above - 1) + below * (below - 1)) / 2 - above * below
    return better.size / 4 + float(shared.sum()) / 6


def random_scorer_interval(variance: float, num_pairs: int) -> Interval:
    """Where the accuracy of 95 % of random scorers falls (normal approximation), given the summed variance."""
    if num_pairs == 0:
        return Interval(math.nan, math.nan)
    half = _NORMAL_975 * math.sqrt(variance) / num_pairs
    return Interval(max(0.5 - half, 0.0), min(0.5 + half, 1.0))
