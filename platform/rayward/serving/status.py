"""`GET /v1/status`: what is served and how it is going, for the page and for people; made of the table of routes and the manager's board.

No key, no caller and no text of a user is in it. Light: the schema belongs into the OpenAPI document.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

from rayward.errors import RaywardError
from rayward.schema import Frozen
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S
from rayward.serving.drift import Drift, drift_of
from rayward.serving.metrics import quantile
from rayward.serving.reporting import DRIFT_THRESHOLD, Board, Heard, added, parts_of, reference_of
from rayward.serving.routes import Release, RouteTable, State

RECENT_S = 60.0
"""Of latencies, refusals and errors."""

PAST_S = 300.0

NO_DIALECT = "none"
"""Of requests that do not score: health, this status itself."""


class ReplicaStatus(Frozen):
    """One process that holds a version."""

    replica: str
    queued_tokens: float
    tokens_per_s: float
    """What it computes while it is busy."""
    up_s: float
    """Since its process started."""
    heard_s: float
    """Since its last report."""


class RewardStatus(Frozen):
    """Rewards of the last ten minutes, against the contract's reference."""

    num: int
    mean: float
    std: float
    drift: float | None
    spread: float | None
    length_correlation: float | None
    drifted: bool
    """Whether |drift| is beyond its threshold (docs/monitoring.md)."""


class VersionStatus(Frozen):
    """One version of a model."""

    version: str
    state: State
    parts: dict[Literal["current", "canary", "shadow", "previous"], float]
    """Its parts, and the share of the unpinned requests that each is meant for."""
    published_at: float
    error: str | None
    replicas: list[ReplicaStatus]
    queued_tokens: float
    tokens_per_s: float
    completions_per_s: float
    prefix_saving: float | None
    """Share of the tokens asked for that did not have to be computed, over the last minute."""
    batch_fill: float | None
    """Mean share of the token budget that a forward used, over the last minute."""
    rewards: RewardStatus | None
    compared: Drift | None
    """Of a shadow: how far its rewards are from those of the current version."""


class ModelStatus(Frozen):
    """One name in requests."""

    model: str
    is_default: bool
    versions: list[VersionStatus]


class LatencyStatus(Frozen):
    """Of the last minute; p50 and p99 in seconds."""

    stage: str
    p50_s: float
    p99_s: float
    num: int


class PastStatus(Frozen):
    """The last five minutes in equal steps, oldest first."""

    step_s: float
    tokens_per_s: list[float]
    completions_per_s: list[float]
    queued_tokens: list[float]


class ServiceStatus(Frozen):
    """Body of `GET /v1/status`."""

    at: float
    """Seconds since 1970."""
    generation: int
    """Of the table of routes."""
    models: list[ModelStatus]
    requests_per_s: float
    tokens_per_s: float
    completions_per_s: float
    queued_tokens: float
    latencies: list[LatencyStatus]
    refusals: dict[str, float]
    """Refused requests of the last minute, by reason."""
    item_errors: dict[str, float]
    """Items of the last minute that got an error, by code."""
    ingresses: int
    past: PastStatus


def build_status(table: RouteTable, board: Board, *, wall_clock: Callable[[], float] = time.time) -> ServiceStatus:
    """The picture of now."""
    replicas = [heard for heard in board.heard() if heard.stats.role == "replica"]
    names = {*table.models, *(heard.stats.model for heard in replicas)}
    models = [
        ModelStatus(model=name, is_default=name == table.default_model, versions=_versions(table, board, name, replicas, wall_clock()))
        for name in sorted(names, key=lambda name: (name != table.default_model, name))
    ]
    past = list(board.past(PAST_S))
    return ServiceStatus(
        at=wall_clock(),
        generation=table.generation,
        models=models,
        requests_per_s=_requests_per_s(board),
        tokens_per_s=board.rate("tokens_computed_total"),
        completions_per_s=board.rate("completions_total"),
        queued_tokens=sum(heard.stats.gauges.get((QUEUED_TOKENS, ()), 0.0) for heard in replicas),
        latencies=_latencies(board),
        refusals=_by_label(board, "refusals_total"),
        item_errors={code: num for code, num in _by_label(board, "items_total").items() if code != "scored"},
        ingresses=sum(heard.stats.role == "ingress" for heard in board.heard()),
        past=PastStatus(
            step_s=board.step_s,
            tokens_per_s=[values["tokens_per_s"] for _, values in past],
            completions_per_s=[values["completions_per_s"] for _, values in past],
            queued_tokens=[values["queued_tokens"] for _, values in past],
        ),
    )


def _versions(table: RouteTable, board: Board, model: str, replicas: list[Heard], now: float) -> list[VersionStatus]:
    routes = table.models.get(model)
    releases: Mapping[str, Release] = {} if routes is None else routes.releases
    own = [heard for heard in replicas if heard.stats.model == model]
    found = []
    for version in {*releases, *(heard.stats.version for heard in own)}:
        release = releases.get(version)
        running = [heard for heard in own if heard.stats.version == version]
        asked, computed = (
            sum(board.grown(name, since_s=RECENT_S, model=model, version=version).values())
            for name in ("tokens_total", "tokens_computed_total")
        )
        fill = board.observed("batch_fill_ratio", since_s=RECENT_S, model=model, version=version).get(())
        found.append(
            VersionStatus(
                version=version,
                # A replica that answers for a version which the table has not any more is being taken down.
                state="ready" if release is None else release.state,
                parts=parts_of(table, model, version),
                published_at=0.0 if release is None else release.published_at,
                error=None if release is None or release.error is None else _problem(release.error),
                replicas=sorted((_replica(board, heard, now) for heard in running), key=lambda replica: replica.replica),
                queued_tokens=sum(heard.stats.gauges.get((QUEUED_TOKENS, ()), 0.0) for heard in running),
                tokens_per_s=board.rate("tokens_computed_total", model=model, version=version),
                completions_per_s=board.rate("completions_total", model=model, version=version),
                prefix_saving=1.0 - computed / asked if asked else None,
                batch_fill=fill.total / sum(fill.counts) if fill is not None else None,
                compared=_compared(table, board, model, version),
                rewards=_rewards(board, model, version, reference_of(table, model, version)),
            )
        )
    order = ("current", "canary", "shadow", "previous")
    return sorted(found, key=lambda each: (min((order.index(part) for part in each.parts), default=9), -each.published_at, each.version))


def _replica(board: Board, heard: Heard, now: float) -> ReplicaStatus:
    gauges = heard.stats.gauges
    return ReplicaStatus(
        replica=heard.stats.source,
        queued_tokens=gauges.get((QUEUED_TOKENS, ()), 0.0),
        tokens_per_s=gauges.get((TOKENS_PER_S, ()), 0.0),
        up_s=max(0.0, heard.stats.taken_at - gauges.get(("start_time_seconds", ()), heard.stats.taken_at)),
        heard_s=board.age_s(heard),
    )


def _rewards(board: Board, model: str, version: str, reference: tuple[float, float] | None) -> RewardStatus | None:
    rewards = board.rewards(model, version, reference)
    if rewards is None:
        return None
    return RewardStatus(
        num=rewards.num,
        mean=rewards.mean,
        std=rewards.std,
        drift=rewards.drift,
        spread=rewards.spread,
        length_correlation=rewards.length_correlation,
        drifted=rewards.are_enough and rewards.drift is not None and abs(rewards.drift) > DRIFT_THRESHOLD,
    )


def _compared(table: RouteTable, board: Board, model: str, version: str) -> Drift | None:
    routes = table.models.get(model)
    if routes is None or routes.shadow != version or routes.current is None:
        return None
    return drift_of((heard.stats for heard in board.heard()), model=model, current=routes.current, version=version)


def _problem(error: str) -> str:
    try:
        return RaywardError.from_json(error).problem
    except ValueError:
        return error


def _requests_per_s(board: Board) -> float:
    scoring = {labels for labels in board.grown("requests_total", since_s=RECENT_S) if dict(labels).get("dialect") != NO_DIALECT}
    return board.rate("requests_total", only=scoring)


def _latencies(board: Board) -> list[LatencyStatus]:
    stages = {dict(labels).get("stage", ""): seen for labels, seen in board.observed("stage_seconds", since_s=RECENT_S).items()}
    for labels, seen in board.observed("request_seconds", since_s=RECENT_S).items():
        if dict(labels).get("dialect") == NO_DIALECT:
            continue
        stages["total"] = added(stages["total"], seen) if "total" in stages else seen
    found = []
    for stage in ("encode", "queue", "compute", "total"):
        if stage in stages:
            p50, p99 = quantile(stages[stage], 0.5), quantile(stages[stage], 0.99)
            if p50 is not None and p99 is not None:
                found.append(LatencyStatus(stage=stage, p50_s=p50, p99_s=p99, num=sum(stages[stage].counts)))
    return found


def _by_label(board: Board, name: str) -> dict[str, float]:
    grown = board.grown(name, since_s=RECENT_S)
    return {value: amount for labels, amount in sorted(grown.items(), key=lambda item: -item[1]) for _, value in labels}
