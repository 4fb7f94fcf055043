"""What the service counts: the one list of metrics, the recorder that every process counts with, and the text that Prometheus reads.

A name that is not in `METRICS` cannot be recorded, so documentation, dashboard and alert rules can be checked against the list.

    recorder = Recorder(source="ingress#a1", role="ingress")
    recorder.add("refusals_total", reason="overloaded")
    render([recorder.stats(), ...]) -> text

No Ray and no torch.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, Histogram, Stats

PREFIX = "rayward_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels: TypeAlias = tuple[tuple[str, str], ...]
Key: TypeAlias = tuple[str, Labels]
Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
DEVIATIONS = (-5.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
REWARDS = (-50.0, -20.0, -10.0, -5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One name: what it means, who has it, by what it is divided.

    Attributes:
        name: without the prefix `rayward_`.
        labels: besides `role` and `source`, and `model` and `version` of what belongs to a version.
        bounds: upper bounds of a histogram.
    """

    name: str
    kind: Kind
    role: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("requests_total", "counter", "ingress", "Requests answered, by path, dialect and HTTP status.", ("route", "dialect", "status")),
    Metric("request_seconds", "histogram", "ingress", "From the end of the body to the reply.", ("route",), SECONDS),
    Metric("requests_in_flight", "gauge", "ingress", "Requests that this process holds."),
    Metric("refusals_total", "counter", "ingress, replica", "Requests refused before anything was scored, by reason.", ("reason",)),
    Metric("answers_total", "counter", "ingress", "Requests that a version answered, by its part.", ("model", "version", "part")),
    Metric("dispatch_retries_total", "counter", "ingress", "Calls repeated on another replica, by reason.", ("reason",)),
    Metric("quarantined_total", "counter", "ingress", "Items quarantined because replicas died of them."),
    Metric("shadow_rewards_total", "counter", "ingress", "Rewards that a shadow version gave too.", ("model", "version")),
    Metric("shadow_mean_difference", "gauge", "ingress", "Mean |shadow - current| of their rewards.", ("model", "version")),
    Metric("shadow_max_difference", "gauge", "ingress", "Largest |shadow - current| of their rewards.", ("model", "version")),
    Metric("shadow_rank_agreement", "gauge", "ingress", "Share of pairs that the shadow orders as the current one.", ("model", "version")),
    Metric("items_total", "counter", "replica", "Items answered, with rewards or with an error."),
    Metric("item_errors_total", "counter", "replica", "Items answered with an error, by its code.", ("code",)),
    Metric("completions_total", "counter", "replica", "Completions with a reward."),
    Metric("tokens_total", "counter", "replica", "Tokens of the conversations asked for."),
    Metric("tokens_computed_total", "counter", "replica", "Tokens that went through the model; less by what prefixes share."),
    Metric("batches_total", "counter", "replica", "Forwards."),
    Metric("batch_fill", "histogram", "replica", "Tokens of a forward over the budget of one.", (), FRACTIONS),
    Metric("stage_seconds", "histogram", "replica", "Where a request's time went: encode, queue, compute.", ("stage",), SECONDS),
    Metric(QUEUED_TOKENS, "gauge", "replica", "Tokens that wait or are computed, prompts counted once."),
    Metric("queued_items", "gauge", "replica", "Items that wait or are computed."),
    Metric(TOKENS_PER_S, "gauge", "replica", "What it computes while it is busy, over its last forwards; 0: not known yet."),
    Metric("busy_seconds_total", "counter", "replica", "Time spent in forwards."),
    Metric("encoder_restarts_total", "counter", "replica", "Encoder processes replaced, by reason.", ("reason",)),
    Metric("non_finite_total", "counter", "replica", "Rewards that were NaN or infinite, and became errors."),
    Metric("reward", "histogram", "replica", "Raw rewards, as many as conversations; their sum may fall, so no rate of it.", (), REWARDS),
    Metric("reward_standardised", "histogram", "replica", "(reward - reference mean) / reference std.", (), DEVIATIONS),
    Metric("reward_squares_total", "counter", "replica", "Sum of the squares of the rewards."),
    Metric("reward_length_total", "counter", "replica", "Sum of the tokens of their conversations."),
    Metric("reward_length_squares_total", "counter", "replica", "Sum of the squares of these."),
    Metric("reward_by_length", "gauge", "replica", "Sum of reward times tokens; a gauge, because it may fall."),
    Metric("reference_mean", "gauge", "replica", "Mean reward of the contract's reference set."),
    Metric("reference_std", "gauge", "replica", "Standard deviation of the rewards of the contract's reference set."),
    Metric("start_time_seconds", "gauge", "ingress, replica, manager", "When the process started, in seconds since 1970."),
    Metric("window_reward_mean", "gauge", "manager", "Mean raw reward over the last ten minutes.", ("model", "version")),
    Metric("window_reward_std", "gauge", "manager", "Standard deviation of the rewards of the last ten minutes.", ("model", "version")),
    Metric("window_rewards", "gauge", "manager", "Rewards of the last ten minutes.", ("model", "version")),
    Metric("reward_drift", "gauge", "manager", "(window mean - reference mean) / reference std; 0 is the reference.", ("model", "version")),
    Metric("reward_spread", "gauge", "manager", "window std / reference std; 1 is the reference.", ("model", "version")),
    Metric("reward_length_correlation", "gauge", "manager", "Pearson's, of reward and tokens, same window.", ("model", "version")),
    Metric("replicas", "gauge", "manager", "Replicas heard of in the last ten seconds.", ("model", "version")),
    Metric("version_state", "gauge", "manager", "1 for the state that a version is in.", ("model", "version", "state")),
    Metric("version_part", "gauge", "manager", "Share of unpinned requests meant for it, by part.", ("model", "version", "part")),
)
"""Every metric of the service."""

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


class Recorder:
    """Counts for one process, from any of its threads.

    Every method raises KeyError for a name that `METRICS` has not, and ValueError for labels that are not the metric's: both are faults of
    the program.

    Args:
        source: unique name of the process.
        role: ingress, replica or manager.
        model, version: of a replica.
        clock: seconds since 1970.
    """

    def __init__(self, source: str, role: str, *, model: str = "", version: str = "", clock: Callable[[], float] = time.time) -> None:
        self._source, self._role, self._model, self._version, self._clock = source, role, model, version, clock
        self._lock = threading.Lock()
        self._counters: dict[Key, float] = {}
        self._gauges: dict[Key, float] = {}
        self._histograms: dict[Key, _Buckets] = {}
        self.set("start_time_seconds", clock())

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Let a counter grow."""
        key = _key(name, "counter", labels)
        if not amount >= 0.0:
            raise ValueError(f"{name} cannot grow by {amount}")
        with self._lock:
            self._counters[key] = self._counters.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge as it stands."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = float(value)

    def move(self, name: str, change: float, **labels: str) -> None:
        """Let a gauge rise or fall."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = self._gauges.get(key, 0.0) + change

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One observation of a histogram; NaN is none."""
        key = _key(name, "histogram", labels)
        if math.isnan(value):
            return
        with self._lock:
            self._buckets(key).add(value)

    def observe_rewards(self, rewards: Sequence[float], num_tokens: Sequence[int], reference: tuple[float, float] | None = None) -> None:
        """Rewards that were given, and the tokens of their conversations.

        Args:
            reference: mean and standard deviation of the contract's reference set.
        """
        mean, std = reference or (0.0, 0.0)
        with self._lock:
            raw = self._buckets(("reward", ()))
            standardised = self._buckets(("reward_standardised", ())) if std > 0.0 else None
            for reward in rewards:
                raw.add(reward)
                if standardised is not None:
                    standardised.add((reward - mean) / std)
            sums = (
                (self._counters, "reward_squares_total", math.fsum(r * r for r in rewards)),
                (self._counters, "reward_length_total", float(sum(num_tokens))),
                (self._counters, "reward_length_squares_total", float(sum(n * n for n in num_tokens))),
                (self._gauges, "reward_by_length", math.fsum(r * n for r, n in zip(rewards, num_tokens, strict=True))),
            )
            for into, name, amount in sums:
                into[(name, ())] = into.get((name, ()), 0.0) + amount
            if standardised is not None:
                self._gauges[("reference_mean", ())], self._gauges[("reference_std", ())] = mean, std

    def stats(self) -> Stats:
        """All of it as it stands, in records that no later count changes."""
        with self._lock:
            return Stats(
                source=self._source,
                role=self._role,
                taken_at=self._clock(),
                model=self._model,
                version=self._version,
                counters=dict(self._counters),
                gauges=dict(self._gauges),
                histograms={key: buckets.frozen() for key, buckets in self._histograms.items()},
            )

    def _buckets(self, key: Key) -> _Buckets:
        return self._histograms.setdefault(key, _Buckets(BY_NAME[key[0]].bounds))


class _Buckets:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def frozen(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


def _key(name: str, kind: Kind, labels: Mapping[str, str]) -> Key:
    metric = BY_NAME[name]
    if metric.kind != kind:
        raise ValueError(f"{name} is a {metric.kind}, not a {kind}")
    if set(labels) != set(metric.labels):
        raise ValueError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
    return name, tuple((label, str(labels[label])) for label in metric.labels)


def quantile(histogram: Histogram, share: float) -> float | None:
    """The value below which a share of the observations lies, linear within a bucket; None where there are none.

    Beyond the outermost bounds it is that bound: the histogram knows no more.
    """
    num = sum(histogram.counts)
    if not num:
        return None
    wanted, below = share * num, 0
    for index, count in enumerate(histogram.counts):
        if count and below + count >= wanted:
            if index == len(histogram.bounds):
                return histogram.bounds[-1]
            upper = histogram.bounds[index]
            lower = histogram.bounds[index - 1] if index else min(0.0, upper)
            return lower + (upper - lower) * max(0.0, wanted - below) / count
        below += count
    return histogram.bounds[-1]


def render(stats: Iterable[Stats]) -> str:
    """Prometheus's text format of the newest counts of every process. A name outside of `METRICS` is rendered too, without a help."""
    families: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for each in stats:
        common = [("role", each.role), ("source", each.source)]
        common += [(name, value) for name, value in (("model", each.model), ("version", each.version)) if value]
        for kind, values in (("counter", each.counters), ("gauge", each.gauges)):
            for (name, labels), value in values.items():
                family = _family(name, kind)
                kinds.setdefault(family, kind)
                families.setdefault(family, []).append(f"{family}{_braces(common, labels)} {_number(value)}")
        for (name, labels), histogram in each.histograms.items():
            family = _family(name, "histogram")
            kinds.setdefault(family, "histogram")
            families.setdefault(family, []).extend(_histogram_lines(family, common, labels, histogram))
    return "".join(f"{_header(family, kinds[family])}{chr(10).join(lines)}\n" for family, lines in sorted(families.items()))


def _family(name: str, kind: str) -> str:
    return f"{PREFIX}{name}" if kind != "counter" or name.endswith("_total") else f"{PREFIX}{name}_total"


def _header(family: str, kind: str) -> str:
    metric = BY_NAME.get(family.removeprefix(PREFIX))
    text = "" if metric is None else f"# HELP {family} {_escaped(metric.help)}\n"
    return f"{text}# TYPE {family} {kind}\n"


def _histogram_lines(family: str, common: list[tuple[str, str]], labels: Labels, histogram: Histogram) -> list[str]:
    running = list(itertools.accumulate(histogram.counts))
    bounds = (*map(_number, histogram.bounds), "+Inf")
    lines = [f"{family}_bucket{_braces(common, (*labels, ('le', bound)))} {count}" for bound, count in zip(bounds, running, strict=True)]
    where = _braces(common, labels)
    return [*lines, f"{family}_sum{where} {_number(histogram.total)}", f"{family}_count{where} {running[-1]}"]


def _braces(common: list[tuple[str, str]], labels: Labels) -> str:
    # A label of the series wins over that of the process: a label may stand only once.
    named = {**dict(common), **dict(labels)}
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in named.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
