"""Dialects through the application: methods, headers, statuses and error shapes as their clients meet them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.helpers.backends import MODEL, VERSION, FakeBackends, result_of

from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import TakenAs
from rayward.errors import DeadlineError, OverloadedError, ServerError
from rayward.serving.auth import Keys
from rayward.serving.engine.work import count_chars
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.mounts import all_routes
from rayward.serving.poison import content_hash
from rayward.wire.items import ScoreItem

CLASSIFY = {"input": ["abc"]}
SENTENCES = {"name": "sentences", "datatype": "BYTES", "shape": [1], "data": ["a"]}


def send(path: str, body: Any = None, method: str = "POST", backends: FakeBackends | None = None, **given: Any) -> httpx.Response:
    """The reply of a server of all dialects."""
    config = ScoringConfig(**given.pop("config", {}))
    app = build_http(Front(backends or FakeBackends(), routes=all_routes()), config, Keys(()))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            headers = {"content-type": "application/json", **given.pop("headers", {})}
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(run())


def taken(how: TakenAs) -> FakeBackends:
    """Backends that take the text of a request in a certain way."""
    return FakeBackends(results=(replace(result_of(ScoreItem((), ("abc",))), taken_as=how),))


def test_every_reply_says_who_scored_and_how_the_text_was_taken() -> None:
    reply = send("/classify", CLASSIFY, backends=taken("as_given"))
    assert reply.status_code == 200
    assert (reply.headers["x-rayward-model"], reply.headers["x-rayward-version"]) == (MODEL, VERSION)
    assert reply.headers["x-rayward-text"] == "as_given"
    assert reply.json()["data"][0] == {"index": 0, "label": "reward", "probs": [3.0], "num_classes": 1}


@pytest.mark.parametrize("how", ["as_given", "rendered"])
def test_plain_texts_may_be_refused(how: TakenAs) -> None:
    reply = send("/get_reward", {"query": ["abc"]}, backends=taken(how), config={"flat_text": "refuse"})
    assert reply.status_code == (422 if how == "as_given" else 200)
    if how == "as_given":
        assert "[not_templated]" in reply.json()["detail"]
    assert send("/get_reward", {"query": ["abc"]}, backends=taken(how)).status_code == 200


def test_the_body_decides_whose_error_it_is() -> None:
    refused = {name: send("/rerank", body) for name, body in (("tei", {"query": "q", "texts": []}), ("vllm", {"query": "q"}))}
    assert refused["tei"].status_code == 422
    assert refused["tei"].json()["error_type"] == "empty"
    assert refused["vllm"].status_code == refused["vllm"].json()["error"]["code"] == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/classify", CLASSIFY, 503, '"type":"ServiceUnavailableError","param":null,"code":503'),
        ("/v1/embeddings", CLASSIFY, 503, '"code":503'),
        ("/tei/predict", {"inputs": "a"}, 429, "overloaded"),
        ("/get_reward", {"query": ["a"]}, 429, "[overloaded]"),
        (
            "/v2/models/reward_model/infer",
            {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [1], "data": ["a"]}]},
            429,
            "full",
        ),
    ],
)
def test_overload_is_said_in_each_shape_with_the_time_to_wait(path: str, body: Any, status: int, kind: str) -> None:
    backends = FakeBackends(failure=OverloadedError("full", remedy="wait", retry_after_s=7.0))
    reply = send(path, body, backends=backends)
    assert reply.status_code == status
    assert int(reply.headers["retry-after"]) >= 7
    assert kind in reply.text


def test_what_fails_in_the_server_is_never_a_reward() -> None:
    for failure, status in ((ServerError("died", remedy="retry"), 424), (DeadlineError("late", remedy="retry"), 504)):
        reply = send("/tei/predict", {"inputs": "a"}, backends=FakeBackends(failure=failure))
        assert (reply.status_code, set(reply.json())) == (status, {"error", "error_type"})


def test_put_is_sglangs() -> None:
    reply = send("/classify", {"text": "abc"}, method="PUT")
    assert reply.json()["embedding"] == [3.0]
    assert reply.json()["meta_info"]["weight_version"] == VERSION


def test_probes_say_whether_the_server_can_score_in_tritons_shape() -> None:
    assert send("/v2/health/ready", method="GET").json() == {}
    assert send("/v2/health/live", method="GET", backends=FakeBackends(is_ready=False)).status_code == 200
    unready = send("/v2/models/reward_model/ready", method="GET", backends=FakeBackends(is_ready=False))
    assert (unready.status_code, set(unready.json())) == (503, {"error"})


def test_binary_tensors_come_and_go() -> None:
    header = {
        "inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 7}}],
        "parameters": {"binary_data_output": True},
    }
    content = json.dumps(header).encode() + b"\x03\x00\x00\x00abc"
    reply = send("/v2/models/reward_model/infer", content, headers={"content-type": "application/octet-stream"})
    assert reply.status_code == 200
    length = int(reply.headers["inference-header-content-length"])
    assert json.loads(reply.content[:length])["outputs"][0]["shape"] == [1, 1]
    assert len(reply.content) == length + 4


def test_a_version_is_pinned_in_any_dialect() -> None:
    assert send("/classify", CLASSIFY, headers={"x-rayward-version": VERSION}).status_code == 200
    refused = send("/classify", CLASSIFY, headers={"x-rayward-version": "another"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "ConflictError")


def test_an_unknown_model_is_refused_and_a_path_of_another_system_is_the_default_one() -> None:
    assert send("/classify", {**CLASSIFY, "model": "typo"}).status_code == 404
    assert send("/classify", {**CLASSIFY, "model": "/data/models/rm"}).json()["model"] == MODEL


def test_pairs_of_vllm_stand_at_the_native_path_too() -> None:
    assert [row["score"] for row in send("/v1/score", {"queries": "q", "documents": ["a", "bc"]}).json()["data"]] == [1.0, 2.0]
    assert send("/v1/score", {"items": [{"prompt": "q", "completions": ["a", "bc"]}]}).json()["results"][0]["rewards"] == [1.0, 2.0]


def test_items_that_differ_in_ids_or_prompts_are_different_suspects() -> None:
    ids = [ScoreItem((), ("",), form="tokens", token_ids=each) for each in ((1, 2), (1, 3))]
    texts = [ScoreItem((), ("ab",), form="text", prompt_text=each) for each in (None, "a")]
    assert len({content_hash(item) for item in (*ids, *texts)}) == 4
    assert content_hash(ids[0]) == content_hash(replace(ids[0]))
    assert count_chars(ids[0]) < count_chars(replace(ids[0], token_ids=tuple(range(1000))))
