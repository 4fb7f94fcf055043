"""From every process's counts to one picture: each sends its `Stats` to the manager, whose `Board` keeps the newest and a short past.

    process:  await report_forever(recorder.stats, send)          a call by handle every second
    manager:  board.report(stats)    board.stats() -> /metrics    board.rewards(model, version) -> what drifted

The board adds up what grew between two reports of one process, so that a process which dies takes nothing of the past with it, and a new
one adds nothing that it had counted before. No Ray and no torch; the clock is given.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from rayward.serving.calls import Histogram, Stats
from rayward.serving.metrics import Key, Labels, Recorder
from rayward.serving.routes import RouteTable

logger = logging.getLogger("ray.serve")

REPORT_PERIOD_S = 1.0
EXPIRY_S = 10.0
"""A process that has said nothing for so long is gone."""

STEP_S = 5.0
WINDOW_S = 600.0

DRIFT_THRESHOLD = 2.0
"""Of |window_reward_drift|, in reference deviations: beyond it, most rewards lie where nobody has calibrated the model."""

CORRELATION_THRESHOLD = 0.6
"""Of |window_reward_length_correlation|: beyond it, more than a third of the variance of the rewards is explained by length alone."""

SPREAD_THRESHOLD = 0.25
"""Of window_reward_spread: below it, the rewards hardly tell one text from another any more."""

MIN_REWARDS = 200
"""Fewer rewards in a window than these say nothing about drift; the derived gauges are absent then."""


async def report_forever(
    take: Callable[[], Stats],
    send: Callable[[Stats], Awaitable[object]],
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    period_s: float = REPORT_PERIOD_S,
    timeout_s: float = EXPIRY_S,
) -> None:
    """Send what a process has counted, every period, until cancelled. A manager that is away is logged once and then waited for.

    Args:
        take: the newest counts.
        send: a call of the manager's `report`; whatever it raises is no reason to stop.
    """
    away = False
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                await send(take())
        # Broad on purpose: scoring goes on whatever becomes of the manager, and counts are sent whole the next time.
        except Exception as exc:
            if not away:
                logger.warning("counts do not reach the manager (%s); scoring goes on, they are sent later", type(exc).__name__)
            away = True
        else:
            away = False
        await sleep(period_s)


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards that one version gave within the window.

    Attributes:
        num: how many.
        mean, std: of raw rewards; std of the population.
        length_correlation: Pearson's, of reward and tokens of the conversation; None where one of them does not vary.
        drift: (mean - reference mean) / reference std; spread: std / reference std; None without a reference.
    """

    num: int
    mean: float
    std: float
    length_correlation: float | None = None
    drift: float | None = None
    spread: float | None = None

    @property
    def are_enough(self) -> bool:
        """Whether there are so many that drift and correlation say something."""
        return self.num >= MIN_REWARDS


@dataclass(slots=True)
class _Step:
    # What grew in one step, by (model, version) of the process and key of the metric.
    start_s: float
    counters: dict[tuple[str, str, Key], float] = field(default_factory=dict)
    histograms: dict[tuple[str, str, Key], Histogram] = field(default_factory=dict)
    queued: dict[str, tuple[str, str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest counts of a process, and when they came."""

    stats: Stats
    at_s: float


class Board:
    """The newest counts of every process, and what grew in the last ten minutes.

    Args:
        clock: monotonic seconds; the machines' own clocks are never compared.
    """

    def __init__(
        self, clock: Callable[[], float], *, expiry_s: float = EXPIRY_S, window_s: float = WINDOW_S, step_s: float = STEP_S
    ) -> None:
        self._clock, self._expiry_s, self._window_s, self.step_s = clock, expiry_s, window_s, step_s
        self._began_at = time.time()
        self._heard: dict[str, Heard] = {}
        self._steps: deque[_Step] = deque()

    def report(self, stats: Stats) -> None:
        """Take the counts of a process. Older ones than those that are here, which overtook them, are left out."""
        now = self._clock()
        before = self._heard.get(stats.source)
        if before is not None and stats.taken_at < before.stats.taken_at and now - before.at_s < self._expiry_s:
            return
        self._heard[stats.source] = Heard(stats, now)
        step = self._step(now)
        if before is not None:
            _add_growth(step, before.stats, stats)
        queued = stats.gauges.get(("queued_tokens", ()))
        if queued is not None:
            step.queued[stats.source] = (stats.model, stats.version, queued)
        for source in [source for source, heard in self._heard.items() if now - heard.at_s > self._window_s]:
            del self._heard[source]

    def heard(self) -> list[Heard]:
        """Of every process that lives."""
        now = self._clock()
        return [heard for heard in self._heard.values() if now - heard.at_s <= self._expiry_s]

    def age_s(self, heard: Heard) -> float:
        """How old a report is."""
        return max(0.0, self._clock() - heard.at_s)

    def stats(self, table: RouteTable | None = None) -> list[Stats]:
        """The newest of every living process, and the board's own: replicas, states and shares of versions, drift."""
        return [*(heard.stats for heard in self.heard()), self._summary(table)]

    def grown(self, name: str, *, since_s: float, model: str | None = None, version: str | None = None) -> dict[Labels, float]:
        """How much a counter, or a sum that may fall, has grown, by its labels, over all processes or those of one version."""
        found: dict[Labels, float] = {}
        for step in self._since(since_s):
            for (of_model, of_version, (metric, labels)), amount in step.counters.items():
                if metric == name and model in (None, of_model) and version in (None, of_version):
                    found[labels] = found.get(labels, 0.0) + amount
        return found

    def rate(
        self,
        name: str,
        *,
        since_s: float = 2 * STEP_S,
        model: str | None = None,
        version: str | None = None,
        only: Collection[Labels] | None = None,
    ) -> float:
        """A counter's growth per second; `only` with some of its labels."""
        grown = self.grown(name, since_s=since_s, model=model, version=version)
        return sum(amount for labels, amount in grown.items() if only is None or labels in only) / self._covered_s(since_s)

    def observed(self, name: str, *, since_s: float, model: str | None = None, version: str | None = None) -> dict[Labels, Histogram]:
        """The observations that a histogram has gained, by its labels."""
        found: dict[Labels, Histogram] = {}
        for step in self._since(since_s):
            for (of_model, of_version, (metric, labels)), gained in step.histograms.items():
                if metric == name and model in (None, of_model) and version in (None, of_version):
                    found[labels] = added(found[labels], gained) if labels in found else gained
        return found

    def rewards(self, model: str, version: str, reference: tuple[float, float] | None = None) -> Rewards | None:
        """What a version's rewards of the window look like; None where there are none.

        Args:
            reference: mean and standard deviation of the rewards of the contract's reference set.
        """
        sums = {
            dict(labels).get("of", ""): amount
            for labels, amount in self.grown("reward_sums", since_s=self._window_s, model=model, version=version).items()
        }
        num = round(sums.get("n", 0.0))
        if num <= 0:
            return None
        mean, length = sums.get("reward", 0.0) / num, sums.get("tokens", 0.0) / num
        std = math.sqrt(max(0.0, sums.get("reward_squared", 0.0) / num - mean * mean))
        length_std = math.sqrt(max(0.0, sums.get("tokens_squared", 0.0) / num - length * length))
        # Below these the difference of two large sums is rounding.
        varies = std > 1e-6 * abs(mean) and length_std > 1e-6 * length
        correlation = (sums.get("reward_tokens", 0.0) / num - mean * length) / (std * length_std) if varies else None
        if reference is not None and not reference[1] > 0.0:
            reference = None
        return Rewards(
            num=num,
            mean=mean,
            std=std,
            length_correlation=None if correlation is None else max(-1.0, min(1.0, correlation)),
            drift=None if reference is None else (mean - reference[0]) / reference[1],
            spread=None if reference is None else std / reference[1],
        )

    def past(self, since_s: float) -> Iterator[tuple[float, Mapping[str, float]]]:
        """Of every whole step of the past, its age in seconds, and tokens/s, completions/s and queued tokens of all replicas."""
        now = self._clock()
        steps = {round(step.start_s / self.step_s): step for step in self._since(since_s)}
        last = math.floor(now / self.step_s)
        for number in range(last - int(since_s / self.step_s), last):
            step = steps.get(number)
            yield (
                now - number * self.step_s,
                {
                    "tokens_per_s": _sum_of(step, "tokens_computed_total") / self.step_s,
                    "completions_per_s": _sum_of(step, "completions_total") / self.step_s,
                    "queued_tokens": 0.0 if step is None else sum(queued for _, _, queued in step.queued.values()),
                },
            )

    def _step(self, now: float) -> _Step:
        start = math.floor(now / self.step_s) * self.step_s
        if not self._steps or self._steps[-1].start_s < start:
            self._steps.append(_Step(start))
        while self._steps[0].start_s < now - self._window_s - self.step_s:
            self._steps.popleft()
        return self._steps[-1]

    def _since(self, since_s: float) -> list[_Step]:
        oldest = self._clock() - since_s
        return [step for step in self._steps if step.start_s + self.step_s > oldest]

    def _covered_s(self, since_s: float) -> float:
        # Steps are taken whole, and the newest one has only begun.
        steps, now = self._since(since_s), self._clock()
        return max(self.step_s, now - steps[0].start_s) if steps else self.step_s

    def _summary(self, table: RouteTable | None) -> Stats:
        recorder = Recorder("manager", "manager")
        recorder.set("start_time_seconds", self._began_at)
        living = [heard.stats for heard in self.heard() if heard.stats.role == "replica"]
        for model, version in sorted({(stats.model, stats.version) for stats in living} | _in_table(table)):
            named = {"model": model, "version": version}
            recorder.set("replicas", sum((stats.model, stats.version) == (model, version) for stats in living), **named)
            rewards = self.rewards(model, version, reference_of(table, model, version))
            recorder.set("window_rewards", 0 if rewards is None else rewards.num, **named)
            if rewards is not None and rewards.are_enough:
                values = {
                    "window_reward_mean": rewards.mean,
                    "window_reward_std": rewards.std,
                    "window_reward_length_correlation": rewards.length_correlation,
                    "window_reward_drift": rewards.drift,
                    "window_reward_spread": rewards.spread,
                }
                for name, value in values.items():
                    if value is not None:
                        recorder.set(name, value, **named)
        for model, routes in table.models.items() if table is not None else ():
            for version, release in routes.releases.items():
                recorder.set("version_state", 1, model=model, version=version, state=release.state)
                for part, share in parts_of(table, model, version).items():
                    recorder.set("version_share", share, model=model, version=version, part=part)
        return recorder.stats()


def parts_of(table: RouteTable | None, model: str, version: str) -> dict[str, float]:
    """The parts of a version, and the share of the unpinned requests that each is meant for."""
    routes = None if table is None else table.models.get(model)
    if routes is None:
        return {}
    canary = routes.canary
    shares = {
        "current": (routes.current, 1.0 - (canary.share if canary else 0.0)),
        "canary": (canary.version if canary else None, canary.share if canary else 0.0),
        "shadow": (routes.shadow, 0.0),
        "previous": (routes.previous, 0.0),
    }
    return {part: share for part, (named, share) in shares.items() if named == version}


def reference_of(table: RouteTable | None, model: str, version: str) -> tuple[float, float] | None:
    """Mean and standard deviation of a version's reference set, where its contract has one."""
    routes = None if table is None else table.models.get(model)
    release = None if routes is None else routes.releases.get(version)
    normaliser = None if release is None or release.info is None else release.info.normaliser
    return None if normaliser is None else (normaliser.mean, normaliser.std)


def _in_table(table: RouteTable | None) -> set[tuple[str, str]]:
    return set() if table is None else {(model, version) for model, routes in table.models.items() for version in routes.releases}


_MAY_FALL = {"reward_sums"}


def _add_growth(step: _Step, before: Stats, after: Stats) -> None:
    owner = (after.model, after.version)
    # A process that began again under its old name has counted all of it since.
    began_again = any(after.counters.get(key, 0.0) < value for key, value in before.counters.items())
    for key, value in after.counters.items():
        grown = value if began_again else value - before.counters.get(key, 0.0)
        if grown:
            step.counters[(*owner, key)] = step.counters.get((*owner, key), 0.0) + grown
    for key, value in after.gauges.items():
        if key[0] in _MAY_FALL:
            old = 0.0 if began_again else before.gauges.get(key, 0.0)
            step.counters[(*owner, key)] = step.counters.get((*owner, key), 0.0) + value - old
    for key, histogram in after.histograms.items():
        gained = _gained(None if began_again else before.histograms.get(key), histogram)
        if any(gained.counts):
            known = step.histograms.get((*owner, key))
            step.histograms[(*owner, key)] = gained if known is None else added(known, gained)


def _gained(before: Histogram | None, after: Histogram) -> Histogram:
    if before is None or before.bounds != after.bounds or any(new < old for new, old in zip(after.counts, before.counts, strict=True)):
        return after
    counts = tuple(new - old for new, old in zip(after.counts, before.counts, strict=True))
    return Histogram(after.bounds, counts, after.total - before.total)


def added(one: Histogram, other: Histogram) -> Histogram:
    """The observations of both; of two with other bounds, which an older process may have, those of the second."""
    if one.bounds != other.bounds:
        return other
    return Histogram(one.bounds, tuple(a + b for a, b in zip(one.counts, other.counts, strict=True)), one.total + other.total)


def _sum_of(step: _Step | None, name: str) -> float:
    return 0.0 if step is None else sum(amount for (_, _, (metric, _)), amount in step.counters.items() if metric == name)
