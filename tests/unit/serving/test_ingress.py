"""The service over HTTP, in one process: what goes in, what comes out, what is refused and how."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.helpers.backends import MODEL, VERSION, FakeBackends

from rayward.config.scoring import ScoringConfig
from rayward.errors import DeadlineError, OverloadedError, ServerError, UnavailableError
from rayward.serving.auth import Keys, parse_variable
from rayward.serving.front import Endpoint, Front, Incoming
from rayward.serving.http import build_http
from rayward.serving.metrics import Recorder
from rayward.wire.dialect import Body
from rayward.wire.endpoints import BEST_OF_N, SCORE
from rayward.wire.items import ItemResult
from rayward.wire.native import ErrorReply, ScoreReply

CONFIG = ScoringConfig(max_items_per_request=100, max_chars_per_text=20_000, max_body_bytes=200_000)
GOOD = {"items": [{"prompt": "Hi", "completions": ["abc", "abcde"]}]}
SCORE_KEY, ADMIN_KEY = "score-0123456789abcdef", "admin-0123456789abcdef"
KEYS = f"ppo:{SCORE_KEY}, ops:{ADMIN_KEY}:admin"
SECRET = "a private sentence of a user"


def app_of(backends: FakeBackends | None = None, config: ScoringConfig = CONFIG, keys: str = "", **front: Any) -> Any:
    given = Front(backends or FakeBackends(), routes=(SCORE, BEST_OF_N), **front)
    return build_http(given, config, Keys(parse_variable(keys), allow_anonymous=config.allow_anonymous))


def call(app: Any, work: Callable[[httpx.AsyncClient], Awaitable[Any]], address: str = "127.0.0.1") -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True, client=(address, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await work(client)

    return asyncio.run(run())


def send(app: Any, method: str = "POST", path: str = "/v1/score", address: str = "127.0.0.1", **given: Any) -> httpx.Response:
    response: httpx.Response = call(app, lambda client: client.request(method, path, **given), address)
    return response


def error_of(response: httpx.Response) -> Any:
    return ErrorReply.model_validate_json(response.content).error


def test_rewards_come_back_in_order_with_model_version_and_timings() -> None:
    response = send(app_of(), json=GOOD, headers={"x-request-id": "step-7/group-3"})
    assert response.status_code == 200
    reply = ScoreReply.model_validate_json(response.content)
    assert reply.results[0].rewards == (3.0, 5.0)
    assert reply.results[0].num_tokens == (13, 15)
    assert (reply.id, reply.model, reply.version) == ("step-7/group-3", MODEL, VERSION)
    assert reply.timings is not None
    assert (reply.timings.queue_s, reply.timings.encode_s, reply.timings.compute_s) == (0.01, 0.002, 0.03)
    assert reply.timings.total_s >= 0
    assert response.headers["x-request-id"] == "step-7/group-3"
    assert response.headers["x-rayward-version"] == VERSION
    assert "queue;dur=10.0" in response.headers["server-timing"]


def test_an_item_error_says_whether_another_try_may_help() -> None:
    body = {"items": [{"prompt": "a", "completions": [f"error:{code}"]} for code in ("too_long", "interrupted")]}
    results = send(app_of(), json=body).json()["results"]
    assert [(r["error"]["code"], r["error"]["retryable"]) for r in results] == [("too_long", False), ("interrupted", True)]


def test_a_request_id_that_could_break_a_log_is_replaced() -> None:
    response = send(app_of(), json=GOOD, headers={"x-request-id": "a b"})
    assert response.headers["x-request-id"] != "a b"
    assert response.json()["id"] == response.headers["x-request-id"]


def test_options_reach_the_items_and_the_call() -> None:
    backends = FakeBackends()
    body = {**GOOD, "trace": True, "normalise": "centred", "deadline_ms": 1500, "model": MODEL, "version": VERSION}
    reply = send(app_of(backends), json=body).json()
    assert reply["results"][0]["traces"][1] == {"tokens": ["a", "b"], "rewards": [0.0, 5.0]}
    (seen,) = backends.calls
    assert seen["items"][0].asked.normalise == "centred"  # type: ignore[index]
    assert 1.0 < seen["budget_s"] <= 1.5  # type: ignore[operator]
    assert seen["caller"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"version": "0123"}, 409, "version_not_served"),
        ({"model": "nobody"}, 404, "unknown_model"),
        ({"deadline_ms": 0}, 422, "wrong_type"),
        ({"deadline_ms": 10**9}, 422, "deadline_too_long"),
        ({"deadline_ms": 1.5}, 422, "wrong_type"),
        ({"trace": 1}, 422, "wrong_type"),
        ({"items": [{"prompt": "x" * 30_000, "completions": ["a"]}]}, 413, "text_too_long"),
        ({"items": [GOOD["items"][0]] * 1000}, 413, "too_many_items"),
        ({"items": []}, 422, "empty_items"),
        ({"itmes": []}, 422, "unknown_field"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], status: int, code: str) -> None:
    response = send(app_of(), json={**GOOD, **change})
    assert (response.status_code, error_of(response).code) == (status, code)
    assert error_of(response).retryable is False


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (OverloadedError("full", remedy="wait", retry_after_s=2.4), 429, "overloaded", "3"),
        (UnavailableError("none", remedy="wait"), 503, "unavailable", "1"),
        (DeadlineError("late", remedy="wait"), 504, "deadline_exceeded", None),
        (ServerError("broken", remedy="wait"), 502, "scorer_failed", None),
    ],
)
def test_what_may_be_repeated_says_so(failure: Exception, status: int, code: str, retry_after: str | None) -> None:
    response = send(app_of(FakeBackends(failure)), json=GOOD)
    assert (response.status_code, error_of(response).code, error_of(response).retryable) == (status, code, True)
    assert response.headers.get("retry-after") == retry_after


def test_a_surprise_is_a_502_without_the_text_of_anybody(caplog: pytest.LogCaptureFixture) -> None:
    body = {"items": [{"prompt": SECRET, "completions": ["a"]}]}
    response = send(app_of(FakeBackends(ValueError(SECRET))), json=body)
    assert response.status_code == 502
    assert error_of(response).retryable
    assert SECRET not in response.text
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text
    caplog.clear()
    send(app_of(FakeBackends(ValueError(SECRET)), CONFIG.model_copy(update={"log_texts": True})), json=body)
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    "results",
    [
        (),
        (ItemResult(rewards=(1.0,)),),
        (ItemResult(rewards=(1.0, float("nan"))),),
        (ItemResult(rewards=(1.0, 2.0), outputs=((1.0,), (float("inf"),))),),
    ],
    ids=["no result", "one reward for two completions", "NaN", "an infinite output"],
)
def test_a_wrong_answer_of_a_replica_never_becomes_a_reply(results: tuple[ItemResult, ...]) -> None:
    response = send(app_of(FakeBackends(results=results)), json=GOOD)
    assert (response.status_code, error_of(response).code) == (502, "scorer_failed")


def test_the_deadline_holds_where_the_backends_do_not_keep_it() -> None:
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        backends.release = asyncio.Event()
        return await client.post("/v1/score", json={**GOOD, "deadline_ms": 1})

    backends = FakeBackends()
    response = call(app_of(backends), work)
    assert (response.status_code, error_of(response).code) == (504, "deadline_exceeded")


def test_deadline_and_version_may_stand_in_headers() -> None:
    backends = FakeBackends()
    app = app_of(backends)
    assert send(app, json=GOOD, headers={"x-rayward-deadline-ms": "5000"}).status_code == 200
    assert backends.calls[0]["budget_s"] <= 5.0  # type: ignore[operator]
    assert send(app, json=GOOD, headers={"x-rayward-version": "other"}).status_code == 409
    for wrong in ("soon", "-1", "0", "1e3", "9" * 40):
        assert send(app, json=GOOD, headers={"x-rayward-deadline-ms": wrong}).status_code == 422


def test_best_of_n_ranks_and_keeps_the_others_when_one_fails() -> None:
    app = app_of()
    body = {"prompt": "Hi", "completions": ["ab", "error:too_long", "abcd", "xy"], "top_n": 2}
    reply = send(app, path="/v1/best_of_n", json=body).json()
    assert reply["best"] == 2
    assert reply["ranking"] == [{"index": 2, "reward": 4.0}, {"index": 0, "reward": 2.0}]
    assert [(f["index"], f["error"]["code"]) for f in reply["failed"]] == [(1, "too_long")]
    assert (reply["model"], reply["version"]) == (MODEL, VERSION)
    body = {"prompt": "Hi", "completions": ["error:too_long", "error:interrupted"]}
    response = send(app, path="/v1/best_of_n", json=body)
    assert (response.status_code, error_of(response).code) == (422, "too_long")


@pytest.mark.parametrize(
    "change",
    [
        {"top_n": 0},
        {"top_n": True},
        {"completions": []},
        {"completions": "ab"},
        {"prompt": None},
        {"items": []},
        {"extra": 1},
        {"trace": True},
        {"tools": 3},
    ],
)
def test_best_of_n_refuses_what_is_not_of_its_form(change: dict[str, Any]) -> None:
    response = send(app_of(), path="/v1/best_of_n", json={"prompt": "Hi", "completions": ["a"], **change})
    assert response.status_code == 422
    for body in ("[]", "3", "null", '"a"'):
        assert send(app_of(), path="/v1/best_of_n", content=body).status_code == 422


def test_health_never_waits_for_a_replica_and_answers_head() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        backends.release = asyncio.Event()
        waiting = asyncio.create_task(client.post("/v1/score", json=GOOD))
        while not backends.calls:
            await asyncio.sleep(0)
        for path in ("/livez", "/readyz", "/health", "/v1/models"):
            for method in ("GET", "HEAD"):
                response = await client.request(method, path)
                assert response.status_code == 200, path
        assert (await client.get("/health")).json() == {"status": "ok", "model": MODEL, "version": VERSION}
        assert (await client.get("/v1/models")).json()["data"][0]["max_tokens"] == 4096
        backends.release.set()
        assert (await waiting).status_code == 200

    backends = FakeBackends()
    call(app_of(backends), work)


def test_a_server_that_cannot_score_yet_lives_and_is_not_ready() -> None:
    app = app_of(FakeBackends(is_ready=False))
    assert send(app, "GET", "/livez").status_code == 200
    for path in ("/readyz", "/health"):
        response = send(app, "GET", path)
        assert (response.status_code, error_of(response).code) == (503, "unavailable")
        assert response.headers["retry-after"] == "1"
    assert send(app, "GET", "/v1/models").json() == {"object": "list", "data": []}


def test_a_path_that_is_not_there_is_told_from_serves_own_404() -> None:
    response = send(app_of(), "GET", "/v1/nothing")
    assert (response.status_code, error_of(response).code) == (404, "not_found")
    response = send(app_of(), "GET", "/v1/score")
    assert (response.status_code, error_of(response).code) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


# Bodies


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress), ("identity", bytes)]
)
def test_compressed_bodies_are_read(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    body = json.dumps(GOOD).encode()
    assert send(app_of(), content=pack(body), headers={"content-encoding": encoding}).status_code == 200


def test_two_gzip_members_are_one_body() -> None:
    body = json.dumps(GOOD).encode()
    content = gzip.compress(body[:10]) + gzip.compress(body[10:])
    assert send(app_of(), content=content, headers={"content-encoding": "gzip"}).status_code == 200


@pytest.mark.parametrize(
    ("encoding", "content", "status", "code"),
    [
        ("gzip", b"not gzip", 400, "invalid_encoding"),
        ("gzip", b"", 400, "invalid_encoding"),
        ("gzip", gzip.compress(json.dumps(GOOD).encode())[:-9], 400, "invalid_encoding"),
        ("gzip", gzip.compress(b" " * 100_000_000), 413, "body_too_large"),
        ("gzip", gzip.compress(b"") * 1000, 400, "invalid_encoding"),
        ("br", b"x", 415, "unsupported_encoding"),
        ("gzip, gzip", b"x", 415, "unsupported_encoding"),
    ],
    ids=["no gzip", "empty", "cut off", "bomb", "a thousand members", "brotli", "twice"],
)
def test_bad_compression_is_refused(encoding: str, content: bytes, status: int, code: str) -> None:
    response = send(app_of(), content=content, headers={"content-encoding": encoding})
    assert (response.status_code, error_of(response).code) == (status, code)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/problem+json", 200),
        ("Application/JSON", 200),
        ("application/json; charset=utf-16", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
    ],
)
def test_the_content_type_is_looked_at(content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = send(app_of(), content=json.dumps(GOOD), headers=headers)
    assert response.status_code == status
    if status == 415:
        assert "content-type: application/json" in error_of(response).remedy or "UTF-8" in error_of(response).remedy


def test_a_body_that_is_too_large_is_refused_by_its_length_and_while_it_comes() -> None:
    async def parts() -> Any:
        for _ in range(10):
            yield b" " * 50_000

    response = send(app_of(), content=b" " * 200_001)
    assert (response.status_code, error_of(response).code) == (413, "body_too_large")
    response = send(app_of(), content=parts())
    assert (response.status_code, error_of(response).code) == (413, "body_too_large")


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def never() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    response = send(app_of(config=CONFIG.model_copy(update={"body_timeout_s": 0.01})), content=never())
    assert (response.status_code, error_of(response).code, error_of(response).retryable) == (408, "body_timeout", True)


def test_nothing_is_held_after_any_outcome() -> None:
    recorder = Recorder("here", "ingress")
    app = app_of(keys=KEYS, recorder=recorder)
    good = {"authorization": f"Bearer {SCORE_KEY}"}
    send(app, json=GOOD, headers=good)
    send(app, content=b"{", headers=good)
    send(app, content=b" " * 200_001, headers=good)
    send(app, content=gzip.compress(b" " * 10**6), headers={**good, "content-encoding": "gzip"})
    send(app, json=GOOD)
    stats = recorder.stats()
    assert stats.gauges[("requests_in_flight", ())] == stats.gauges[("body_bytes_held", ())] == 0.0
    counters = stats.counters
    assert sum(value for (name, _), value in counters.items() if name == "requests_total") == 5
    refusals = {dict(labels)["reason"]: value for (name, labels), value in counters.items() if name == "refusals_total"}
    assert refusals == {"invalid_json": 1, "body_too_large": 2, "unauthorized": 1}


# Who asks


def test_a_key_is_asked_for_where_there_are_keys() -> None:
    app = app_of(keys=KEYS)
    for headers in ({}, {"authorization": "Bearer wrong-0123456789abcdef"}, {"authorization": SCORE_KEY}, {"authorization": "Basic x"}):
        response = send(app, json=GOOD, headers=headers)
        assert (response.status_code, error_of(response).code) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert send(app, json=GOOD, headers={"authorization": f"bearer {SCORE_KEY}"}).status_code == 200
    response = send(app, json=GOOD, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert (response.status_code, error_of(response).code) == (403, "forbidden")
    for path, status in (("/livez", 200), ("/readyz", 200), ("/health", 200), ("/openapi.json", 200), ("/v1/models", 401)):
        assert send(app, "GET", path).status_code == status, path


def test_the_name_of_the_key_is_who_waits_in_the_queue() -> None:
    backends = FakeBackends()
    send(app_of(backends, keys=KEYS), json=GOOD, headers={"authorization": f"Bearer {SCORE_KEY}"})
    assert backends.calls[0]["caller"] == "ppo"


def test_without_keys_only_this_machine_may_score_unless_told() -> None:
    assert send(app_of(), json=GOOD, address="10.0.0.7").status_code == 401
    assert send(app_of(), json=GOOD, address="::1").status_code == 200
    told = CONFIG.model_copy(update={"allow_anonymous": True})
    assert send(app_of(config=told), json=GOOD, address="10.0.0.7").status_code == 200


def test_no_key_stands_in_log_or_reply(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    app = app_of(FakeBackends(ValueError("x")), keys=KEYS)
    text = send(app, json=GOOD, headers={"authorization": f"Bearer {SCORE_KEY}"}).text
    text += send(app, json=GOOD, headers={"authorization": "Bearer guessed-0123456789abcdef"}).text
    assert "0123456789abcdef" not in text + caplog.text


# What is mounted


def test_endpoints_get_what_was_sent_and_their_scope_is_kept() -> None:
    seen: list[Incoming] = []

    async def promote(incoming: Incoming) -> Any:
        seen.append(incoming)
        return {"promoted": incoming.path["name"]}

    endpoints = (
        Endpoint("POST", "/admin/models/{name}/promote", "Promote", promote, scope="admin"),
        Endpoint("GET", "/admin/models/{name}/promote", "Look", lambda _: {"seen": len(seen)}, scope="admin"),
        Endpoint("GET", "/", "Page", lambda _: Body(b"<p>", media_type="text/html"), scope=None),
    )
    app = app_of(keys=KEYS, endpoints=endpoints)
    path = "/admin/models/rm/promote"
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert send(app, path=path, json={"version": "1"}).status_code == 401
    assert send(app, path=path, json={"version": "1"}, headers={"authorization": f"Bearer {SCORE_KEY}"}).status_code == 403
    assert not seen
    assert send(app, path=f"{path}?dry=1", json={"version": "1"}, headers=admin).json() == {"promoted": "rm"}
    assert (seen[0].json(), dict(seen[0].query), seen[0].caller) == ({"version": "1"}, {"dry": "1"}, "ops")
    assert send(app, "GET", path, headers=admin).json() == {"seen": 1}
    page = send(app, "GET", "/")
    assert (page.text, page.headers["content-type"]) == ("<p>", "text/html; charset=utf-8")
    # Without any key, nobody may publish.
    assert send(app_of(endpoints=endpoints), path=path, json={}).status_code == 403


def test_two_things_at_one_path_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two things are mounted at POST /v1/score"):
        build_http(Front(FakeBackends(), routes=(SCORE, SCORE)), CONFIG, Keys())


def test_a_dialect_has_its_own_errors_and_statuses() -> None:
    def error(status: int, exc: Exception, code: str) -> Any:
        return {"error": code, "was": status}

    route = replace(SCORE, path="/flat", dialect="flat", error=error, statuses={422: 400})
    app = build_http(Front(FakeBackends(), routes=(route,)), CONFIG, Keys())
    response = send(app, path="/flat", json={"items": []})
    assert (response.status_code, response.json()) == (400, {"error": "empty_items", "was": 422})


def test_work_in_the_background_runs_as_long_as_the_application() -> None:
    events: list[str] = []

    async def background() -> None:
        events.append("started")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("stopped")

    app = app_of(background=(background,))

    async def run() -> None:
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0)
            assert events == ["started"]

    asyncio.run(run())
    assert events == ["started", "stopped"]


def test_work_ends_when_the_client_has_gone() -> None:
    backends = FakeBackends()

    async def run() -> list[Any]:
        backends.release = asyncio.Event()
        recorder = Recorder("here", "ingress")
        app = app_of(backends, recorder=recorder)
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/score",
            "raw_path": b"/v1/score",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
        }

        async def keep(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(app(scope, messages.get, keep))
        await messages.put({"type": "http.request", "body": json.dumps(GOOD).encode(), "more_body": False})
        while not backends.calls:
            await asyncio.sleep(0)
        await messages.put({"type": "http.disconnect"})
        await task
        assert recorder.stats().gauges[("requests_in_flight", ())] == 0
        return sent

    sent = asyncio.run(run())
    assert backends.num_cancelled == 1
    assert sent[0]["status"] == 499


# The document


def test_the_document_names_every_path_and_resolves() -> None:
    endpoint = Endpoint("POST", "/admin/models/{name}/promote", "Promote", lambda _: {}, scope="admin", request={"type": "object"})
    app = app_of(endpoints=(endpoint,))
    document = send(app, "GET", "/openapi.json").json()
    assert set(document["paths"]) == {route.path for route in app.routes} - {"/openapi.json"}
    text = json.dumps(document)
    assert "#/$defs/" not in text
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert document["paths"]["/admin/models/{name}/promote"]["post"]["security"] == [{"bearer": []}]
