"""What is repeated, where, and until when: refused connections, servers that are not up, single items, several endpoints, hedging."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.unit.client.test_client import Clock, error, reply, scores_by_length

from rayward.client.client import AsyncRewardClient
from rayward.errors import AccessError, DeadlineError, PartialError, RequestError, RuleError, ServerError, UnavailableError, VersionError

ITEM = {"prompt": "p", "completions": ["a"]}
NOT_UP = httpx.Response(404, text="Path '/v1/score' not found. Ping http://.../-/routes for available routes.")
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


def client(handle: Callable[[httpx.Request], Any], clock: Clock, url: str | list[str] = "http://a", **settings: Any) -> AsyncRewardClient:
    transport = httpx.MockTransport(handle)
    return AsyncRewardClient(url, transport=transport, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0, **settings)


def run(handle: Callable[[httpx.Request], Any], *args: Any, clock: Clock | None = None, method: str = "score", **settings: Any) -> Any:
    call = {name: settings.pop(name) for name in ("version", "bad_items", "deadline_s", "request_id", "trace") if name in settings}

    async def main() -> Any:
        async with client(handle, clock or Clock(), **settings) as one:
            return await getattr(one, method)(*(args or ("p", ["a"])), **call)

    return asyncio.run(main())


def copied(answer: httpx.Response) -> httpx.Response:
    return httpx.Response(
        answer.status_code, content=answer.content, headers={k: v for k, v in answer.headers.items() if k == "retry-after"}
    )


def answers(*given: httpx.Response | Exception) -> tuple[Callable[[httpx.Request], httpx.Response], list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = given[min(len(seen), len(given)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return copied(answer)

    return handle, seen


GOOD = reply([{"rewards": [2.0]}])


@pytest.mark.parametrize(
    "refusal", [httpx.ConnectError("refused"), httpx.ConnectTimeout("no answer"), NOT_UP], ids=["refused", "silent", "404"]
)
def test_a_server_that_is_not_up_is_awaited_until_the_deadline(refusal: Any) -> None:
    clock = Clock()
    handle, seen = answers(*[refusal] * 12, GOOD)
    assert run(handle, clock=clock, max_retries=0, deadline_s=60.0) == [2.0]
    assert len(seen) == 13
    assert sum(clock.sleeps) > 25.0
    handle, _ = answers(refusal)
    with pytest.raises(DeadlineError, match="deadline_s=60") as caught:
        run(handle, clock=clock, max_retries=0)
    assert isinstance(caught.value.__cause__, UnavailableError)


def test_a_404_of_anybody_else_is_the_callers_mistake() -> None:
    handle, seen = answers(httpx.Response(404, text="<h1>nginx</h1>"))
    with pytest.raises(RequestError, match="nginx"):
        run(handle)
    assert len(seen) == 1


def test_a_replica_that_died_behind_a_proxy_is_a_failed_try() -> None:
    handle, seen = answers(httpx.Response(500, text="Internal Server Error"), httpx.Response(408, text="Request x timed out."), GOOD)
    assert run(handle) == [2.0]
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "unauthorized", AccessError),
        (403, "forbidden", AccessError),
        (409, "version_not_served", VersionError),
        (500, "internal", ServerError),
    ],
)
def test_what_no_other_try_betters_is_raised_at_once(status: int, code: str, kind: type[Exception]) -> None:
    handle, seen = answers(error(status, code))
    with pytest.raises(kind, match="the problem") as caught:
        run(handle)
    assert len(seen) == 1
    assert getattr(caught.value, "status", status) == status


def test_the_remaining_time_travels_and_shrinks() -> None:
    clock = Clock()
    handle, seen = answers(error(503, headers={"retry-after": "4"}), GOOD)
    run(handle, clock=clock, deadline_s=10.0)
    assert [json.loads(request.content)["deadline_ms"] for request in seen] == [9750, 5750]


def test_a_retryable_item_is_asked_again_alone() -> None:
    bodies: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        if len(bodies) == 1:
            lost = {"error": {"code": "interrupted", "message": "the replica went away", "retryable": True}}
            return reply([{"rewards": [1.0]}, lost, {"error": {"code": "too_long", "message": "m"}}])
        return reply([{"rewards": [5.0]}], version="v2")

    clock = Clock()
    scores = run(handle, [ITEM, {"prompt": "q", "completions": ["b"]}, ITEM], clock=clock, method="score_items")
    assert [result.rewards for result in scores.results] == [(1.0,), (5.0,), None]
    assert scores.versions == ("v1", "v2", "v1")
    assert [len(body["items"]) for body in bodies] == [3, 1]
    assert bodies[1]["items"] == [{"prompt": "q", "completions": ["b"]}]
    assert clock.sleeps == pytest.approx([0.1])


def test_a_retryable_item_keeps_its_error_when_the_time_is_up() -> None:
    clock = Clock()

    def handle(request: httpx.Request) -> httpx.Response:
        clock.now += 3.0
        return reply([{"error": {"code": "interrupted", "message": "gone", "retryable": True}}])

    scores = run(handle, [ITEM], clock=clock, deadline_s=10.0, method="score_items")
    assert scores.results[0].error.code == "interrupted"
    assert scores.failed == (0,)
    with pytest.raises(PartialError, match="interrupted"):
        scores.rewards()
    with pytest.raises(UnavailableError):
        run(handle, clock=clock, deadline_s=10.0)


def test_max_retries_bounds_the_repeats_of_items_too() -> None:
    handle, seen = answers(reply([{"error": {"code": "overloaded", "message": "full", "retryable": True}}]))
    assert run(handle, [ITEM], method="score_items", max_retries=2).results[0].error.code == "overloaded"
    assert len(seen) == 3


def test_one_request_id_for_all_requests_and_tries_of_a_call() -> None:
    handle, seen = answers(error(503), *[reply([{"rewards": [1.0]}])] * 3)
    scores = run(handle, [ITEM] * 3, method="score_items", max_items_per_request=1)
    assert {request.headers["x-request-id"] for request in seen} == {scores.request_id}
    assert len(seen) == 4
    handle, seen = answers(GOOD)
    run(handle, request_id="mine")
    assert seen[0].headers["x-request-id"] == "mine"


def test_a_version_is_pinned_by_the_client_or_by_the_call() -> None:
    handle, seen = answers(GOOD)
    run(handle, version="v7")
    assert json.loads(seen[0].content)["version"] == "v7"

    async def main() -> None:
        async with client(handle, Clock(), version="v1") as one:
            await one.score("p", ["a"])
            await one.score("p", ["a"], version="v2")

    asyncio.run(main())
    assert [json.loads(request.content)["version"] for request in seen[1:]] == ["v1", "v2"]


# Several endpoints


def hosts(seen: list[httpx.Request]) -> list[str]:
    return [request.url.host for request in seen]


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), error(503), error(429, headers={"retry-after": "30"}), NOT_UP])
def test_another_endpoint_is_asked_at_once(failure: Any) -> None:
    seen: list[httpx.Request] = []
    first: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        first.append(request.url.host)
        if request.url.host != first[0]:
            return copied(GOOD)
        if isinstance(failure, Exception):
            raise failure
        return copied(failure)

    clock = Clock()
    assert run(handle, clock=clock, url=["http://a", "http://b"]) == [2.0]
    assert sorted(hosts(seen)) == ["a", "b"]
    assert clock.sleeps == []


def test_when_all_endpoints_refuse_the_shortest_wait_is_taken() -> None:
    waits = {"a": "30", "b": "3"}
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) > 2:
            return copied(GOOD)
        return error(429, "overloaded", headers={"retry-after": waits[request.url.host]})

    clock = Clock()
    assert run(handle, clock=clock, url="http://a, http://b") == [2.0]
    assert clock.sleeps == pytest.approx([3.0])


def test_an_endpoint_that_failed_is_left_alone_for_a_while() -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.host == "dead":
            raise httpx.ConnectError("refused")
        return copied(GOOD)

    async def main() -> None:
        clock = Clock()
        async with client(handle, clock, url=["http://dead", "http://alive"]) as one:
            for _ in range(10):
                await one.score("p", ["a"])
            assert hosts(seen).count("dead") <= 1
            clock.now += 6.0
            for _ in range(4):
                await one.score("p", ["a"])
        assert hosts(seen).count("dead") in (1, 2)

    asyncio.run(main())


def test_the_endpoint_with_the_fewest_requests_in_flight_is_asked() -> None:
    seen: list[str] = []

    async def main() -> None:
        release = asyncio.Event()

        async def handle(request: httpx.Request) -> httpx.Response:
            seen.append(request.url.host)
            await release.wait()
            return copied(GOOD)

        async with client(handle, Clock(), url=["http://a", "http://b", "http://c"]) as one:
            calls = [asyncio.ensure_future(one.score("p", ["a"])) for _ in range(9)]
            while len(seen) < 9:
                await asyncio.sleep(0)
            release.set()
            await asyncio.gather(*calls)

    asyncio.run(main())
    assert {host: seen.count(host) for host in "abc"} == {"a": 3, "b": 3, "c": 3}


# Hedging


def hanging_first(seen: list[str], cancelled: list[str]) -> Handler:
    async def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        if len(seen) > 1:
            return copied(GOOD)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.url.host)
            raise
        raise AssertionError

    return handle


def test_a_hedged_request_takes_the_first_answer_and_ends_the_other() -> None:
    seen: list[str] = []
    cancelled: list[str] = []
    assert run(hanging_first(seen, cancelled), url=["http://a", "http://b"], hedge_after_s=0.01) == [2.0]
    assert sorted(seen) == ["a", "b"]
    assert cancelled == seen[:1]


def test_nothing_is_hedged_by_default() -> None:
    seen: list[str] = []
    cancelled: list[str] = []
    with pytest.raises(DeadlineError):
        run(hanging_first(seen, cancelled), url=["http://a", "http://b"], deadline_s=0.1)
    assert len(seen) == len(cancelled) == 1


def test_both_of_a_hedged_pair_may_fail() -> None:
    calls = 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        mine = calls
        while mine == 1 and calls < 2:
            await asyncio.sleep(0)
        return error(422, "empty_prompt", item=0)

    with pytest.raises(RuleError, match="the problem"):
        run(handle, hedge_after_s=0.001)
    assert calls == 2


def test_scores_by_length_still_hold_with_everything_on() -> None:
    items = [{"prompt": "p", "completions": ["x" * (i + 1), "y"]} for i in range(20)]
    scores = run(scores_by_length, items, method="score_items", max_items_per_request=3, hedge_after_s=5.0, url=["http://a", "http://b"])
    assert scores.rewards() == [[float(i + 1), 1.0] for i in range(20)]
