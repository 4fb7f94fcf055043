"""Every path once, whose body is whose where paths are shared, and what holds for all dialects."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.dialects import LIMITS, Scored, route_of

from rayward.errors import OverloadedError, RuleError
from rayward.wire.dialect import Route
from rayward.wire.dialects import chat, infinity, llamafactory, nemo_gym, openrlhf, sglang, slime, tei, triton, vllm
from rayward.wire.dialects.reading import Form
from rayward.wire.dialects.replies import openai_error
from rayward.wire.dialects.table import ROUTES, with_pairs

MODULES = (chat, infinity, llamafactory, nemo_gym, openrlhf, sglang, slime, tei, triton, vllm)
DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "dialects.md"
SHARED_BODIES = [
    ("/classify", {"input": "a"}, "vllm"),
    ("/classify", {"messages": []}, "vllm"),
    ("/classify", {"text": "a"}, "sglang"),
    ("/classify", {"input_ids": [1]}, "sglang"),
    ("/classify", {"input": ["a"], "model": "default/not-specified", "raw_scores": False}, "infinity"),
    ("/rerank", {"query": "q", "documents": ["a"], "model": "m"}, "vllm"),
    ("/rerank", {"query": "q", "texts": ["a"]}, "tei"),
    ("/rerank", {"query": "q", "documents": ["a"], "return_documents": False, "raw_scores": False}, "infinity"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "m"}, "vllm"),
    ("/v1/rerank", {"query": "q", "documents": ["a"]}, "sglang"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "m", "return_documents": True}, "sglang"),
]


@pytest.mark.parametrize(("path", "body", "dialect"), SHARED_BODIES)
def test_a_body_says_whose_it_is(path: str, body: dict[str, Any], dialect: str) -> None:
    found = route_of(path, json.dumps(body).encode())
    assert (found.dialect, found.pick) == (dialect, None)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"text"', b"\xff"])
@pytest.mark.parametrize("path", ["/classify", "/rerank", "/v1/rerank"])
def test_what_is_no_body_is_vllms_to_refuse(path: str, body: bytes) -> None:
    found = route_of(path, body)
    assert found.dialect in ("vllm", "sglang")
    with pytest.raises(RuleError, match="JSON"):
        found.parse(body, LIMITS)


def test_every_path_and_method_stands_once() -> None:
    counts = Counter((route.path, method) for route in ROUTES for method in route.methods)
    assert {each for each, count in counts.items() if count > 1} == set()
    asked = {
        "/get_reward", "/classify", "/pooling", "/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v1/classify", "/v1/embeddings",
        "/predict", "/v1/score/evaluation", "/v1/chat/completions", "/slime", "/verify", "/compare", "/v2/models/reward_model/infer",
    }  # fmt: skip
    assert asked <= {route.path for route in ROUTES}
    assert "/v1/score" not in {route.path for route in ROUTES}, "it is the native route's"


def native() -> Route:
    """A stand-in for the native route."""
    return Route("/v1/score", "native", "", lambda *_: pytest.fail("not asked"), openai_error, {"a": 1}, {"b": 1})


@pytest.mark.parametrize(
    ("body", "dialect"),
    [
        ({"items": [{"prompt": "a", "completions": ["b"]}]}, "native"),
        ({"queries": "a", "items": ["b"]}, "vllm"),
        ({"text_1": "a", "text_2": ["b"], "model": "m"}, "vllm"),
        ({"data_1": "a", "data_2": "b"}, "vllm"),
        ({"items": [{"prompt": "text_1", "completions": ['"text_1": 3']}]}, "native"),
        ({"items": [{"prompt": "queries", "completions": ["documents"], "chat_template_kwargs": {"documents": []}}]}, "native"),
    ],
)
def test_native_path_takes_vllms_pairs(body: dict[str, Any], dialect: str) -> None:
    route = with_pairs(native())
    assert route.pick is not None
    assert route.pick(json.dumps(body).encode()).dialect == dialect
    assert route.pick(b'{"text_1": ').dialect == "native"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.methods[0]} {route.path}")
def test_errors_are_json_without_rewards(route: Route) -> None:
    body = json.dumps(route.error(429, OverloadedError("full", remedy="wait"), "overloaded"))
    assert "full; wait" in body
    assert not any(f'"{name}"' in body for name in ("score", "scores", "reward", "rewards", "probs", "embedding"))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.methods[0]} {route.path}")
def test_schemas_are_json(route: Route) -> None:
    assert json.loads(json.dumps([route.request, route.reply]))
    assert route.summary
    assert all(400 <= status < 600 for status in route.statuses.values())


def forms() -> list[tuple[str, Form[Any]]]:
    """Every form of every dialect."""
    return [(module.__name__.rsplit(".", 1)[1], value) for module in MODULES for value in vars(module).values() if isinstance(value, Form)]


def test_document_names_every_path_field_and_option() -> None:
    text = DOCUMENT.read_text()
    paths = {route.path for module in MODULES for route in module.ROUTES}
    assert {path for path in paths if f"`{path}`" not in text} == set()
    names = {name for _, form in forms() for name in (*form.fields.model_fields, *form.without_effect, *form.refused, *form.removed)}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_a_field_is_never_both_used_and_ignored() -> None:
    for dialect, form in forms():
        used = set(form.fields.model_fields)
        assert not used & (form.without_effect | form.refused.keys() | form.removed.keys()), dialect
        assert not form.without_effect & (form.refused.keys() | form.removed.keys()), dialect


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, 10**30, "", " ", "a", "a\x00", "\ud800", [], [""], ["a"], ["a", "b"], [1, 2], [[1], [2]],
    [["a", "b"]], [None], [{}], {}, {"a": 1}, {"role": "user"}, [{"role": "user", "content": "Hi"}], {"output": "a"}, "x" * 1001,
    ["a"] * 51,
    [{"name": "sentences", "datatype": "BYTES", "shape": [1], "data": ["a"]}], [{"name": "rewards", "parameters": {"binary_data": 3}}],
    {"input": [{"type": "reasoning"}, 3], "output": [{"type": "message", "role": "assistant", "content": None}]},
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIR = {"query": "q", "documents": ["a", "b"]}
GOOD: dict[str, list[dict[str, Any]]] = {
    "/get_reward": [{"query": ["a", "b"], "prompts": ["a", "b"]}],
    "/v1/score/evaluation": [{"model": "model", "messages": ["a"]}],
    "/slime": [{"prompt": "a", "response": "b"}],
    "/v1/chat/completions": [{"messages": MESSAGES}],
    "/verify": [{"responses_create_params": {"input": "a"}, "response": {"output": [{"role": "assistant", "content": "b"}]}}],
    "/compare": [{"conversation_history": MESSAGES[:1], "response_objs": [{"output": MESSAGES[1:]}]}],
    "/v2/models/reward_model/infer": [{"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}]}],
    "/pooling": [{"input": "a"}, {"messages": MESSAGES}],
    "/score": [{"text_1": "a", "text_2": ["b", "c"]}],
    "/v1/score": [{"queries": "a", "items": ["b", "c"]}],
    "/classify": [{"input": "a"}, {"messages": MESSAGES}, {"text": "a"}, {"input": ["a"], "raw_scores": True}],
    "/rerank": [PAIR, {"query": "q", "texts": ["a", "b"]}, {**PAIR, "raw_scores": False}],
    "/v1/rerank": [PAIR, {**PAIR, "model": "m"}],
    "/v2/rerank": [PAIR],
    "/v1/classify": [{"input": ["a"]}],
    "/v1/embeddings": [{"input": ["a"], "encoding_format": "base64"}],
    "/predict": [{"inputs": [["a"], ["a", "b"]]}],
}


@pytest.mark.parametrize("route", [route for route in ROUTES if route.asks == "scores"], ids=lambda route: route.path)
def test_whatever_a_body_holds_it_is_asked_or_refused(route: Route) -> None:
    known = GOOD[route.path.removeprefix(f"/{route.dialect}") if route.path not in GOOD else route.path]
    names = sorted({name for each in route.request.get("anyOf", [route.request]) for name in each["properties"]})
    chance, counts = random.Random(route.path), Counter[str]()
    for _ in range(150):
        changed = {name: chance.choice(VALUES) for name in chance.sample(names, min(len(names), chance.randint(0, 3)))}
        outcome = tried(route, json.dumps({**chance.choice(known), **changed}).encode())
        counts[outcome] += 1
    assert set(counts) == {"asked", "refused"}, counts


def tried(route: Route, body: bytes) -> str:
    """Whether a body was asked, with its reply, or refused, with its error."""
    picked = route.pick(body) if route.pick else route
    try:
        call = picked.parse(body, LIMITS)
    except RuleError as error:
        json.dumps(picked.error(error.status, error, error.code))
        return "refused"
    rewards = [float(k) for item in call.items for k in range(len(item.completions))]
    content = call.render(Scored(rewards).of(call)).content
    return "asked" if rewards and (isinstance(content, bytes) or json.dumps(content, allow_nan=False)) else "empty"
