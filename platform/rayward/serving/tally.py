"""Counters of one process, as `Stats` hold them."""

from __future__ import annotations

from collections import defaultdict

Key = tuple[str, tuple[tuple[str, str], ...]]


class Tally:
    """Counters and gauges by name and labels."""

    def __init__(self) -> None:
        self.counters: defaultdict[Key, float] = defaultdict(float)
        self.gauges: dict[Key, float] = {}

    def count(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter."""
        self.counters[name, tuple(sorted(labels.items()))] += amount

    def note(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self.gauges[name, tuple(sorted(labels.items()))] = value

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """Add to a gauge."""
        key = (name, tuple(sorted(labels.items())))
        self.gauges[key] = self.gauges.get(key, 0.0) + amount

    def raise_to(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge if that makes it greater."""
        key = (name, tuple(sorted(labels.items())))
        self.gauges[key] = max(value, self.gauges.get(key, value))
