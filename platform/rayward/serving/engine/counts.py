"""What a replica has counted since it started: the material of `/metrics`, the page and the autoscaling policy."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from rayward.contract.contract import Normaliser
from rayward.serving.calls import Histogram
from rayward.wire.items import ItemResult

Labels: TypeAlias = tuple[tuple[str, str], ...]
Key: TypeAlias = tuple[str, Labels]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DEVIATIONS = (-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
REWARDS = (-100.0, -50.0, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)

ITEMS = "items_total"
"""Counter: items answered, label `outcome`: `scored`, or the code of the error."""
COMPLETIONS = "completions_total"
"""Counter: completions that got a reward."""
TOKENS = "tokens_total"
"""Counter: tokens of the conversations of scored items, each counted whole."""
TOKENS_COMPUTED = "tokens_computed_total"
"""Counter: of these, what was computed after sharing prefixes."""
FORWARDS = "forwards_total"
"""Counter: forwards."""
COMPUTE_SECONDS = "compute_seconds_total"
"""Counter: seconds in which the compute thread was in a forward; its rate is the share of time that it is busy."""
REFUSALS = "refusals_total"
"""Counter: requests refused as a whole, label `reason`."""
DROPPED = "dropped_units_total"
"""Counter: units not computed because nobody waited for them any more, label `reason`: `deadline`, `cancelled`."""
ENCODER_RESTARTS = "encoder_restarts_total"
"""Counter: encoder processes replaced, label `reason`: `timeout`, `died`."""
NON_FINITE = "non_finite_total"
"""Counter: items for which the model gave NaN or Inf."""
BATCH_FILL = "batch_fill_ratio"
"""Histogram: tokens of a forward as a share of the token budget."""
FORWARD_UNITS = "forward_units"
"""Histogram: units in a forward."""
STAGE_SECONDS = "stage_seconds"
"""Histogram: of requests, label `stage`: `encode`, `queue`, `compute`, `replica` (all of it)."""
REWARD = "reward"
"""Histogram: rewards as the model gives them (weight sets and `normalise` of requests left out: only items that ask for neither count)."""
REWARD_STANDARDISED = "reward_standardised"
"""Histogram: the same in standard deviations from the mean of the contract's reference set; where there is one."""
REWARD_SUMS = "reward_sums"
"""Gauge, label `of`: sums since the start over the rewards of `reward` and the tokens of their conversations: `n`, `reward`, `reward_squared`,
`tokens`, `tokens_squared`, `reward_tokens`. Mean, deviation and correlation of any period follow from their differences."""
REWARD_MEAN = "reward_mean"
"""Gauge: over about the last thousand rewards."""
REWARD_STD = "reward_std"
"""Gauge: population standard deviation of the same."""
REWARD_LENGTH_CORRELATION = "reward_length_correlation"
"""Gauge: Pearson correlation of reward and tokens of the conversation, of the same."""
QUEUED_ITEMS = "queued_items"
"""Gauge: items that wait to be encoded or computed."""
SHADOW_TOKENS = "queued_shadow_tokens"
"""Gauge: tokens of uncharged work that wait or are computed."""
CALLERS = "waiting_callers"
"""Gauge: callers with work in the queue."""
ENCODERS = "encoder_processes"
"""Gauge: encoder processes that have loaded their tokenizer."""
HEALTHY = "healthy"
"""Gauge: 1, or 0 when the replica asks to be replaced."""

RECENT = 1000.0


@dataclass(slots=True)
class _Tally:
    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class _Moments:
    # Sums over pairs (reward, tokens); `keep` < 1 forgets the older ones.
    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, reward: float, num_tokens: int, keep: float = 1.0) -> None:
        self.n = self.n * keep + 1
        self.x = self.x * keep + reward
        self.xx = self.xx * keep + reward * reward
        self.y = self.y * keep + num_tokens
        self.yy = self.yy * keep + num_tokens * num_tokens
        self.xy = self.xy * keep + reward * num_tokens

    @property
    def variance(self) -> float:
        return max(self.xx / self.n - (self.x / self.n) ** 2, 0.0)

    @property
    def correlation(self) -> float | None:
        of_tokens = max(self.yy / self.n - (self.y / self.n) ** 2, 0.0)
        scale = math.sqrt(self.variance * of_tokens)
        return None if scale < 1e-12 else (self.xy / self.n - self.x * self.y / self.n**2) / scale


class Counts:
    """Thread-safe.

    Args:
        normaliser: of the contract, where it has one.
    """

    def __init__(self, normaliser: Normaliser | None) -> None:
        self._normaliser = normaliser
        self._lock = threading.Lock()
        self._counters: Counter[Key] = Counter()
        self._tallies: dict[Key, _Tally] = {}
        self._all = _Moments()
        self._recent = _Moments()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[_key(name, labels)] += amount  # type: ignore[assignment]

    def observe(self, name: str, value: float, bounds: tuple[float, ...] = SECONDS, **labels: str) -> None:
        """One observation of a histogram."""
        with self._lock:
            self._observe(name, value, bounds, **labels)

    def forward(self, *, num_units: int, num_tokens: int, budget: int, seconds: float) -> None:
        """One forward."""
        with self._lock:
            self._counters[_key(FORWARDS, {})] += 1
            self._counters[_key(COMPUTE_SECONDS, {})] += seconds  # type: ignore[assignment]
            self._observe(BATCH_FILL, num_tokens / budget, SHARES)
            self._observe(FORWARD_UNITS, num_units, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))

    def results(self, results: Iterable[tuple[ItemResult, bool]]) -> None:
        """Results that were sent.

        Args:
            results: and of each, whether its rewards are those of the model as it is, on its own scale.
        """
        with self._lock:
            for result, plain in results:
                outcome = "scored" if result.error is None else result.error.code
                self._counters[_key(ITEMS, {"outcome": outcome})] += 1
                if outcome == "non_finite":
                    self._counters[_key(NON_FINITE, {})] += 1
                if result.rewards is None:
                    continue
                self._counters[_key(COMPLETIONS, {})] += len(result.rewards)
                self._counters[_key(TOKENS, {})] += result.tokens
                self._counters[_key(TOKENS_COMPUTED, {})] += result.tokens_computed
                if plain:
                    self._rewards(result.rewards, result.num_tokens or ())

    def _rewards(self, rewards: Sequence[float], num_tokens: Sequence[int]) -> None:
        for index, reward in enumerate(rewards):
            self._observe(REWARD, reward, REWARDS)
            if self._normaliser is not None and self._normaliser.std > 0:
                self._observe(REWARD_STANDARDISED, (reward - self._normaliser.mean) / self._normaliser.std, DEVIATIONS)
            if index < len(num_tokens):
                self._all.add(reward, num_tokens[index])
                self._recent.add(reward, num_tokens[index], keep=1 - 1 / RECENT)

    def _observe(self, name: str, value: float, bounds: tuple[float, ...], **labels: str) -> None:
        key = _key(name, labels)
        if key not in self._tallies:
            self._tallies[key] = _Tally(bounds)
        self._tallies[key].add(value)

    def counters(self) -> dict[Key, float]:
        """All counters as they stand."""
        with self._lock:
            return dict(self._counters)

    def histograms(self) -> dict[Key, Histogram]:
        """All histograms as they stand."""
        with self._lock:
            return {key: Histogram(tally.bounds, tuple(tally.counts), tally.total) for key, tally in self._tallies.items()}

    def reward_gauges(self) -> dict[Key, float]:
        """What is known of the rewards."""
        with self._lock:
            every, recent = self._all, self._recent
            found = {
                _key(REWARD_SUMS, {"of": name}): value
                for name, value in (
                    ("n", every.n),
                    ("reward", every.x),
                    ("reward_squared", every.xx),
                    ("tokens", every.y),
                    ("tokens_squared", every.yy),
                    ("reward_tokens", every.xy),
                )
            }
            if recent.n:
                found[_key(REWARD_MEAN, {})] = recent.x / recent.n
                found[_key(REWARD_STD, {})] = math.sqrt(recent.variance)
                if recent.correlation is not None:
                    found[_key(REWARD_LENGTH_CORRELATION, {})] = recent.correlation
            return found


def _key(name: str, labels: dict[str, str]) -> Key:
    return name, tuple(sorted(labels.items()))
