"""What a replica counts: the material of `/metrics`, the page and the autoscaling policy. The names are those of `serving.metrics`."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayward.contract.contract import Normaliser
from rayward.serving.calls import Stats
from rayward.serving.metrics import Recorder
from rayward.wire.dialect import Timings
from rayward.wire.items import Asked, ItemResult, ScoreItem

RECENT = 1000.0
"""About so many rewards are behind the gauges of mean, deviation and correlation."""

PLAIN = Asked()


@dataclass(slots=True)
class _Moments:
    # Sums over pairs (reward, tokens); `keep` < 1 forgets the older ones.
    n: float = 0.0
    reward: float = 0.0
    reward_squared: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0
    reward_tokens: float = 0.0

    def add(self, reward: float, num_tokens: int, keep: float = 1.0) -> None:
        self.n = self.n * keep + 1
        self.reward = self.reward * keep + reward
        self.reward_squared = self.reward_squared * keep + reward * reward
        self.tokens = self.tokens * keep + num_tokens
        self.tokens_squared = self.tokens_squared * keep + num_tokens * num_tokens
        self.reward_tokens = self.reward_tokens * keep + reward * num_tokens

    @property
    def variance(self) -> float:
        return max(self.reward_squared / self.n - (self.reward / self.n) ** 2, 0.0)

    @property
    def correlation(self) -> float | None:
        of_tokens = max(self.tokens_squared / self.n - (self.tokens / self.n) ** 2, 0.0)
        scale = math.sqrt(self.variance * of_tokens)
        return None if scale < 1e-12 else (self.reward_tokens / self.n - self.reward * self.tokens / self.n**2) / scale


class Counts(Recorder):
    """The counts of one replica, from any of its threads.

    Args:
        source: unique name of the replica.
        normaliser: of the contract, where it has one.
    """

    def __init__(self, source: str, *, model: str, version: str, normaliser: Normaliser | None) -> None:
        super().__init__(source, "replica", model=model, version=version)
        self._normaliser = normaliser
        self._moments_lock = threading.Lock()
        self._all, self._recent = _Moments(), _Moments()
        if normaliser is not None:
            self.set("reference_mean", normaliser.mean)
            self.set("reference_std", normaliser.std)

    def forward(self, *, num_units: int, num_tokens: int, budget: int, seconds: float) -> None:
        """One forward."""
        self.add("forwards_total")
        self.add("compute_seconds_total", seconds)
        self.observe("batch_fill_ratio", num_tokens / budget)
        self.observe("forward_units", num_units)

    def answered(self, items: Sequence[ScoreItem], results: Sequence[ItemResult], timings: Timings) -> None:
        """One request; of rewards, only those count that are asked for on the model's own scale and by its own weights."""
        for stage, seconds in (("encode", timings.encode_s), ("queue", timings.queue_s), ("compute", timings.compute_s)):
            self.observe("stage_seconds", seconds, stage=stage)
        self.observe("stage_seconds", timings.total_s, stage="replica")
        for item, result in zip(items, results, strict=True):
            self.add("items_total", outcome="scored" if result.error is None else result.error.code)
            if result.error is not None and result.error.code == "non_finite":
                self.add("non_finite_total")
            if result.rewards is None:
                continue
            self.add("completions_total", len(result.rewards))
            self.add("tokens_total", result.tokens)
            self.add("tokens_computed_total", result.tokens_computed)
            if item.asked == PLAIN:
                self._rewards(zip(result.rewards, result.num_tokens or (), strict=False))

    def _rewards(self, rewards: Iterable[tuple[float, int]]) -> None:
        for reward, num_tokens in rewards:
            self.observe("reward", reward)
            if self._normaliser is not None and self._normaliser.std > 0:
                self.observe("reward_standardised", (reward - self._normaliser.mean) / self._normaliser.std)
            with self._moments_lock:
                self._all.add(reward, num_tokens)
                self._recent.add(reward, num_tokens, keep=1 - 1 / RECENT)

    def stats(self) -> Stats:
        """All of it as it stands."""
        with self._moments_lock:
            every, recent = self._all, self._recent
            for name in _Moments.__slots__:
                self.set("reward_sums", getattr(every, name), of=name)
            if recent.n:
                self.set("reward_mean", recent.reward / recent.n)
                self.set("reward_std", math.sqrt(recent.variance))
                if recent.correlation is not None:
                    self.set("reward_length_correlation", recent.correlation)
        return super().stats()
