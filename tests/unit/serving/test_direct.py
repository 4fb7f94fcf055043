"""The clients by handle: the same interface over a dispatcher; fake handles, no Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.serving.test_dispatch import Cluster, Scorers

from rayward import AsyncRewardClient, RewardClient
from rayward.errors import ConfigError, DeadlineError, OverloadedError, RequestError, VersionError
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.direct import DirectLink, direct
from rayward.serving.dispatch import ReplicaDiedError
from rayward.serving.routes import ModelRoutes, Release, RouteTable
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem


def table(*versions: str) -> RouteTable:
    releases = {version: Release(version=version, source="s", state="ready") for version in versions}
    return RouteTable(default_model="rm", models={"rm": ModelRoutes(releases=releases, current=versions[0])})


def cluster(before: Callable[[ScoreCall], ScoredCall | None] | None = None) -> Cluster:
    return Cluster(table("v1", "v2"), Scorers("v1", before), Scorers("v2", shift=100.0))


def run(made: Cluster, method: str, *args: Any, **call: Any) -> Any:
    settings = {name: call.pop(name) for name in ("max_retries", "max_items_per_request", "weights", "model") if name in call}

    async def main() -> Any:
        async with AsyncRewardClient(lambda: DirectLink(made.dispatcher, "me"), **settings) as client:
            return await getattr(client, method)(*args, **call)

    return asyncio.run(main())


def test_rewards_come_by_handle_as_over_http() -> None:
    made = cluster()
    assert run(made, "score", "abc", ["x", "y"]) == [3.0, 4.0]
    (sent,) = made.scorers["v1"].calls
    assert sent.caller == "me"
    assert 55.0 < (sent.budget_s or 0.0) <= 60.0


def test_the_blocking_client_goes_by_handle_too() -> None:
    made = cluster()
    with RewardClient(lambda: DirectLink(made.dispatcher, "me")) as client:
        assert client.score("abc", ["x"]) == [3.0]
        assert [info.version for info in client.models()] in ([], ["v1"])


def test_what_is_asked_reaches_the_scorer() -> None:
    made = cluster()
    scores = run(made, "score_items", [{"prompt": "ab", "completions": ["x"]}], version="v2", trace=True, request_id="mine", weights="w")
    assert scores.versions == ("v2",)
    assert scores.rewards() == [[102.0]]
    assert scores.model == "rm"
    (sent,) = made.scorers["v2"].calls
    assert sent.request_id == "mine"
    assert sent.items[0].asked == Asked(weights="w")
    assert sent.items[0].trace


def test_a_long_list_is_split_and_an_item_refused_by_its_index() -> None:
    made = cluster()
    items = [{"prompt": "p" * (i + 1), "completions": ["x"]} for i in range(7)]
    assert run(made, "score_items", items, max_items_per_request=3).rewards() == [[float(i + 1)] for i in range(7)]
    assert len(made.scorers["v1"].calls) == 3
    items[4]["completions"] = [""]
    with pytest.raises(RequestError, match="item 4") as caught:
        run(made, "score_items", items)
    assert caught.value.item == 4
    scores = run(made, "score_items", items, bad_items="report")
    assert scores.failed == (4,)


def test_a_version_that_is_not_served_is_refused() -> None:
    with pytest.raises(VersionError):
        run(cluster(), "score", "p", ["a"], version="v9")


def test_refusals_of_a_full_queue_are_repeated_after_the_given_delay() -> None:
    tries: list[ScoreCall] = []

    def full(call: ScoreCall) -> ScoredCall | None:
        tries.append(call)
        if len(tries) < 3:
            raise OverloadedError("full", remedy="wait", retry_after_s=0.01)
        return None

    assert run(cluster(full), "score", "abc", ["x"]) == [3.0]
    assert len(tries) >= 3
    tries.clear()

    def always(call: ScoreCall) -> ScoredCall | None:
        raise OverloadedError("full", remedy="wait", retry_after_s=0.01)

    with pytest.raises(OverloadedError, match="2 attempts failed"):
        run(cluster(always), "score", "abc", ["x"], max_retries=1)
    with pytest.raises(DeadlineError):
        run(cluster(always), "score", "abc", ["x"], deadline_s=0.1)


def test_a_death_is_repeated_by_the_dispatcher() -> None:
    deaths: list[ScoreCall] = []

    def dies(call: ScoreCall) -> ScoredCall | None:
        deaths.append(call)
        if len(deaths) == 1:
            raise ReplicaDiedError("died", by_order=True)
        return None

    assert run(cluster(dies), "score", "abc", ["x"], max_retries=0) == [3.0]


def test_items_that_failed_for_now_are_asked_again() -> None:
    calls: list[int] = []

    def once(call: ScoreCall) -> ScoredCall | None:
        calls.append(len(call.items))
        if len(calls) > 1:
            return None
        lost = ItemResult(error=ItemError.of("overloaded", "full"))
        return ScoredCall("v1", (ItemResult(rewards=(1.0,)), lost))

    items = [{"prompt": "p", "completions": ["x"]}, {"prompt": "qq", "completions": ["x"]}]
    assert run(cluster(once), "score_items", items).rewards() == [[1.0], [2.0]]
    assert calls == [2, 1]


def test_whole_texts() -> None:
    seen: list[ScoreItem] = []

    def answer(call: ScoreCall) -> ScoredCall:
        seen.extend(call.items)
        return ScoredCall("v1", tuple(ItemResult(rewards=(float(len(str(it.completions[0]))),)) for it in call.items))

    assert run(cluster(answer), "score_texts", ["<s>a", "bb"], ["<s>", "x"]) == [4.0, 2.0]
    assert [(it.form, it.prompt_text) for it in seen] == [("text", "<s>"), ("text", None)]
    with pytest.raises(ConfigError, match="score_texts"):
        run(cluster(), "score_items", [seen[0]])


def test_health_waits_for_every_model() -> None:
    made = cluster()

    async def main() -> str:
        async with AsyncRewardClient(lambda: DirectLink(made.dispatcher, "me")) as client:
            return (await client.health()).version

    assert asyncio.run(main()) == "v1"
    made.table = None
    empty = Cluster(None)
    with pytest.raises(DeadlineError):
        run(empty, "score", "p", ["a"], deadline_s=0.05)


def test_the_way_by_handle_travels_to_other_processes_and_needs_a_cluster() -> None:
    copy = pickle.loads(pickle.dumps(RewardClient(direct("front", state="/shared"), model="rm")))
    assert repr(copy) == "RewardClient(handles, model=rm, version=None)"
    with pytest.raises(ConfigError, match="has not joined a Ray cluster"):
        copy.score("p", ["a"])
