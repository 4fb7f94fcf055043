"""What travels between ingress, scorer replicas and manager; plain records, no Ray, no torch.

The deployments of an application, and what they answer to by handle:

    ingress   HTTP; reads the table of routes from storage and calls scorers through `Backends`
    manager   one process: makes the table true (`rollout`), keeps the newest `Stats` of every process: `report(stats)`, `stats()`
    scorer    in an application of its own per version: `score(ScoreCall) -> ScoredCall`, `info() -> ModelInfo`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rayward.wire.dialect import Timings
from rayward.wire.items import ItemResult, ScoreItem
from rayward.wire.native import ModelInfo


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """One request on its way to a replica.

    Attributes:
        request_id: the same in all logs, traces and the reply.
        caller: whose turn it is in the fair queue: the name of a key, or an address; never a secret.
        budget_s: what was left of the caller's time when the call was sent; a duration, because clocks of machines differ. None: no limit.
        charged: False for shadow traffic, which is dropped first and never makes anybody wait.
        alone: its items were there when a replica died: each is computed with nothing beside it, so that the next death names its cause.
    """

    items: Sequence[ScoreItem]
    request_id: str
    caller: str = "anonymous"
    budget_s: float | None = None
    charged: bool = True
    alone: bool = False


@dataclass(frozen=True, slots=True)
class ScoredCall:
    """The results of one request's items, in order, and the version that computed all of them."""

    version: str
    results: tuple[ItemResult, ...]
    timings: Timings = Timings()
    replica: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of observations up to and including each bound, the last for all others; and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Stats:
    """What one process (a replica or an ingress) has counted since it started, and how it stands now.

    Sent to the manager every second; `/metrics`, the page and the autoscaling policy read it. Names are Prometheus names without the prefix
    `rayward_`; labels are (name, value) pairs.

    Attributes:
        source: unique name of the process.
        role: replica, ingress or manager.
        model, version: of a replica.
        counters: monotone, by name and labels.
        gauges: as they stand, by name and labels.
        histograms: monotone, by name and labels.
        taken_at: seconds since 1970, of the machine it was taken on.
    """

    source: str
    role: str
    taken_at: float
    model: str = ""
    version: str = ""
    counters: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    gauges: Mapping[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    histograms: Mapping[tuple[str, tuple[tuple[str, str], ...]], Histogram] = field(default_factory=dict)


QUEUED_TOKENS = "queued_tokens"
"""Gauge of a replica: tokens that wait or are computed, prompts counted once. Also a key of `record_autoscaling_stats`."""

TOKENS_PER_S = "tokens_per_second"
"""Gauge of a replica: what it computes while it is busy, measured over its last forwards; 0 until it is known."""


class Backends(Protocol):
    """The scorers as the ingress sees them: names, versions, and somebody who answers for each.

    Everything raised is of our tree: UnavailableError, OverloadedError, DeadlineError, VersionError, ServerError, and RuleError with the
    code `unknown_model`.
    """

    async def score(
        self, items: Sequence[ScoreItem], *, request_id: str, caller: str, budget_s: float | None, model: str | None, version: str | None
    ) -> tuple[str, ScoredCall]:
        """The model's name and what one version of it answered. A replica that dies is replaced by another one within the budget.

        Args:
            model: None: the default one.
            version: pinned, or None: the route's choice.
        """
        ...

    def models(self) -> list[ModelInfo]:
        """Every model that is served, with the version that answers for it; without waiting for a replica."""
        ...

    def ready(self) -> bool:
        """Whether every model has a version that can score, or can be started from zero."""
        ...
