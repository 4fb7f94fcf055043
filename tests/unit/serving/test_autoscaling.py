"""How many replicas a backlog asks for: the function by itself, in a simulated cluster over many loads, and behind Serve's hook."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from rayward.config.scoring import ReplicaConfig
from rayward.serving import calls
from rayward.serving.autoscaling import (
    GAP_S,
    LOOK_BACK_S,
    QUEUED_TOKENS,
    TOKENS_PER_S,
    BacklogPolicy,
    Memory,
    Seen,
    Settings,
    replicas_for_backlog,
    scaling_options,
)

RATE = 1000.0


def settings(low: int = 1, high: int = 10, target: float = 1.0, up: float = 5.0, down: float = 60.0) -> Settings:
    return Settings(low, high, target, up, down)


def decide(seen: Seen, aims: Settings, memory: Memory | None = None, *, seconds: float = 0.0) -> int:
    """The decision after the same was seen for so long."""
    memory = memory or Memory()
    target = seen.num_target
    for step in range(int(seconds * 10) + 1):
        target, memory = replicas_for_backlog(seen._replace(now=seen.now + step / 10, num_target=target), memory, aims)
    return target


def busy(tokens: float, running: int = 1, **more: Any) -> Seen:
    return Seen(0.0, running, running, [tokens / running] * running, [RATE] * running, busy=float(running), **more)


def test_the_backlog_over_the_target_is_the_number_of_replicas() -> None:
    assert decide(busy(3500.0), settings(), seconds=6) == 4
    assert decide(busy(3500.0), settings(target=2.0), seconds=6) == 2
    assert decide(busy(1e9), settings(), seconds=6) == 10


def test_more_are_started_only_when_they_were_wanted_all_the_time() -> None:
    assert decide(busy(3500.0), settings(), seconds=4.5) == 1
    memory, target = Memory(), 1
    for step in range(300):
        tokens = 3500.0 if step % 20 else 900.0  # a moment without backlog every two seconds
        target, memory = replicas_for_backlog(busy(tokens)._replace(now=step / 10, num_target=target), memory, settings())
    assert target == 1


def test_fewer_run_only_after_the_delay_and_never_below_what_was_wanted_since() -> None:
    idle = Seen(0.0, 8, 8, [0.0] * 8, [RATE] * 8)
    assert decide(idle, settings(), seconds=59) == 8
    assert decide(idle, settings(), seconds=61) == 1
    memory, target = Memory(), 8
    for step in range(700):
        seen = busy(2900.0, 8) if step == 300 else idle  # one moment at which three were wanted
        target, memory = replicas_for_backlog(seen._replace(now=step / 10, num_target=target, busy=0.0), memory, settings())
    assert target == 3


def test_no_replica_goes_that_the_others_could_not_do_without() -> None:
    steady = Seen(0.0, 4, 4, [100.0] * 4, [RATE] * 4, busy=3.0)
    assert decide(steady, settings(), seconds=100) == 4
    assert decide(steady._replace(busy=1.6), settings(), seconds=100) == 2
    # Busy alone starts nothing.
    assert decide(steady._replace(busy=4.0), settings(), seconds=100) == 4


def test_to_zero_only_when_nothing_was_asked_and_from_zero_at_the_first_request() -> None:
    aims = settings(low=0, down=30.0)
    assert decide(Seen(0.0, 1, 1, [0.0], [RATE]), aims, seconds=29) == 1
    assert decide(Seen(0.0, 1, 1, [0.0], [RATE]), aims, seconds=31) == 0
    assert decide(Seen(0.0, 1, 1, [0.0], [RATE], num_taken=1.0), aims, seconds=31) == 1
    assert decide(Seen(0.0, 0, 0), aims, seconds=100) == 0
    assert decide(Seen(0.0, 0, 0, num_waiting=3.0), aims, seconds=1) == 1
    # One that starts is not stopped because it has not reported yet, or because whoever woke it has gone.
    assert decide(Seen(0.0, 1, 0), aims, seconds=100) == 1


def test_requests_that_nobody_has_taken_count_like_those_that_were() -> None:
    assert decide(busy(1000.0, num_taken=10.0, num_waiting=25.0), settings(), seconds=6) == 4


@pytest.mark.parametrize(
    "seen",
    [Seen(0.0, 5, 5), Seen(0.0, 5, 5, [9e9] * 5, [0.0] * 5, busy=5.0)],
    ids=["no report", "no rate"],
)
def test_who_does_not_know_changes_nothing(seen: Seen) -> None:
    assert decide(seen, settings(low=0), seconds=100) == 5


def test_a_speed_that_was_measured_once_is_remembered() -> None:
    seen = busy(3500.0)._replace(tokens_per_s=[])
    assert decide(seen, settings(), Memory(tokens_per_s=RATE), seconds=6) == 4


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_starts_and_stops_nothing(jump: float) -> None:
    aims = settings()
    memory, target = Memory(), 5
    idle = Seen(0.0, 5, 5, [0.0] * 5, [RATE] * 5)
    for step in range(400):
        target, memory = replicas_for_backlog(idle._replace(now=step / 10, num_target=target), memory, aims)
    for step in range(590):
        target, memory = replicas_for_backlog(idle._replace(now=40.0 + jump + step / 10, num_target=target), memory, aims)
    assert target == 5
    for step in range(590, 620):
        target, memory = replicas_for_backlog(idle._replace(now=40.0 + jump + step / 10, num_target=target), memory, aims)
    assert target == 1


@dataclass
class Simulation:
    """Replicas that start late, callers that send tokens, reports that are a second old; the policy decides ten times a second."""

    aims: Settings
    arriving: Callable[[float], float]
    """Tokens/s at a time."""
    start_s: float = 20.0
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    running: int = 0
    backlog: float = 0.0
    targets: list[int] = field(default_factory=list)
    queues_s: list[float] = field(default_factory=list)

    def run(self, seconds: float) -> Simulation:
        starting: list[float] = []
        memory, target = Memory(), self.running
        history: list[float] = []
        reported, waiting = 0.0, 0.0
        for step in range(int(seconds * 10)):
            now = step / 10
            self.running += sum(at <= now for at in starting)
            starting = [at for at in starting if at > now]
            arrived = self.arriving(now) / 10 * self.noise.uniform(0.5, 1.5)
            self.backlog += arrived
            done = min(self.backlog, self.running * RATE / 10)
            had_work = self.backlog > 0.0
            self.backlog -= done
            history = [*history[-int(LOOK_BACK_S * 10) :], min(1.0, done / max(self.running * RATE / 10, 1.0)) * self.running]
            if step % 10 == 0:
                reported, waiting = (self.backlog + (done if had_work else 0.0), 0.0) if self.running else (0.0, float(self.backlog > 0.0))
            seen = Seen(
                now,
                target,
                self.running,
                [reported / self.running] * self.running if self.running else [],
                [RATE * self.noise.uniform(0.9, 1.1)] * self.running,
                busy=sum(history) / len(history),
                num_waiting=waiting,
            )
            target, memory = replicas_for_backlog(seen, memory, self.aims)
            present = self.running + len(starting)
            starting += [now + self.start_s] * (target - present)
            for _ in range(present - target):
                if starting:
                    starting.pop()
                else:
                    self.running -= 1
            self.targets.append(target)
            self.queues_s.append(self.backlog / RATE / max(1, self.running))
        return self

    def turns(self) -> int:
        """How often the target changed its direction."""
        steps = [b - a for a, b in pairwise(self.targets) if a != b]
        return sum((a > 0) != (b > 0) for a, b in pairwise(steps))


@pytest.mark.parametrize("seed", range(20))
def test_bounds_always_hold_whatever_arrives(seed: int) -> None:
    noise = random.Random(seed)
    low = noise.choice([0, 1, 3])
    aims = settings(low, low + noise.randint(1, 9), noise.uniform(0.2, 5.0), noise.uniform(0.0, 10.0), noise.uniform(0.0, 90.0))
    loads = [noise.choice([0.0, noise.uniform(0.0, 15.0) * RATE]) for _ in range(20)]
    simulated = Simulation(aims, lambda t: loads[int(t / 30) % 20], start_s=noise.uniform(0.0, 60.0), noise=noise, running=low).run(600)
    assert all(aims.min_replicas <= target <= aims.max_replicas for target in simulated.targets)


@pytest.mark.parametrize("seed", range(10))
def test_a_steady_load_is_served_within_the_target_and_nothing_flaps(seed: int) -> None:
    noise = random.Random(seed)
    load = noise.uniform(0.3, 8.0) * RATE
    simulated = Simulation(settings(), lambda _: load, noise=noise, running=1).run(1200)
    assert simulated.turns() <= 1
    after = simulated.targets[6000:]
    assert len(set(after)) == 1
    assert max(simulated.queues_s[9000:]) <= 1.0
    # Enough for the load, and not two replicas more than a load at 85 % needs.
    assert load / RATE <= after[0]
    assert after[0] <= math.ceil(load / RATE / 0.85) + 2


@pytest.mark.parametrize("seed", range(10))
def test_a_burst_is_drained_and_its_replicas_go_once(seed: int) -> None:
    noise = random.Random(seed)
    height = noise.uniform(4.0, 12.0) * RATE
    simulated = Simulation(settings(low=0), lambda t: height if 30.0 <= t < 90.0 else 0.0, noise=noise).run(600)
    assert simulated.targets[250] == 0
    assert max(simulated.targets) >= 4
    assert simulated.backlog == 0.0
    assert simulated.targets[-1] == 0
    assert simulated.turns() == 1


@pytest.mark.parametrize("period_s", [20.0, 40.0, 100.0])
def test_waves_faster_than_the_delay_do_not_move_replicas_up_and_down(period_s: float) -> None:
    simulated = Simulation(
        settings(down=300.0), lambda t: (6.0 if t % period_s < period_s / 2 else 0.5) * RATE, noise=random.Random(1), running=1
    ).run(1200)
    assert simulated.turns() <= 1


def test_the_names_of_reports_are_those_of_the_replicas() -> None:
    assert (QUEUED_TOKENS, TOKENS_PER_S) == (calls.QUEUED_TOKENS, calls.TOKENS_PER_S)


def context(now: float, target: int, tokens: float, state: dict[str, Any]) -> SimpleNamespace:
    points = [SimpleNamespace(timestamp=now - 1, value=0.0), SimpleNamespace(timestamp=now, value=tokens)]
    rates = [SimpleNamespace(timestamp=now, value=RATE)]
    return SimpleNamespace(
        raw_metrics={QUEUED_TOKENS: {"a": points}, TOKENS_PER_S: {"a": rates}},
        current_time=now,
        target_num_replicas=target,
        current_num_replicas=1,
        total_queued_requests=0.0,
        total_running_requests=3.0,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=6,
        policy_state=state,
    )


def test_the_hook_reads_what_replicas_report() -> None:
    policy = BacklogPolicy(target_queue_s=1.0, upscale_delay_s=2.0, downscale_delay_s=60.0)
    target, state = policy(context(0.0, 1, 4500.0, {}))
    assert target == 1
    for now in (1.0, 2.0, 2.5):
        target, state = policy(context(now, target, 4500.0, state))
    assert target == 5
    target, _ = policy(context(2.5 + GAP_S + 1.0, target, 0.0, state))
    assert target == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_takes_the_options_and_sends_the_policy_to_who_cannot_import_it() -> None:
    from ray.serve.config import AutoscalingConfig

    options = scaling_options(ReplicaConfig(min_replicas=0, max_replicas=4, target_queue_s=2.0))["autoscaling_config"]
    made = AutoscalingConfig(**options)
    assert (made.min_replicas, made.initial_replicas, made.max_replicas) == (0, 1, 4)
    sent = made.policy.get_serialized_policy_def()
    assert sent
    program = (
        "import sys; sys.path = [p for p in sys.path if 'platform' not in p]; sys.modules['rayward'] = None\n"
        f"import pickle; policy = pickle.loads({sent!r})(**{made.policy.policy_kwargs!r})\n"
        "from types import SimpleNamespace as N\n"
        "ctx = N(raw_metrics={}, current_time=0.0, target_num_replicas=1, current_num_replicas=0, total_queued_requests=2.0,\n"
        "    total_running_requests=0.0, capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=4, policy_state={})\n"
        "print(policy(ctx)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_fixed_number_of_replicas_needs_no_policy() -> None:
    assert scaling_options(ReplicaConfig(min_replicas=3, max_replicas=3)) == {"num_replicas": 3}
