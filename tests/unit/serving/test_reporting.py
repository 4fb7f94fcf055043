"""Reports on their way to the manager, its board, and the picture of `GET /v1/status`."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import statistics
from collections.abc import Sequence

import pytest

from rayward.errors import ConfigError
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, Stats
from rayward.serving.metrics import Recorder, render
from rayward.serving.reporting import EXPIRY_S, MIN_REWARDS, Board, added, parts_of, report_forever
from rayward.serving.routes import Canary, ModelRoutes, Release, RouteTable
from rayward.serving.status import ServiceStatus, build_status
from rayward.wire.native import ModelInfo, WireNormaliser

WALL = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(clock)


def _replica(clock: Clock, source: str = "r1", version: str = "aaa") -> Recorder:
    return Recorder(source, "replica", model="helper", version=version, clock=lambda: WALL + clock.now_s)


def _observe(recorder: Recorder, rewards: Sequence[float], num_tokens: Sequence[int]) -> None:
    sums = {
        "n": len(rewards),
        "reward": math.fsum(rewards),
        "reward_squared": math.fsum(r * r for r in rewards),
        "tokens": sum(num_tokens),
        "tokens_squared": sum(n * n for n in num_tokens),
        "reward_tokens": math.fsum(r * n for r, n in zip(rewards, num_tokens, strict=True)),
    }
    for of, amount in sums.items():
        recorder.move("reward_sums", amount, of=of)


INFO = ModelInfo(
    id="helper",
    version="aaa",
    max_tokens=4096,
    outputs=["reward"],
    normaliser=WireNormaliser(mean=0.0, std=2.0, num_rewards=1000, reference="held-out prompts"),
)

TABLE = RouteTable(
    generation=7,
    default_model="helper",
    models={
        "helper": ModelRoutes(
            releases={
                "aaa": Release(version="aaa", source="/models/aaa", state="ready", published_at=1.0, info=INFO),
                "bbb": Release(version="bbb", source="/models/bbb", state="ready", published_at=2.0),
                "ccc": Release(
                    version="ccc",
                    source="/models/ccc",
                    state="failed",
                    published_at=3.0,
                    error=ConfigError("golden scores differ", remedy="export again").to_json(),
                ),
            },
            current="aaa",
            canary=Canary(version="bbb", share=0.25),
            shadow="bbb",
        )
    },
)


def test_only_what_grew_between_two_reports_counts(clock: Clock, board: Board) -> None:
    recorder = _replica(clock)
    recorder.add("tokens_computed_total", 1_000_000)
    board.report(recorder.stats())
    assert board.grown("tokens_computed_total", since_s=60) == {}, "counted before the board was there"
    for _ in range(10):
        clock.now_s += 1.0
        recorder.add("tokens_computed_total", 500)
        board.report(recorder.stats())
    assert board.grown("tokens_computed_total", since_s=60) == {(): 5000.0}
    assert board.rate("tokens_computed_total", since_s=10) == pytest.approx(500, rel=0.15)
    assert board.rate("tokens_computed_total", since_s=10, model="other") == 0.0


def test_a_process_that_dies_takes_nothing_of_the_past_with_it(clock: Clock, board: Board) -> None:
    first, second = _replica(clock, "r1"), _replica(clock, "r2")
    for recorder in (first, second):
        board.report(recorder.stats())
        recorder.add("completions_total", 7)
        board.report(recorder.stats())
    clock.now_s += EXPIRY_S + 1
    board.report(second.stats())
    assert [heard.stats.source for heard in board.heard()] == ["r2"]
    assert board.grown("completions_total", since_s=60) == {(): 14.0}


def test_a_process_that_begins_again_under_its_name_is_counted_from_zero(clock: Clock, board: Board) -> None:
    old = _replica(clock)
    old.add("completions_total", 100)
    old.observe("batch_fill_ratio", 0.5)
    board.report(old.stats())
    clock.now_s += 1
    new = _replica(clock)
    new.add("completions_total", 3)
    board.report(new.stats())
    assert board.grown("completions_total", since_s=60) == {(): 3.0}


def test_a_report_that_was_overtaken_is_left_out(clock: Clock, board: Board) -> None:
    recorder = _replica(clock)
    board.report(recorder.stats())
    recorder.add("completions_total", 5)
    older = recorder.stats()
    clock.now_s += 1
    recorder.add("completions_total", 5)
    newer = recorder.stats()
    board.report(newer)
    board.report(older)
    assert board.grown("completions_total", since_s=60) == {(): 10.0}
    assert board.heard()[0].stats is newer


def test_a_machine_whose_clock_jumps_back_is_heard_again(clock: Clock, board: Board) -> None:
    board.report(Stats("r1", "replica", taken_at=2e9))
    clock.now_s += EXPIRY_S
    late = Stats("r1", "replica", taken_at=1e9)
    board.report(late)
    assert board.heard()[0].stats is late


def test_the_past_is_forgotten(clock: Clock, board: Board) -> None:
    recorder = _replica(clock)
    for _ in range(3000):
        recorder.add("completions_total")
        recorder.set(QUEUED_TOKENS, 1)
        board.report(recorder.stats())
        clock.now_s += 1.0
    assert board.grown("completions_total", since_s=1e9)[()] == pytest.approx(600, abs=15)
    for number in range(500):
        board.report(_replica(clock, f"gone-{number}").stats())
    clock.now_s += 601
    board.report(recorder.stats())
    # Itself and the board's own summary: names of dead processes would grow for ever.
    assert len(board.stats()) == 2
    assert len(board._heard) == 1


def test_rewards_of_the_window_equal_those_computed_directly(clock: Clock, board: Board) -> None:
    drawn = random.Random(0)
    recorders = [_replica(clock, f"r{number}") for number in range(3)]
    for recorder in recorders:
        board.report(recorder.stats())
    rewards, lengths = [], []
    for _ in range(100):
        clock.now_s += 1.0
        for recorder in recorders:
            some = [drawn.randrange(20, 900) for _ in range(4)]
            given = [-40.0 + 0.002 * length + drawn.gauss(0.0, 0.5) for length in some]
            _observe(recorder, given, some)
            rewards += given
            lengths += some
            board.report(recorder.stats())
    seen = board.rewards("helper", "aaa", (-39.0, 0.25))
    assert seen is not None
    assert seen.num == 1200
    assert seen.mean == pytest.approx(statistics.fmean(rewards), rel=1e-9)
    assert seen.std == pytest.approx(statistics.pstdev(rewards), rel=1e-7)
    assert seen.length_correlation == pytest.approx(statistics.correlation(rewards, lengths), abs=1e-6)
    assert seen.drift == pytest.approx((statistics.fmean(rewards) + 39.0) / 0.25)
    assert seen.spread == pytest.approx(statistics.pstdev(rewards) / 0.25, rel=1e-7)
    assert board.rewards("helper", "bbb") is None


def test_equal_rewards_have_no_correlation(clock: Clock, board: Board) -> None:
    recorder = _replica(clock)
    board.report(recorder.stats())
    _observe(recorder, [0.1] * 1000, list(range(1000)))
    board.report(recorder.stats())
    seen = board.rewards("helper", "aaa")
    assert seen is not None
    assert seen.length_correlation is None
    assert seen.drift is None
    assert seen.std == pytest.approx(0.0, abs=1e-6)


def test_drift_is_a_metric_once_it_says_something(clock: Clock, board: Board) -> None:
    recorder = _replica(clock)
    board.report(recorder.stats())
    _observe(recorder, [5.0, 7.0] * (MIN_REWARDS // 2 - 1), list(range(MIN_REWARDS - 2)))
    board.report(recorder.stats())
    assert "rayward_window_reward_drift" not in render(board.stats(TABLE))
    clock.now_s += 1
    _observe(recorder, [5.0, 7.0], [1, 2])
    board.report(recorder.stats())
    lines = render(board.stats(TABLE)).splitlines()
    assert 'rayward_window_reward_drift{role="manager",source="manager",model="helper",version="aaa"} 3' in lines
    assert 'rayward_window_reward_spread{role="manager",source="manager",model="helper",version="aaa"} 0.5' in lines
    assert 'rayward_replicas{role="manager",source="manager",model="helper",version="bbb"} 0' in lines
    assert 'rayward_version_state{role="manager",source="manager",model="helper",version="ccc",state="failed"} 1' in lines
    assert 'rayward_version_share{role="manager",source="manager",model="helper",version="aaa",part="current"} 0.75' in lines


def test_parts_of_a_version() -> None:
    assert parts_of(TABLE, "helper", "aaa") == {"current": 0.75}
    assert parts_of(TABLE, "helper", "bbb") == {"canary": 0.25, "shadow": 0.0}
    assert parts_of(TABLE, "helper", "ccc") == parts_of(TABLE, "nobody", "aaa") == parts_of(None, "helper", "aaa") == {}


def test_histograms_of_two_programs_are_not_added() -> None:
    one, other = Recorder("a", "replica"), Recorder("b", "replica")
    one.observe("batch_fill_ratio", 0.5)
    other.observe("reward", 0.5)
    first, second = one.stats().histograms[("batch_fill_ratio", ())], other.stats().histograms[("reward", ())]
    assert added(first, second) is second


def test_status_shows_versions_replicas_and_the_past(clock: Clock, board: Board) -> None:
    replicas = [_replica(clock, "r1"), _replica(clock, "r2"), _replica(clock, "r3", "bbb"), _replica(clock, "r4", "old")]
    ingress = Recorder("i1", "ingress", clock=lambda: WALL + clock.now_s)
    for second in range(120):
        for recorder in replicas[:2]:
            recorder.add("tokens_total", 400)
            recorder.add("tokens_computed_total", 100)
            recorder.add("completions_total", 4)
            recorder.observe("batch_fill_ratio", 0.5)
            recorder.observe("stage_seconds", 0.02, stage="queue")
            recorder.set(QUEUED_TOKENS, 10 * second)
            recorder.set(TOKENS_PER_S, 250)
        ingress.observe("request_seconds", 0.07, dialect="rayward")
        ingress.add("requests_total", dialect="rayward", status="200")
        ingress.add("requests_total", 50, dialect="none", status="200")
        ingress.observe("request_seconds", 9.0, dialect="none")
        ingress.add("refusals_total", reason="overloaded")
        for recorder in (*replicas, ingress):
            board.report(recorder.stats())
        clock.now_s += 1.0
    status = build_status(TABLE, board, wall_clock=lambda: WALL + clock.now_s)

    assert (status.generation, status.ingresses, len(status.models)) == (7, 1, 1)
    assert [version.version for version in status.models[0].versions] == ["aaa", "bbb", "ccc", "old"]
    current, canary, failed, leaving = status.models[0].versions
    assert [replica.replica for replica in current.replicas] == ["r1", "r2"]
    assert current.replicas[0].tokens_per_s == 250
    assert current.replicas[0].up_s == pytest.approx(119)
    assert current.queued_tokens == status.queued_tokens == 2 * 1190
    assert current.prefix_saving == pytest.approx(0.75)
    assert current.batch_fill == pytest.approx(0.5)
    assert current.tokens_per_s == pytest.approx(200, rel=0.15)
    assert status.requests_per_s == pytest.approx(1.0, rel=0.15)
    assert canary.parts == {"canary": 0.25, "shadow": 0.0}
    assert (failed.state, failed.error, failed.replicas) == ("failed", "golden scores differ", [])
    assert (leaving.parts, len(leaving.replicas)) == ({}, 1)
    stages = {latency.stage: latency for latency in status.latencies}
    assert list(stages) == ["queue", "total"]
    assert 0.01 < stages["queue"].p50_s <= 0.025
    assert 0.05 < stages["total"].p99_s <= 0.1
    assert status.refusals == {"overloaded": pytest.approx(60, abs=6)}
    assert len(status.past.tokens_per_s) == len(status.past.queued_tokens) == 60
    assert status.past.tokens_per_s[-10:] == [200.0] * 10
    assert status.past.tokens_per_s[0] == 0.0
    assert ServiceStatus.model_validate_json(status.model_dump_json()) == status


def test_status_of_nothing(board: Board) -> None:
    status = build_status(RouteTable(), board)
    assert (status.models, status.tokens_per_s, status.latencies) == ([], 0.0, [])
    assert set(status.past.queued_tokens) == {0.0}


def test_reports_go_on_when_the_manager_is_away(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[float] = []
    tries = 0

    async def send(stats: Stats) -> None:
        nonlocal tries
        tries += 1
        if tries in (2, 3):
            raise ConnectionError("no manager")
        sent.append(stats.taken_at)
        if len(sent) == 3:
            raise asyncio.CancelledError

    async def no_sleep(_seconds: float) -> None:
        return None

    times = iter(range(100))
    with caplog.at_level(logging.WARNING, logger="ray.serve"), pytest.raises(asyncio.CancelledError):
        asyncio.run(report_forever(lambda: Stats("i", "ingress", float(next(times))), send, sleep=no_sleep))
    assert sent == [0.0, 3.0, 4.0]
    assert len(caplog.records) == 1, "once, not once a second"
