"""How many replicas a backlog of tokens asks for: a pure function of what replicas report, the clock and what it remembers.

    wanted = backlog in tokens / (tokens/s of one replica x target_queue_s), but as many as it takes that none is busy all the time
    more     when more were wanted during all of `upscale_delay_s`: the least of it; from zero at once
    fewer    when fewer were wanted during all of `downscale_delay_s`: the most of it

Serve's controller calls `BacklogPolicy`, which it is sent by value, because it need not be able to import this package: at run time this
module uses the standard library only. The delays are kept here and not by Serve, which takes the last value of a window, not its extreme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rayward.config.scoring import ReplicaConfig

QUEUED_TOKENS = "queued_tokens"
TOKENS_PER_S = "tokens_per_second"
"""The names under which replicas report, as in `rayward.serving.calls`."""

LOOK_BACK_S = 12.0
"""How far back the reports of replicas are looked at, to tell how busy they are. Serve warns below 10."""

REPORT_ENVIRONMENT = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.05",
}
"""For the processes of replicas and ingress: they report every second, not every ten, in which a backlog of a second is long over."""

FULL_SHARE = 0.85
"""No replica is taken away while the others would then be busy for a larger share of the time."""

GAP_S = 5.0
"""After so long without a decision (the controller was away, the clock jumped) what was wanted before is forgotten."""


class Settings(NamedTuple):
    """What is aimed at; see `ReplicaConfig`."""

    min_replicas: int
    max_replicas: int
    target_queue_s: float
    upscale_delay_s: float
    downscale_delay_s: float


class Seen(NamedTuple):
    """What is known at one moment.

    Attributes:
        now: seconds of any clock.
        num_target: replicas that are to run.
        num_running: replicas that do.
        queued_tokens: the newest word of every replica that reports.
        tokens_per_s: the same, of those that have measured it.
        busy: sum over replicas of the share of the time that they had something to compute.
        num_waiting: requests that no replica has taken yet.
        num_taken: requests that replicas hold.
    """

    now: float
    num_target: int
    num_running: int
    queued_tokens: Sequence[float] = ()
    tokens_per_s: Sequence[float] = ()
    busy: float = 0.0
    num_waiting: float = 0.0
    num_taken: float = 0.0


class Memory(NamedTuple):
    """What is carried from one decision to the next.

    Attributes:
        at: when it was made.
        least: (time, replicas) with rising replicas: the first is the least that was wanted within `upscale_delay_s`.
        most: (time, replicas) with falling replicas: the first is the most that was wanted within `downscale_delay_s`.
        tokens_per_s: of one replica, as it was last measured; 0: never.
    """

    at: float = -math.inf
    least: tuple[tuple[float, int], ...] = ()
    most: tuple[tuple[float, int], ...] = ()
    tokens_per_s: float = 0.0


def replicas_for_backlog(seen: Seen, memory: Memory, settings: Settings) -> tuple[int, Memory]:
    """The number of replicas that are to run from now on, and what to remember for the next call."""
    rates = [rate for rate in seen.tokens_per_s if rate > 0.0]
    tokens_per_s = sum(rates) / len(rates) if rates else memory.tokens_per_s
    wanted = _bounded(_wanted(seen, tokens_per_s, settings.target_queue_s), settings)
    least, most = memory.least, memory.most
    if not 0.0 <= seen.now - memory.at <= GAP_S:
        # Nobody knows for how long more or fewer were wanted: as if the target had been right until now.
        least = most = ((seen.now, seen.num_target),)
    # The extreme over a window that slides: what is less extreme than what came later can never be the extreme again.
    least = (*(one for one in least if one[1] < wanted and one[0] >= seen.now - settings.upscale_delay_s), (seen.now, wanted))
    most = (*(one for one in most if one[1] > wanted and one[0] >= seen.now - settings.downscale_delay_s), (seen.now, wanted))
    at_least, at_most = least[0][1], most[0][1]
    target = max(at_least, min(at_most, seen.num_target))
    if not seen.num_target and not seen.num_running:
        # Who waits for the first one waits for it alone.
        target = wanted
    return _bounded(target, settings), Memory(seen.now, least, most, tokens_per_s)


def _wanted(seen: Seen, tokens_per_s: float, target_queue_s: float) -> int:
    if not seen.num_running:
        # While one starts, its backlog is not known; from zero, the first one finds out how much there is.
        return max(seen.num_target, 1 if seen.num_waiting > 0.0 else 0)
    if not seen.queued_tokens:
        return seen.num_target
    tokens = sum(seen.queued_tokens)
    if seen.num_taken > 0.0:
        # Whoever waits brings as much as those who were taken.
        tokens *= 1.0 + seen.num_waiting / seen.num_taken
    if tokens <= 0.0 and seen.busy <= 0.0:
        return 1 if seen.num_waiting + seen.num_taken > 0.0 else 0
    if tokens_per_s <= 0.0:
        return max(seen.num_target, 1)
    for_backlog = math.ceil(tokens / (tokens_per_s * target_queue_s))
    # Being busy is no reason for more: callers who wait for their replies keep one replica as busy as ten.
    for_work = min(seen.num_running, math.ceil(seen.busy / FULL_SHARE))
    return max(for_backlog, for_work, 1)


def _bounded(number: int, settings: Settings) -> int:
    return max(settings.min_replicas, min(settings.max_replicas, number))


class BacklogPolicy:
    """Serve's hook around `replicas_for_backlog`.

    Args:
        target_queue_s, upscale_delay_s, downscale_delay_s: of `Settings`; the bounds are Serve's.
    """

    def __init__(self, target_queue_s: float, upscale_delay_s: float, downscale_delay_s: float) -> None:
        self._aims = (target_queue_s, upscale_delay_s, downscale_delay_s)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """The replicas that Serve's `AutoscalingContext` asks for, and the state that comes back in the next one."""
        reports = ctx.raw_metrics or {}
        queued = [[point.value for point in series] for series in reports.get(QUEUED_TOKENS, {}).values() if series]
        rates = [series[-1].value for series in reports.get(TOKENS_PER_S, {}).values() if series]
        seen = Seen(
            now=ctx.current_time,
            num_target=ctx.target_num_replicas,
            num_running=ctx.current_num_replicas,
            queued_tokens=[values[-1] for values in queued],
            tokens_per_s=rates,
            busy=sum(sum(value > 0.0 for value in values) / len(values) for values in queued),
            num_waiting=ctx.total_queued_requests or 0.0,
            num_taken=ctx.total_running_requests,
        )
        memory = Memory(*ctx.policy_state.get("backlog", ()))
        settings = Settings(ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas, *self._aims)
        target, memory = replicas_for_backlog(seen, memory, settings)
        return target, {"backlog": tuple(memory)}


def scaling_options(config: ReplicaConfig) -> dict[str, Any]:
    """Options of the scorer's deployment that say how many replicas there are."""
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            # One verifies the golden scores before the version counts as ready, also where none runs later.
            "initial_replicas": max(1, config.min_replicas),
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "downscale_to_zero_delay_s": 0.0,
            "policy": {
                "policy_function": f"{__name__}:{BacklogPolicy.__name__}",
                "policy_kwargs": {
                    "target_queue_s": config.target_queue_s,
                    "upscale_delay_s": config.upscale_delay_s,
                    "downscale_delay_s": config.downscale_delay_s,
                },
            },
        }
    }
