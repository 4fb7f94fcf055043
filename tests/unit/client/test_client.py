from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rayward.client.client import AsyncRewardClient, RewardClient
from rayward.contract.conversation import Message
from rayward.errors import (
    AlreadyTemplatedError,
    ChangedTextError,
    ConfigError,
    ContractError,
    DeadlineError,
    OverloadedError,
    PartialError,
    RequestError,
    ServerError,
    TooLongError,
    UnavailableError,
    UnsupportedMessageError,
)
from rayward.wire.items import Asked, ScoreItem
from rayward.wire.rules import Limits, parse_request

Handler = Callable[[httpx.Request], httpx.Response]


class Clock:
    """Advanced by sleeps and by handlers, never by itself."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, clock: Clock) -> Callable[..., Any]:
    """Call one method of either client: call(handler, "score", prompt, completions, deadline_s=…)."""

    def run(handler: Handler, method: str, *args: Any, more: dict[str, Any] | None = None, **settings: Any) -> Any:
        common = {"transport": httpx.MockTransport(handler), "clock": clock, "jitter": lambda: 1.0, **settings}
        if request.param == "sync":
            with RewardClient("http://server", sleep=clock.sleep, **common) as client:
                return getattr(client, method)(*args, **(more or {}))

        async def run_async() -> Any:
            async with AsyncRewardClient("http://server", sleep=clock.sleep, **common) as client:
                return await getattr(client, method)(*args, **(more or {}))

        return asyncio.run(run_async())

    return run


def reply(results: list[Any], version: str = "v1") -> httpx.Response:
    usage = {"tokens": 1, "tokens_computed": 1}
    body = {"id": "score-1", "model": "rm", "version": version, "results": results, "usage": usage}
    return httpx.Response(200, content=json.dumps(body).encode())


def scores_by_length(request: httpx.Request) -> httpx.Response:
    asked = json.loads(request.content)["items"]
    return reply([{"rewards": [float(len(text)) for text in item["completions"]]} for item in asked])


def error(status: int, code: str = "x", item: int | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
    body = {"error": {"code": code, "message": "the problem", "remedy": "the remedy", "item": item}}
    return httpx.Response(status, json=body, headers=headers)


def sequence(*answers: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """Answers in order; the last one repeats."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        answer = answers[min(len(seen), len(answers) - 1)]
        seen.append(request)
        if isinstance(answer, Exception):
            raise answer
        # A fresh response each time: a client consumes it.
        return httpx.Response(
            answer.status_code, content=answer.content, headers={k: v for k, v in answer.headers.items() if k.startswith("retry-after")}
        )

    return handle, seen


def test_score_returns_rewards_in_order(call: Callable[..., Any]) -> None:
    assert call(scores_by_length, "score", "Hi", ["abc", "a"]) == [3.0, 1.0]


def test_model_and_messages_are_sent(call: Callable[..., Any]) -> None:
    handle, seen = sequence(reply([{"rewards": [1.0]}]))
    turns = (Message(role="user", content="é\ud800"),)
    call(handle, "score_items", [ScoreItem(prompt=turns, completions=("a",))], model="rm")
    assert json.loads(seen[0].content) == {"items": [{"prompt": list(turns), "completions": ["a"]}], "model": "rm", "deadline_ms": 59750}
    assert seen[0].url == "http://server/v1/score"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, 2]}}}
TURNS: tuple[Message, ...] = (
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "It is 42."},
)
PROMPT: tuple[Message, ...] = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "It", "prefix": True})
RICH = ScoreItem(PROMPT, (TURNS, "plain"), tools=({"name": "f"},), chat_template_kwargs={"enable_thinking": True})


def test_turns_tools_and_variables_arrive_as_they_were(call: Callable[..., Any]) -> None:
    by_hand = {
        "prompt": PROMPT,
        "completions": (TURNS, "plain"),
        "tools": ({"name": "f"},),
        "chat_template_kwargs": {"enable_thinking": True},
    }
    for item in (RICH, by_hand):
        handle, seen = sequence(reply([{"rewards": [1.0, 2.0]}]))
        call(handle, "score_items", [item])
        assert parse_request(seen[0].content, Limits())[0] == [RICH]
    handle, seen = sequence(reply([{"rewards": [1.0, 2.0]}]))
    more = {"tools": RICH.tools, "chat_template_kwargs": RICH.chat_template_kwargs}
    assert call(handle, "score", PROMPT, RICH.completions, more=more) == [1.0, 2.0]
    assert parse_request(seen[0].content, Limits())[0] == [RICH]


@pytest.mark.parametrize(
    "own", [{"asked": Asked(weights="w")}, {"seed": 1}, {"critiques": (("c",),)}], ids=["weights", "seed", "critiques"]
)
def test_what_an_item_asks_for_by_itself_is_not_dropped_in_silence(call: Callable[..., Any], own: dict[str, Any]) -> None:
    handle, seen = sequence(reply([{"rewards": [1.0]}]))
    with pytest.raises(ConfigError, match="the same for all its items"):
        call(handle, "score_items", [ScoreItem(({"role": "user", "content": "a"},), ("b",), **own)])
    assert seen == []


def test_long_list_is_split_and_put_together_in_order(call: Callable[..., Any]) -> None:
    sizes: list[int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["items"]))
        answer = scores_by_length(request)
        return httpx.Response(200, content=answer.content.replace(b'"v1"', f'"v{len(sizes)}"'.encode()))

    items = [{"prompt": "p", "completions": ["x" * (i + 1)]} for i in range(7)]
    scores = call(handle, "score_items", items, max_items_per_request=3)
    assert sizes == [3, 3, 1]
    assert [result.rewards for result in scores.results] == [(float(i + 1),) for i in range(7)]
    assert scores.versions == ("v1", "v1", "v1", "v2", "v2", "v2", "v3")


def test_item_errors_stay_with_their_items(call: Callable[..., Any]) -> None:
    handle, _ = sequence(reply([{"rewards": [1.0]}, {"error": {"code": "too_long", "message": "m"}}]))
    first, second = call(handle, "score_items", [{"prompt": "p", "completions": ["a"]}] * 2).results
    assert first.rewards == (1.0,)
    assert second.rewards is None
    assert second.error.code == "too_long"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("too_long", TooLongError),
        ("template", ContractError),
        ("unsupported_message", UnsupportedMessageError),
        ("already_templated", AlreadyTemplatedError),
        ("changed_by_template", ChangedTextError),
        ("non_finite", ServerError),
    ],
)
def test_score_raises_the_items_error(call: Callable[..., Any], code: str, kind: type[Exception]) -> None:
    handle, _ = sequence(reply([{"error": {"code": code, "message": "what happened"}}]))
    with pytest.raises(kind, match="what happened"):
        call(handle, "score", "p", ["a"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>proxy</html>",
        b"[1.0]",
        b'{"rewards": [1.0]}',
        *(
            b'{"id":"1","model":"m","version":"v","usage":{"tokens":1,"tokens_computed":1},"results":' + results + b"}"
            for results in (
                b"[]",
                b'[{"rewards":[1.0,2.0]},{"rewards":[1.0,2.0]}]',
                b"[{}]",
                b"[null]",
                b'[{"rewards":null}]',
                b'[{"rewards":[]}]',
                b'[{"rewards":[1.0]}]',
                b'[{"rewards":[1.0,2.0,3.0]}]',
                b'[{"rewards":[1.0,null]}]',
                b'[{"rewards":[1.0,NaN]}]',
                b'[{"rewards":[1.0,Infinity]}]',
                b'[{"rewards":[1.0,1e999]}]',
                b'[{"rewards":[1.0,"2.0"]}]',
                b'[{"rewards":[1.0,true]}]',
                b'[{"rewards":2.0}]',
                b'[{"rewards":[1.0,2.0],"error":{"code":"x","message":"y"}}]',
            )
        ),
    ],
)
def test_bad_reply_is_an_error_never_a_number(call: Callable[..., Any], clock: Clock, body: bytes) -> None:
    handle, seen = sequence(httpx.Response(200, content=body))
    with pytest.raises(ServerError):
        call(handle, "score", "p", ["a", "b"])
    assert len(seen) == 1
    assert clock.sleeps == []


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_retryable_status_is_retried_with_growing_waits(call: Callable[..., Any], clock: Clock, status: int) -> None:
    handle, seen = sequence(error(status), error(status), error(status), reply([{"rewards": [2.0]}]))
    assert call(handle, "score", "p", ["a"]) == [2.0]
    assert len(seen) == 4
    assert clock.sleeps == pytest.approx([0.1, 0.2, 0.4])


def test_jitter_halves_the_wait_at_most(call: Callable[..., Any], clock: Clock) -> None:
    handle, _ = sequence(error(503), reply([{"rewards": [2.0]}]))
    call(handle, "score", "p", ["a"], jitter=lambda: 0.0)
    assert clock.sleeps == pytest.approx([0.05])


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("gone")])
def test_lost_connection_is_retried(call: Callable[..., Any], failure: Exception) -> None:
    handle, seen = sequence(failure, reply([{"rewards": [2.0]}]))
    assert call(handle, "score", "p", ["a"]) == [2.0]
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("status", "kind"), [(503, UnavailableError), (429, OverloadedError), (502, ServerError), (504, DeadlineError), (408, DeadlineError)]
)
def test_retries_are_bounded(call: Callable[..., Any], status: int, kind: type[Exception]) -> None:
    handle, seen = sequence(error(status))
    with pytest.raises(kind, match="3 attempts failed") as caught:
        call(handle, "score", "p", ["a"], max_retries=2)
    assert len(seen) == 3
    assert caught.value.retryable  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_refusal_is_not_retried_and_names_the_item_of_the_call(call: Callable[..., Any], status: int) -> None:
    handle, seen = sequence(reply([{"rewards": [1.0]}] * 2), error(status, "empty_prompt", item=1))
    with pytest.raises(RequestError, match="the problem") as caught:
        call(handle, "score_items", [{"prompt": "p", "completions": ["a"]}] * 4, max_items_per_request=2)
    assert caught.value.item == 3
    assert caught.value.remedy == "the remedy"
    assert len(seen) == 2


@pytest.mark.parametrize("status", [500, 302])
def test_other_status_is_a_server_error_at_once(call: Callable[..., Any], status: int) -> None:
    handle, seen = sequence(httpx.Response(status, content=b"oops"))
    with pytest.raises(ServerError, match=f"status {status}: oops"):
        call(handle, "score", "p", ["a"])
    assert len(seen) == 1


@pytest.mark.parametrize(("text", "wait"), [("3", 3.0), ("0.5", 0.5), ("nonsense", 0.1), ("-5", 0.1), ("inf", 0.1)])
def test_retry_after_is_honoured(call: Callable[..., Any], clock: Clock, text: str, wait: float) -> None:
    handle, _ = sequence(error(503, headers={"retry-after": text}), reply([{"rewards": [2.0]}]))
    call(handle, "score", "p", ["a"])
    assert clock.sleeps == pytest.approx([wait])


def test_retry_after_in_milliseconds_goes_before_seconds(call: Callable[..., Any], clock: Clock) -> None:
    handle, _ = sequence(error(429, headers={"retry-after": "1", "retry-after-ms": "350"}), reply([{"rewards": [2.0]}]))
    call(handle, "score", "p", ["a"])
    assert clock.sleeps == pytest.approx([0.35])


def test_retry_after_date_in_the_past_falls_back_to_backoff(call: Callable[..., Any], clock: Clock) -> None:
    handle, _ = sequence(error(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}), reply([{"rewards": [2.0]}]))
    call(handle, "score", "p", ["a"])
    assert clock.sleeps == pytest.approx([0.1])


def test_wait_beyond_the_deadline_is_not_begun(call: Callable[..., Any], clock: Clock) -> None:
    handle, seen = sequence(error(503, headers={"retry-after": "30"}))
    with pytest.raises(DeadlineError, match="deadline_s=10"):
        call(handle, "score", "p", ["a"], deadline_s=10.0)
    assert clock.sleeps == []
    assert len(seen) == 1


def test_deadline_spans_all_attempts_and_all_requests_of_a_call(call: Callable[..., Any], clock: Clock) -> None:
    timeouts: list[float] = []

    def slow(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"]["read"])
        clock.now += 4.0
        return scores_by_length(request)

    with pytest.raises(PartialError) as caught:
        call(slow, "score_items", [{"prompt": "p", "completions": ["a"]}] * 5, max_items_per_request=1, deadline_s=10.0)
    assert timeouts == pytest.approx([10.0, 6.0, 2.0])
    assert isinstance(caught.value.__cause__, DeadlineError)
    assert caught.value.failed == (3, 4)
    assert caught.value.rewards == ((1.0,), (1.0,), (1.0,), None, None)


def test_read_timeout_at_the_deadline_is_a_deadline_error(call: Callable[..., Any], clock: Clock) -> None:
    def hang(request: httpx.Request) -> httpx.Response:
        clock.now += request.extensions["timeout"]["read"]
        raise httpx.ReadTimeout("timed out")

    with pytest.raises(DeadlineError):
        call(hang, "score", "p", ["a"], deadline_s=5.0, max_retries=0)


def test_models_and_health(call: Callable[..., Any]) -> None:
    info = {"id": "rm", "object": "model", "version": "v1", "max_tokens": 128, "outputs": ["reward"]}
    pages = {
        "/v1/models": {"object": "list", "data": [info]},
        "/health": {"status": "ok", "model": "rm", "version": "v1"},
    }

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.method == "GET"
        return httpx.Response(200, json=pages[request.url.path])

    assert call(handle, "models")[0].model_dump(exclude_defaults=True) == {k: v for k, v in info.items() if k != "object"}
    assert call(handle, "health").version == "v1"


def test_base_url_keeps_its_path() -> None:
    handle, seen = sequence(reply([{"rewards": [1.0]}]))
    RewardClient("http://server/rm/", transport=httpx.MockTransport(handle)).score("p", ["a"])
    assert seen[0].url.path == "/rm/v1/score"


@pytest.mark.parametrize("client", [RewardClient, AsyncRewardClient])
def test_base_url_without_scheme_is_refused(client: Any) -> None:
    with pytest.raises(ConfigError, match="localhost:8000"):
        client("localhost:8000")


def test_both_clients_have_the_same_surface() -> None:
    def surface(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert surface(RewardClient) == surface(AsyncRewardClient) == {"close", "health", "models", "score", "score_items", "score_texts"}
