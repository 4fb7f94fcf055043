"""What one ingress process counts: requests by outcome, refusals by reason, latencies, items by version.

    counters      requests_total{dialect, status} · refusals_total{reason} · answered_items_total{model, version, outcome} ·
                  replies_total{model, version}
    gauges        requests_in_flight · body_bytes_held
    histograms    request_seconds{dialect}

`replies_total` gives the shares of the versions. A refusal is any reply that is no 200, by its code.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from rayward.serving.calls import Histogram, Stats
from rayward.wire.items import ItemResult

Series: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels."""

LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class _Observed:
    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total: float = 0.0


class Traffic:
    """Counts since the process started."""

    def __init__(self) -> None:
        self._counters: Counter[Series] = Counter()
        self._latencies: dict[Series, _Observed] = {}

    def answered(self, dialect: str, status: int, seconds: float) -> None:
        """One request is over."""
        self._counters[series("requests_total", dialect=dialect, status=str(status))] += 1
        observed = self._latencies.setdefault(series("request_seconds", dialect=dialect), _Observed())
        observed.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        observed.total += seconds

    def refused(self, reason: str) -> None:
        """It was not answered with what was asked for."""
        self._counters[series("refusals_total", reason=reason)] += 1

    def scored(self, model: str, version: str, results: tuple[ItemResult, ...]) -> None:
        """A version has answered."""
        self._counters[series("replies_total", model=model, version=version)] += 1
        for result in results:
            outcome = "scored" if result.error is None else result.error.code
            self._counters[series("answered_items_total", model=model, version=version, outcome=outcome)] += 1

    def stats(self, source: str, gauges: Mapping[str, float], clock: Callable[[], float]) -> Stats:
        """The counts as they stand.

        Args:
            source: unique name of the process.
            gauges: what stands now, without labels.
            clock: seconds since 1970.
        """
        return Stats(
            source=source,
            role="ingress",
            taken_at=clock(),
            counters=dict(self._counters),
            gauges={series(name): value for name, value in gauges.items()},
            histograms={
                name: Histogram(LATENCY_BOUNDS_S, tuple(observed.counts), observed.total) for name, observed in self._latencies.items()
            },
        )


def series(name: str, /, **labels: str) -> Series:
    """The key of one series."""
    return name, tuple(sorted(labels.items()))
