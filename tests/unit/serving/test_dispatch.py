"""Where requests go, and what becomes of them when replicas die: fake handles, a fake clock, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayward.config.scoring import ReplicaConfig
from rayward.errors import DeadlineError, OverloadedError, RaywardError, RuleError, ServerError, UnavailableError, VersionError
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.dispatch import DEATHS, POISONED_ITEMS, QUARANTINED, REPEATS, REQUESTS, Dispatcher, ReplicaDiedError
from rayward.serving.poison import HOLD_S, Convictions, Quarantine, content_hash
from rayward.serving.routes import Canary, ModelRoutes, Release, RouteTable
from rayward.serving.shadow import (
    ABS_DIFFERENCE,
    AGREEING_PAIRS,
    COMPLETIONS,
    DIFFERENCE,
    MAX_DIFFERENCE,
    PAIRS,
    UNCOMPARED,
)
from rayward.wire.items import ItemError, ItemResult, ScoreItem
from rayward.wire.native import ModelInfo


def item(text: str, *completions: str) -> ScoreItem:
    return ScoreItem(({"role": "user", "content": text},), completions or ("x",))


def text_of(it: ScoreItem) -> str:
    return str(it.prompt[0]["content"])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


Behaviour = Callable[[ScoreCall], ScoredCall | None]


class Scorers:
    """Replicas of one version: reward = length of the prompt plus `shift`; `before` may raise, or answer itself."""

    def __init__(self, version: str, before: Behaviour | None = None, shift: float = 0.0) -> None:
        self.version = version
        self.before = before
        self.shift = shift
        self.calls: list[ScoreCall] = []
        self.cancelled = 0
        self.hang = False

    async def score(self, call: ScoreCall) -> ScoredCall:
        self.calls.append(call)
        await asyncio.sleep(0)
        if self.hang:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        answered = self.before(call) if self.before is not None else None
        return answered or ScoredCall(self.version, tuple(self.result(it) for it in call.items), replica="r1")

    def result(self, it: ScoreItem) -> ItemResult:
        return ItemResult(rewards=tuple(len(text_of(it)) + self.shift + k for k in range(len(it.completions))))

    running = 1

    async def num_replicas(self) -> int | None:
        return self.running

    async def info(self) -> ModelInfo:
        return ModelInfo(id="whatever", version=self.version, max_tokens=10, outputs=["reward"])


class Cluster:
    """Handles over a table; counts what is kept."""

    def __init__(self, table: RouteTable | None, *scorers: Scorers) -> None:
        self.table = table
        self.scorers = {one.version: one for one in scorers}
        self.kept: list[set[tuple[str, str]]] = []
        self.reads = 0
        self.broken = False
        self.clock = Clock()
        self.quarantine = Quarantine(self.clock)
        self.dispatcher = Dispatcher(
            self.read, self, clock=self.clock, sleep=self.clock.sleep, jitter=lambda: 0.5, quarantine=self.quarantine
        )

    def read(self) -> RouteTable | None:
        self.reads += 1
        if self.broken:
            raise OSError("no storage")
        return self.table

    def of(self, model: str, version: str) -> Scorers:
        return self.scorers[version]

    def keep(self, versions: set[tuple[str, str]]) -> None:
        self.kept.append(versions)

    async def score(self, *items: ScoreItem, budget_s: float | None = 60.0, request_id: str = "r", **asked: Any) -> ScoredCall:
        named = {"model": None, "version": None, **asked}
        _, scored = await self.dispatcher.score(items, request_id=request_id, caller="me", budget_s=budget_s, **named)
        return scored

    def count(self, name: str, **labels: str) -> float:
        stats = self.dispatcher.stats()
        wanted = labels.items()
        return sum(value for (n, found), value in {**stats.counters, **stats.gauges}.items() if n == name and wanted <= dict(found).items())


def table(current: str | None = "v1", *, generation: int = 1, max_replicas: int = 1, min_replicas: int = 1, **routes: Any) -> RouteTable:
    config = ReplicaConfig(min_replicas=min_replicas, max_replicas=max_replicas)
    releases = {v: Release(version=v, source="/m", config=config, state="ready") for v in ("v1", "v2")}
    return RouteTable(generation=generation, default_model="m", models={"m": ModelRoutes(releases=releases, current=current, **routes)})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def codes(scored: ScoredCall) -> list[str | None]:
    return [None if result.error is None else result.error.code for result in scored.results]


def rewards(scored: ScoredCall) -> list[tuple[float, ...] | None]:
    return [result.rewards for result in scored.results]


def dies_of(poison: str) -> Behaviour:
    def before(call: ScoreCall) -> None:
        if any(text_of(it) == poison for it in call.items):
            raise ReplicaDiedError("died")

    return before


def first(error: Exception, times: int = 1) -> Behaviour:
    left = [times]

    def before(_: ScoreCall) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return before


def test_the_current_version_answers_in_order_and_is_told_who_asks() -> None:
    cluster = Cluster(table(), Scorers("v1"))
    scored = run(cluster.score(item("a"), item("bbb", "x", "y"), request_id="r7"))
    assert rewards(scored) == [(1.0,), (3.0, 4.0)]
    assert (scored.version, scored.replica) == ("v1", "r1")
    (call,) = cluster.scorers["v1"].calls
    assert (call.request_id, call.caller, call.charged, call.alone) == ("r7", "me", True, False)
    assert call.budget_s is not None
    assert 59.0 < call.budget_s < 60.0
    assert cluster.count(REQUESTS, model="m", version="v1", outcome="answered") == 1


def test_a_pinned_version_answers_and_an_unknown_one_is_refused() -> None:
    cluster = Cluster(table(), Scorers("v1"), Scorers("v2"))
    assert run(cluster.score(item("a"), version="v2")).version == "v2"
    with pytest.raises(VersionError):
        run(cluster.score(item("a"), version="v9"))
    with pytest.raises(RuleError, match="not served"):
        run(cluster.score(item("a"), model="gpt"))
    assert not cluster.scorers["v1"].calls
    assert cluster.count(REQUESTS, outcome="VersionError") == 1


def test_a_canary_answers_its_share_of_requests() -> None:
    cluster = Cluster(table(canary=Canary(version="v2", share=0.25)), Scorers("v1"), Scorers("v2"))

    async def many() -> list[ScoredCall]:
        return [await cluster.score(item("a"), request_id=f"r{i}") for i in range(400)]

    share = sum(scored.version == "v2" for scored in run(many())) / 400
    assert 0.15 < share < 0.35


def test_a_version_published_a_moment_ago_is_found() -> None:
    cluster = Cluster(table(current=None), Scorers("v1"))

    async def go() -> ScoredCall:
        with pytest.raises(UnavailableError):
            await cluster.score(item("a"))
        cluster.table = table(generation=2)
        cluster.clock.now += 1.0
        return await cluster.score(item("a"))

    assert run(go()).version == "v1"


def test_a_client_that_asks_for_nonsense_does_not_make_us_read_all_the_time() -> None:
    cluster = Cluster(table(), Scorers("v1"))

    async def go() -> None:
        for _ in range(50):
            with pytest.raises(RuleError):
                await cluster.score(item("a"), model="gpt")

    run(go())
    assert cluster.reads == 1


def test_while_storage_is_away_the_last_table_stands() -> None:
    cluster = Cluster(table(), Scorers("v1"))

    async def go() -> ScoredCall:
        await cluster.dispatcher.refresh()
        cluster.broken = True
        await cluster.dispatcher.refresh()
        return await cluster.score(item("a"))

    assert rewards(run(go())) == [(1.0,)]
    assert cluster.dispatcher.ready()


def test_a_table_whose_file_has_gone_stands_and_one_that_begins_anew_is_taken() -> None:
    cluster = Cluster(table(generation=8), Scorers("v1"), Scorers("v2"))

    async def go() -> list[str]:
        versions = []
        for now in (cluster.table, RouteTable(), table(current="v2", generation=1)):
            cluster.table = now
            await cluster.dispatcher.refresh()
            versions.append((await cluster.score(item("a"))).version)
        return versions

    assert run(go()) == ["v1", "v1", "v2"]


def test_without_a_table_nothing_is_ready_and_requests_are_told_to_retry() -> None:
    cluster = Cluster(None)
    with pytest.raises(UnavailableError):
        run(cluster.score(item("a")))
    assert not cluster.dispatcher.ready()
    assert cluster.dispatcher.models() == []


def test_the_models_are_known_without_waking_one_that_sleeps() -> None:
    async def go(cluster: Cluster) -> list[ModelInfo]:
        await cluster.dispatcher.refresh()
        for _ in range(3):
            await asyncio.sleep(0)
        return cluster.dispatcher.models()

    (info,) = run(go(Cluster(table(), Scorers("v1"))))
    assert (info.id, info.version) == ("m", "v1")
    assert run(go(Cluster(table(min_replicas=0), Scorers("v1")))) == []


def test_a_request_whose_replica_dies_is_answered_by_another() -> None:
    cluster = Cluster(table(), Scorers("v1", first(ReplicaDiedError("died"))))
    scored = run(cluster.score(item("a"), item("bb")))
    assert rewards(scored) == [(1.0,), (2.0,)]
    together, *alone = cluster.scorers["v1"].calls
    assert len(together.items) == 2
    assert [(len(call.items), call.alone) for call in alone] == [(1, True), (1, True)]
    assert cluster.count(DEATHS, cause="crash") == 1
    assert cluster.count(REPEATS, reason="died") == 1
    # They were innocent, and are company again.
    run(cluster.score(item("a"), item("bb")))
    assert len(cluster.scorers["v1"].calls[-1].items) == 2


def test_a_death_by_order_makes_nobody_a_suspect() -> None:
    cluster = Cluster(table(), Scorers("v1", first(ReplicaDiedError("node", by_order=True))))
    assert rewards(run(cluster.score(item("a"), item("bb")))) == [(1.0,), (2.0,)]
    assert [(len(call.items), call.alone) for call in cluster.scorers["v1"].calls] == [(2, False), (2, False)]


def test_a_poisonous_item_kills_two_replicas_and_fails_alone() -> None:
    cluster = Cluster(table(), Scorers("v1", dies_of("poison")))
    scored = run(cluster.score(item("a"), item("poison"), item("ccc")))
    assert codes(scored) == [None, "poisoned", None]
    assert rewards(scored)[2] == (3.0,)
    assert cluster.count(DEATHS) == 2
    # It is refused at once now, and nobody beside it suffers.
    num_calls = len(cluster.scorers["v1"].calls)
    again = run(cluster.score(item("poison"), item("a"), request_id="other"))
    assert codes(again) == ["poisoned", None]
    assert len(cluster.scorers["v1"].calls) == num_calls + 1
    assert cluster.count(DEATHS) == 2
    assert cluster.count(POISONED_ITEMS) == 2
    assert cluster.count(QUARANTINED) == 1
    cluster.clock.now += HOLD_S
    cluster.scorers["v1"].before = None
    assert codes(run(cluster.score(item("poison")))) == [None]


def test_of_many_callers_at_a_death_only_the_poisonous_one_is_told() -> None:
    # The real replica is shared: who is in flight at its death dies with it.
    shared = asyncio.Event()
    scorers = Scorers("v1")

    def before(call: ScoreCall) -> None:
        if call.alone:
            if text_of(call.items[0]) == "poison":
                raise ReplicaDiedError("died")
        elif not shared.is_set():
            if len(scorers.calls) == 8:
                shared.set()
            raise ReplicaDiedError("died")

    scorers.before = before
    cluster = Cluster(table(), scorers)

    async def go() -> list[ScoredCall]:
        texts = [*"abcdefg", "poison"]
        return await asyncio.gather(*(cluster.score(item(text), request_id=text) for text in texts))

    got = run(go())
    assert [codes(scored) for scored in got] == [[None]] * 7 + [["poisoned"]]
    assert cluster.count(QUARANTINED) == 1


def test_suspects_of_all_requests_go_one_by_one() -> None:
    running = [0, 0]

    class Watched(Scorers):
        async def score(self, call: ScoreCall) -> ScoredCall:
            if not call.alone:
                return await super().score(call)
            running[0] += 1
            running[1] = max(running)
            for _ in range(3):
                await asyncio.sleep(0)
            running[0] -= 1
            return await super().score(call)

    cluster = Cluster(table(), Watched("v1", first(ReplicaDiedError("died"), times=5)))

    async def go() -> None:
        await asyncio.gather(*(cluster.score(item(f"{i}"), item(f"{i}{i}")) for i in range(5)))

    run(go())
    assert running == [0, 1]


def test_items_of_a_broken_device_are_repeated_alone_and_convicted_only_when_it_breaks_again() -> None:
    scorers = Scorers("v1")

    def before(call: ScoreCall) -> ScoredCall | None:
        if any(text_of(it) == "oom" for it in call.items):
            return ScoredCall("v1", tuple(ItemResult(error=ItemError.of("interrupted", "device")) for _ in call.items))
        return None

    scorers.before = before
    cluster = Cluster(table(), scorers)
    assert codes(run(cluster.score(item("a"), item("oom")))) == [None, "poisoned"]


def test_an_item_that_keeps_losing_its_encoder_is_reported_after_some_tries() -> None:
    lost = ScoredCall("v1", (ItemResult(error=ItemError.of("encoder_lost", "gone")),))
    cluster = Cluster(table(), Scorers("v1", lambda _: lost))
    assert codes(run(cluster.score(item("a")))) == ["encoder_lost"]
    assert 2 <= len(cluster.scorers["v1"].calls) <= 10


def test_who_finds_no_replica_tries_again_with_growing_pauses() -> None:
    cluster = Cluster(table(), Scorers("v1", first(UnavailableError("none", remedy="retry"), times=8)))
    assert rewards(run(cluster.score(item("a")))) == [(1.0,)]
    pauses = cluster.clock.slept
    assert len(pauses) == 8
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 1.5


def test_an_overloaded_replica_is_not_all_there_is() -> None:
    refused = OverloadedError("full", remedy="later", retry_after_s=7.0)
    cluster = Cluster(table(max_replicas=3), Scorers("v1", first(refused, times=2)))
    assert rewards(run(cluster.score(item("a")))) == [(1.0,)]
    alone = Cluster(table(max_replicas=1), Scorers("v1", first(refused, times=2)))
    with pytest.raises(OverloadedError) as caught:
        run(alone.score(item("a")))
    assert caught.value.retry_after_s == 7.0
    assert len(alone.scorers["v1"].calls) == 1


def test_the_deadline_ends_the_call_at_the_replica_too() -> None:
    cluster = Cluster(table(), Scorers("v1"))
    cluster.scorers["v1"].hang = True
    with pytest.raises(DeadlineError, match=r"0\.02"):
        run(cluster.score(item("a"), budget_s=0.02))
    assert cluster.scorers["v1"].cancelled == 1
    assert cluster.count(REQUESTS, outcome="DeadlineError") == 1


def test_a_caller_who_goes_away_ends_the_call_at_the_replica() -> None:
    cluster = Cluster(table(), Scorers("v1"))
    cluster.scorers["v1"].hang = True

    async def go() -> None:
        task = asyncio.create_task(cluster.score(item("a")))
        while not cluster.scorers["v1"].calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(go())
    assert cluster.scorers["v1"].cancelled == 1
    assert cluster.count(REQUESTS, outcome="cancelled") == 1


@pytest.mark.parametrize(
    "answer",
    [ScoredCall("v2", (ItemResult(rewards=(1.0,)),)), ScoredCall("v1", ())],
    ids=["another version", "another number"],
)
def test_what_another_version_computed_is_never_given_out(answer: ScoredCall) -> None:
    cluster = Cluster(table(), Scorers("v1", lambda _: answer))
    with pytest.raises(ServerError):
        run(cluster.score(item("a")))


def test_a_version_that_is_retired_between_two_tries_is_not_mixed_with_the_next() -> None:
    cluster = Cluster(table(), Scorers("v1"), Scorers("v2", shift=100.0))

    def before(call: ScoreCall) -> None:
        # Answers the first alone, then goes away for good while the next one takes over.
        if not call.alone or len(cluster.scorers["v1"].calls) > 2:
            cluster.table = table(current="v2", generation=2)
            cluster.clock.now += 1.0
            raise ReplicaDiedError("died") if not call.alone else UnavailableError("gone", remedy="retry")

    cluster.scorers["v1"].before = before

    async def go() -> ScoredCall:
        reader = asyncio.create_task(cluster.dispatcher.run())
        try:
            return await cluster.score(item("a"), item("bb"))
        finally:
            reader.cancel()

    scored = run(go())
    assert scored.version == "v2"
    assert rewards(scored) == [(101.0,), (102.0,)]


def shadowed(before: Behaviour | None = None, shift: float = 0.5, items: Sequence[ScoreItem] = (item("a", "x", "y"),)) -> Cluster:
    cluster = Cluster(table(shadow="v2"), Scorers("v1"), Scorers("v2", before, shift))

    async def go() -> None:
        scored = await cluster.score(*items)
        assert scored.version == "v1"
        for _ in range(6):
            await asyncio.sleep(0)
        await cluster.dispatcher.close()

    run(go())
    return cluster


def test_a_shadow_scores_uncharged_and_its_drift_is_kept() -> None:
    cluster = shadowed()
    (call,) = cluster.scorers["v2"].calls
    assert not call.charged
    assert cluster.count(COMPLETIONS, current="v1", shadow="v2") == 2
    assert cluster.count(ABS_DIFFERENCE) == pytest.approx(1.0)
    assert cluster.count(DIFFERENCE) == pytest.approx(1.0)
    assert cluster.count(MAX_DIFFERENCE) == pytest.approx(0.5)
    assert (cluster.count(PAIRS), cluster.count(AGREEING_PAIRS)) == (1, 1)


def test_a_shadow_that_turns_the_order_round_is_seen() -> None:
    turned = ScoredCall("v2", (ItemResult(rewards=(9.0, 1.0)),))
    cluster = shadowed(lambda _: turned)
    assert (cluster.count(PAIRS), cluster.count(AGREEING_PAIRS)) == (1, 0)
    assert cluster.count(MAX_DIFFERENCE) == pytest.approx(8.0)


@pytest.mark.parametrize("error", [ReplicaDiedError("died"), OverloadedError("full", remedy="later")], ids=["dies", "full"])
def test_what_happens_to_a_shadow_is_nobodys_business(error: RaywardError) -> None:
    cluster = shadowed(first(error))
    assert cluster.count(UNCOMPARED, reason="failed") == 1
    assert cluster.count(DEATHS) == 0


def test_contents_are_told_apart_and_the_order_of_keys_is_not() -> None:
    a = ScoreItem(({"role": "user", "content": "\ud800"},), ("x",), chat_template_kwargs={"a": 1, "b": 2})
    b = ScoreItem(({"content": "\ud800", "role": "user"},), ("x",), chat_template_kwargs={"b": 2, "a": 1})
    assert content_hash(a) == content_hash(b)
    assert len({content_hash(it) for it in (a, item("a"), item("b"), item("a", "y"), ScoreItem((), ("a",), form="text"))}) == 5


def test_a_quarantine_forgets_the_oldest_first() -> None:
    clock = Clock()
    quarantine = Quarantine(clock, max_known=2)
    quarantine.suspect([item("a"), item("b"), item("c")])
    assert quarantine.split([item("a"), item("b"), item("c")]) == ([0], [1, 2], [])
    quarantine.convict(item("b"))
    quarantine.suspect([item("b")])
    assert quarantine.split([item("a"), item("b"), item("c")]) == ([0], [2], [1])
    clock.now += HOLD_S
    assert quarantine.split([item("b"), item("c")]) == ([0, 1], [], [])


def test_what_one_ingress_found_out_the_others_know(tmp_path: Path) -> None:
    now = [1000.0]
    clusters = [Cluster(table(), Scorers("v1", dies_of("poison"))) for _ in range(2)]
    for cluster in clusters:
        cluster.dispatcher = Dispatcher(
            cluster.read,
            cluster,
            clock=cluster.clock,
            sleep=cluster.clock.sleep,
            convictions=Convictions(str(tmp_path / "x"), now=lambda: now[0]),
        )
    first, second = clusters

    async def go() -> list[str | None]:
        found = codes(await first.score(item("poison")))
        await first.dispatcher.refresh()
        await second.dispatcher.refresh()
        return found + codes(await second.score(item("poison"), item("a")))

    assert run(go()) == ["poisoned", "poisoned", None]
    assert second.count(DEATHS) == 0
    assert len(second.scorers["v1"].calls) == 1
    now[0] += HOLD_S + 1.0
    assert Convictions(str(tmp_path / "x"), now=lambda: now[0]).exchange([]) == set()
    assert list((tmp_path / "x").iterdir()) == []


def test_storage_that_is_away_costs_nobody_a_reply(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    told = Convictions(str(tmp_path / "file" / "x"))
    assert told.exchange(["a"]) == {"a"}


def test_replicas_that_are_added_get_their_share_of_the_calls_that_wait() -> None:
    cluster = Cluster(table(max_replicas=3), Scorers("v1"))
    scorers = cluster.scorers["v1"]
    scorers.hang = True

    async def go() -> list[list[tuple[float, ...] | None]]:
        tasks = [asyncio.create_task(cluster.score(item("x" * (i + 1)), request_id=f"{i}")) for i in range(6)]
        while len(scorers.calls) < 6:
            await asyncio.sleep(0)
        await cluster.dispatcher.refresh()
        assert scorers.cancelled == 0
        scorers.hang, scorers.running = False, 3
        await cluster.dispatcher.refresh()
        moved = [await task for task in tasks[2:]]
        # The oldest stay where they are, and whoever is gone is not sent again.
        assert not tasks[0].done()
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        return [rewards(scored) for scored in moved]

    assert run(go()) == [[(float(i + 1),)] for i in range(2, 6)]
    assert cluster.count(REPEATS, reason="moved") == 4
    assert len(scorers.calls) == 10
    assert cluster.count(REQUESTS, outcome="cancelled") == 2


def test_replicas_that_go_move_nothing() -> None:
    cluster = Cluster(table(max_replicas=3), Scorers("v1"))
    scorers = cluster.scorers["v1"]
    scorers.hang, scorers.running = True, 3

    async def go() -> None:
        task = asyncio.create_task(cluster.score(item("a")))
        while not scorers.calls:
            await asyncio.sleep(0)
        for running in (3, 1, 0):
            scorers.running = running
            await cluster.dispatcher.refresh()
        assert len(scorers.calls) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(go())
