"""How a call is split and put together, what it refuses, and where clients may be used: threads, loops, processes."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from tests.unit.client.test_client import Clock, error, reply, scores_by_length
from tests.unit.client.test_retries import answers, run

from rayward.client.client import AsyncRewardClient, RewardClient
from rayward.errors import ConfigError, DeadlineError, PartialError, RaywardError, RequestError, RuleError, ServerError
from rayward.wire.items import ScoreItem

ITEM = {"prompt": "p", "completions": ["a"]}


def test_a_long_list_is_split_by_tokens() -> None:
    sizes: list[int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["items"]))
        return scores_by_length(request)

    items = [{"prompt": "p" * 400, "completions": ["a", "b"]}] * 10 + [{"prompt": "p" * 40_000, "completions": ["a"]}] + [ITEM]
    scores = run(handle, items, method="score_items", max_tokens_per_request=450)
    assert sorted(sizes) == [1, 1, 2, 4, 4] or sizes == [4, 4, 2, 1, 1]
    assert len(scores.rewards()) == 12


def test_the_client_bounds_its_own_requests_in_flight() -> None:
    most = now = 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return scores_by_length(request)

    async def main() -> list[Any]:
        async with AsyncRewardClient("http://a", transport=httpx.MockTransport(handle), max_concurrency=4) as client:
            return await asyncio.gather(*(client.score("p", ["x" * (i % 7 + 1)]) for i in range(200)))

    assert asyncio.run(main()) == [[float(i % 7 + 1)] for i in range(200)]
    assert most == 4


class Counting(ThreadingHTTPServer):
    """Answers like the server, and counts connections."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        self.num_connections = 0
        super().__init__(("127.0.0.1", 0), Answering)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.num_connections += 1
        super().process_request(request, client_address)


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
        body = reply([{"rewards": [float(len(text)) for text in item["completions"]]} for item in asked]).content
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Counting]:
    with Counting() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def url(server: Counting) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_1500_calls_at_once_share_a_few_connections(server: Counting) -> None:
    async def main() -> list[list[float]]:
        async with AsyncRewardClient(url(server), max_concurrency=16) as client:
            return await asyncio.gather(*(client.score("p", ["x" * (i % 50 + 1)]) for i in range(1500)))

    assert asyncio.run(main()) == [[float(i % 50 + 1)] for i in range(1500)]
    assert server.num_connections < 150


def test_threads_share_one_blocking_client(server: Counting) -> None:
    with RewardClient(url(server), max_concurrency=4) as client, ThreadPoolExecutor(16) as threads:
        got = list(threads.map(lambda i: client.score("p", ["x" * (i + 1)]), range(64)))
    assert got == [[float(i + 1)] for i in range(64)]
    assert server.num_connections <= 8


def test_one_client_serves_several_loops_and_blocks_inside_one(server: Counting) -> None:
    client = AsyncRewardClient(url(server))
    blocking = RewardClient(url(server))

    async def main() -> list[float]:
        assert blocking.score("p", ["abc"]) == [3.0]
        rewards = await client.score("p", ["ab"])
        await client.close()
        return rewards

    assert [asyncio.run(main()) for _ in range(3)] == [[2.0]] * 3
    blocking.close()
    assert blocking.score("p", ["a"]) == [1.0]
    blocking.close()


def test_a_client_works_in_a_forked_process(server: Counting) -> None:
    with RewardClient(url(server)) as client:
        assert client.score("p", ["a"]) == [1.0]
        # Python 3.12 warns of a fork beside threads, rightly; trainers do it all the same.
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.write(write, json.dumps(client.score("p", ["abcd"])).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert json.loads(os.read(read, 100)) == [4.0]
        os.close(read)
        os.close(write)


def test_a_copy_in_another_process_opens_its_own_connections(server: Counting) -> None:
    for kind in (RewardClient, AsyncRewardClient):
        copy = pickle.loads(pickle.dumps(kind(url(server), model="rm", version="v1")))
        assert repr(copy) == f"{kind.__name__}({url(server)}, model=rm, version=v1)"
    client = pickle.loads(pickle.dumps(RewardClient(url(server))))
    assert client.score("p", ["ab"]) == [2.0]
    client.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever is started in the background by a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_work_on_the_other_thread() -> None:
    cancelled = threading.Event()

    async def handle(request: httpx.Request) -> httpx.Response:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    with RewardClient("http://a", transport=httpx.MockTransport(handle)) as client:
        with pytest.raises(KeyboardInterrupt):
            client.score("p", ["a"])
        assert cancelled.wait(10.0)


# Keys


def test_a_key_comes_from_the_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, seen = answers(reply([{"rewards": [1.0]}]))
    run(handle)
    monkeypatch.setenv("RAYWARD_API_KEY", "from-the-environment")
    run(handle)
    run(handle, api_key="from-the-argument")
    assert [request.headers.get("authorization") for request in seen] == [None, "Bearer from-the-environment", "Bearer from-the-argument"]


def test_a_key_stands_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_API_KEY", "hidden-value")
    client = AsyncRewardClient("http://a")
    assert "hidden-value" not in repr(client)
    assert b"hidden-value" not in pickle.dumps(client)
    assert "other-value" not in repr(AsyncRewardClient("http://a", api_key="other-value"))


# Bad items


def test_bad_items_are_errors_of_their_own_where_that_is_asked() -> None:
    handle, seen = answers(reply([{"rewards": [1.0]}, {"rewards": [2.0]}]))
    bad = [
        {"prompt": "p", "completions": [""]},
        {"prompt": "p"},
        {"prompt": "p", "completions": [b"bytes"]},
        {"prompt": 3, "completions": ["a"]},
    ]
    scores = run(handle, [ITEM, *bad, ITEM], method="score_items", bad_items="report")
    assert [result.rewards for result in scores.results] == [(1.0,), None, None, None, None, (2.0,)]
    assert scores.failed == (1, 2, 3, 4)
    assert [scores.results[i].error.code for i in scores.failed] == ["empty_completion", "missing_field", "invalid_item", "wrong_type"]
    assert not any(scores.results[i].error.retryable for i in scores.failed)
    assert "item 1" in scores.results[1].error.message
    assert len(json.loads(seen[0].content)["items"]) == 2
    with pytest.raises(RequestError) as caught:
        run(handle, [ITEM, bad[2]], method="score_items")
    assert caught.value.item == 1


def test_only_bad_items_make_no_request() -> None:
    handle, seen = answers(reply([]))
    scores = run(handle, [{"prompt": "p", "completions": [""]}], method="score_items", bad_items="report")
    assert scores.failed == (0,)
    assert scores.versions == ("",)
    assert seen == []


def test_what_the_server_still_refuses_is_left_out_and_the_rest_sent_again() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        items = json.loads(request.content)["items"]
        large = next((i for i, item in enumerate(items) if len(item["prompt"]) > 5), None)
        return scores_by_length(request) if large is None else error(413, "text_too_long", item=large)

    items = [{"prompt": prompt, "completions": ["a"]} for prompt in ("p", "too long", "q", "too long", "r")]
    scores = run(handle, items, method="score_items", bad_items="report")
    assert scores.failed == (1, 3)
    assert {scores.results[i].error.code for i in scores.failed} == {"text_too_long"}
    with pytest.raises(RuleError) as caught:
        run(handle, items, method="score_items")
    assert caught.value.item == 1


def test_a_request_that_is_too_large_is_halved() -> None:
    sizes: list[int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["items"]))
        return error(413, "too_many_items") if sizes[-1] > 3 else scores_by_length(request)

    items = [{"prompt": "p", "completions": ["x" * (i + 1)]} for i in range(10)]
    assert run(handle, items, method="score_items").rewards() == [[float(i + 1)] for i in range(10)]
    assert max(sizes) == 10
    handle, _ = answers(error(413, "body_too_large"))  # type: ignore[assignment]
    with pytest.raises(RuleError, match="body_too_large"):
        run(handle, [ITEM], method="score_items")


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize("setting", ["deadline_s", "max_items_per_request", "max_tokens_per_request", "max_concurrency"])
def test_settings_that_nothing_can_be_sent_with_are_refused(kind: Any, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        kind("http://a", **{setting: 0})


def test_no_items_and_flat_items_are_refused() -> None:
    handle, seen = answers(reply([]))
    with pytest.raises(RequestError, match="no items"):
        run(handle, [], method="score_items")
    with pytest.raises(ConfigError, match="no conversation"):
        run(handle, [ScoreItem((), ("text",), form="text")], method="score_items")
    assert seen == []


# Replies


def test_what_a_newer_server_adds_is_passed_over() -> None:
    body = json.loads(reply([{"rewards": [1.0], "later": 1}]).content) | {"more": {}}
    handle, _ = answers(httpx.Response(200, json=body))
    assert run(handle) == [1.0]


def test_some_requests_without_an_answer_leave_the_others_rewards() -> None:
    clock = Clock()

    def handle(request: httpx.Request) -> httpx.Response:
        if "lost" in request.content.decode():
            clock.now += 100.0
            return error(503)
        return scores_by_length(request)

    items = [ITEM, {"prompt": "lost", "completions": ["a"]}, ITEM]
    with pytest.raises(PartialError) as caught:
        run(handle, items, clock=clock, method="score_items", max_items_per_request=1)
    told = caught.value
    assert 1 in told.failed
    assert dict(zip(told.failed, told.codes, strict=True))[1] == "deadline_exceeded"
    assert told.rewards[0] == (1.0,)
    again = RaywardError.from_json(told.to_json())
    assert isinstance(again, PartialError)
    assert again.failed == told.failed
    assert pickle.loads(pickle.dumps(told)).rewards == told.rewards


def test_when_nothing_was_answered_the_first_error_is_raised() -> None:
    handle, _ = answers(error(503))
    with pytest.raises(DeadlineError):
        run(handle, [ITEM] * 3, method="score_items", max_items_per_request=1, deadline_s=1.0)


# Whole texts


def test_whole_texts_go_to_the_path_that_takes_them() -> None:
    handle, seen = answers(httpx.Response(200, json={"rewards": [1.5, -2.0], "scores": [1.5, -2.0], "extra_logs": {}}))
    assert run(handle, ["<s>a</s>", "<s>b</s>"], method="score_texts") == [1.5, -2.0]
    assert seen[0].url.path == "/get_reward"
    assert json.loads(seen[0].content) == {"query": ["<s>a</s>", "<s>b</s>"]}
    run(handle, ["pa", "pb"], ["p", "p"], method="score_texts")
    assert json.loads(seen[1].content) == {"query": ["pa", "pb"], "prompts": ["p", "p"]}
    run(handle, ["a", "b"], method="score_texts", version="v3", deadline_s=10.0)
    assert (seen[2].headers["x-rayward-version"], seen[2].headers["x-rayward-deadline-ms"]) == ("v3", "9750")


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 2.0, 3.0], [1.0, None], ["1", 2.0], [1.0, float("inf")]])
def test_bad_rewards_of_texts_are_an_error(rewards: list[Any]) -> None:
    handle, _ = answers(httpx.Response(200, content=json.dumps({"rewards": rewards})))
    with pytest.raises(ServerError):
        run(handle, ["a", "b"], method="score_texts")


def test_whole_texts_carry_no_options() -> None:
    handle, seen = answers(httpx.Response(200, json={"rewards": [1.0]}))
    refused: tuple[dict[str, Any], ...] = ({"model": "rm"}, {"weights": "w"})
    for options in refused:
        with pytest.raises(ConfigError, match="whole texts"):
            run(handle, ["a"], method="score_texts", **options)
    with pytest.raises(RequestError, match="no texts"):
        run(handle, [], method="score_texts")
    with pytest.raises(RequestError, match="1 texts and 2 prompts"):
        run(handle, ["a"], ["a", "b"], method="score_texts")
    assert seen == []
