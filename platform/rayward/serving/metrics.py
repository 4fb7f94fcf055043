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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, Histogram, Stats

PREFIX = "rayward_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels: TypeAlias = tuple[tuple[str, str], ...]
Key: TypeAlias = tuple[str, Labels]
Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DEVIATIONS = (-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
UNITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
REWARDS = (-100.0, -50.0, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


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


_OF_VERSION = ("model", "version")
_OF_SHADOW = ("model", "current", "shadow")

METRICS: tuple[Metric, ...] = (
    # HTTP
    Metric("requests_total", "counter", "ingress", "Requests answered; dialect `none`: what does not score.", ("dialect", "status")),
    Metric("request_seconds", "histogram", "ingress", "From the head of a request to its reply.", ("dialect",), SECONDS),
    Metric("requests_in_flight", "gauge", "ingress", "Requests that this process holds."),
    Metric("body_bytes_held", "gauge", "ingress", "Bytes of request bodies that this process holds."),
    Metric("replies_total", "counter", "ingress", "Replies with rewards, by the version that gave them.", _OF_VERSION),
    Metric("answered_items_total", "counter", "ingress", "Items in these replies, by outcome.", (*_OF_VERSION, "outcome")),
    Metric("manager_up", "gauge", "ingress", "1 if the manager answered this scrape; else only this process's counts are in it."),
    Metric("refusals_total", "counter", "ingress, replica", "Requests refused before anything was scored, by reason.", ("reason",)),
    # From the ingress to a replica
    Metric("dispatched_requests_total", "counter", "ingress", "Requests that went to a version, by outcome.", (*_OF_VERSION, "outcome")),
    Metric("dispatch_repeats_total", "counter", "ingress", "Tries beyond the first, by reason.", ("reason",)),
    Metric("replica_deaths_total", "counter", "ingress", "Calls that a replica died under: by a crash, or by order.", ("cause",)),
    Metric("poisoned_items_total", "counter", "ingress", "Items refused because replicas died of them."),
    Metric("quarantined_contents", "gauge", "ingress", "Contents that are refused for a while, because replicas died of them."),
    Metric("route_table_age_seconds", "gauge", "ingress", "Since the table of routes was last read from storage."),
    Metric("route_table_generation", "gauge", "ingress", "Of the table of routes that this process goes by; -1: none read yet."),
    Metric("shadow_completions_total", "counter", "ingress", "Completions that a shadow version gave a reward too.", _OF_SHADOW),
    Metric("shadow_abs_difference_total", "counter", "ingress", "Sum of |shadow - current| over these.", _OF_SHADOW),
    Metric("shadow_difference_sum", "gauge", "ingress", "Sum of shadow - current over these; a gauge, because it may fall.", _OF_SHADOW),
    Metric("shadow_max_abs_difference", "gauge", "ingress", "Largest |shadow - current| since the process started.", _OF_SHADOW),
    Metric("shadow_pairs_total", "counter", "ingress", "Pairs of completions of one prompt that the current version orders.", _OF_SHADOW),
    Metric("shadow_agreeing_pairs_total", "counter", "ingress", "Of these, what the shadow orders alike.", _OF_SHADOW),
    Metric("shadow_uncompared_total", "counter", "ingress", "Items without a comparison, by reason.", (*_OF_SHADOW, "reason")),
    # In a replica
    Metric("items_total", "counter", "replica", "Items answered, by outcome: `scored`, or the code of the error.", ("outcome",)),
    Metric("completions_total", "counter", "replica", "Completions that got a reward."),
    Metric("tokens_total", "counter", "replica", "Tokens of the conversations of scored items, each counted whole."),
    Metric("tokens_computed_total", "counter", "replica", "Of these, what went through the model after sharing prefixes."),
    Metric("forwards_total", "counter", "replica", "Forwards."),
    Metric("forward_units", "histogram", "replica", "Comparisons in a forward.", (), UNITS),
    Metric("compute_seconds_total", "counter", "replica", "Time spent in forwards; its rate is the share of time that it computes."),
    Metric("batch_fill_ratio", "histogram", "replica", "Tokens of a forward over the budget of one.", (), FRACTIONS),
    Metric(
        "stage_seconds", "histogram", "replica", "Where a request's time went: encode, queue, compute; replica: all.", ("stage",), SECONDS
    ),
    Metric("dropped_units_total", "counter", "replica", "Comparisons that nobody waited for any more, by reason.", ("reason",)),
    Metric("encoder_restarts_total", "counter", "replica", "Encoder processes replaced, by reason.", ("reason",)),
    Metric("encoder_processes", "gauge", "replica", "Encoder processes that have loaded their tokenizer."),
    Metric(QUEUED_TOKENS, "gauge", "replica", "Tokens that wait or are computed, prompts counted once."),
    Metric("queued_shadow_tokens", "gauge", "replica", "Tokens of shadow traffic that wait or are computed."),
    Metric("queued_items", "gauge", "replica", "Items that wait to be encoded or computed."),
    Metric("waiting_callers", "gauge", "replica", "Callers with work in the queue."),
    Metric(TOKENS_PER_S, "gauge", "replica", "What it computes while it is busy, over its last forwards; 0: not known yet."),
    Metric("healthy", "gauge", "replica", "1, or 0 when the replica asks to be replaced."),
    Metric("non_finite_total", "counter", "replica", "Items for which the model gave NaN or Inf, which became errors."),
    Metric("reward", "histogram", "replica", "Rewards as the model gives them; their sum may fall, so it has no rate.", (), REWARDS),
    Metric("reward_standardised", "histogram", "replica", "The same less the reference mean, over the reference std.", (), DEVIATIONS),
    Metric("reward_sums", "gauge", "replica", "Sums over these and their tokens: n, reward, reward_squared, tokens, ….", ("of",)),
    Metric("reward_mean", "gauge", "replica", "Mean of about the last thousand rewards of this replica."),
    Metric("reward_std", "gauge", "replica", "Standard deviation of the same."),
    Metric("reward_length_correlation", "gauge", "replica", "Pearson's correlation of reward and tokens, of the same."),
    Metric("reference_mean", "gauge", "replica", "Mean reward of the contract's reference set."),
    Metric("reference_std", "gauge", "replica", "Standard deviation of the rewards of the contract's reference set."),
    Metric("start_time_seconds", "gauge", "ingress, replica, manager", "When the process started, in seconds since 1970."),
    # Over all replicas of a version, by the manager
    Metric("replicas", "gauge", "manager", "Replicas heard of in the last ten seconds.", _OF_VERSION),
    Metric("version_state", "gauge", "manager", "1 for the state that a version is in.", (*_OF_VERSION, "state")),
    Metric("version_share", "gauge", "manager", "Share of unpinned requests that is meant for it, by its part.", (*_OF_VERSION, "part")),
    Metric("window_rewards", "gauge", "manager", "Rewards of the last ten minutes.", _OF_VERSION),
    Metric("window_reward_mean", "gauge", "manager", "Their mean.", _OF_VERSION),
    Metric("window_reward_std", "gauge", "manager", "Their standard deviation.", _OF_VERSION),
    Metric("window_reward_drift", "gauge", "manager", "(their mean - reference mean) / reference std; 0: as the reference.", _OF_VERSION),
    Metric("window_reward_spread", "gauge", "manager", "Their std / reference std; 1: as the reference.", _OF_VERSION),
    Metric("window_reward_length_correlation", "gauge", "manager", "Pearson's correlation of reward and tokens.", _OF_VERSION),
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

    def add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Let a counter grow."""
        key = _key(name, "counter", labels)
        if not amount >= 0.0:
            raise ValueError(f"{name} cannot grow by {amount}")
        with self._lock:
            self._counters[key] = self._counters.get(key, 0.0) + amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """A gauge as it stands."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = float(value)

    def move(self, name: str, change: float, /, **labels: str) -> None:
        """Let a gauge rise or fall."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = self._gauges.get(key, 0.0) + change

    def raise_to(self, name: str, value: float, /, **labels: str) -> None:
        """A gauge of the greatest value so far."""
        key = _key(name, "gauge", labels)
        with self._lock:
            self._gauges[key] = max(value, self._gauges.get(key, value))

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """One observation of a histogram; NaN is none."""
        key = _key(name, "histogram", labels)
        if math.isnan(value):
            return
        with self._lock:
            self._buckets(key).add(value)

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
