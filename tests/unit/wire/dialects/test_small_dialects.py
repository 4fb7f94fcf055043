"""LLaMA-Factory, slime and chat completions: requests as their clients send them, replies as they read them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.helpers.dialects import Scored, answered, as_reply, parsed, post, refusal, route_of

from rayward.errors import OverloadedError

TEXT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_llamafactorys_trainer_reads_scores() -> None:
    # It never looks at the status: an error must have no `scores`.
    payload = {"model": "model", "messages": [TEXT, "b"]}
    reply = post("/v1/score/evaluation", payload, 1.0, -2.0)
    assert reply["scores"] == [1.0, -2.0]
    assert (reply["object"], reply["model"], reply["id"]) == ("score.evaluation", "our-model", "scoreval-r1")
    assert parsed("/v1/score/evaluation", payload).model is None
    assert parsed("/v1/score/evaluation", {**payload, "model": "other"}).model == "other"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"model": "model", "messages": []}, "messages is empty"),
        ({"messages": ["a"]}, "model"),
        ({"model": "model", "messages": ["a"], "max_length": 512}, "max_length: texts are never cut"),
        ({"model": "model", "messages": MESSAGES}, "messages"),
    ],
)
def test_llamafactory_refuses_with_400_and_a_detail(body: dict[str, Any], named: str) -> None:
    status, error = refusal("/v1/score/evaluation", body)
    assert status == 400
    assert named in error["detail"]
    assert error.keys() == {"detail"}


def test_slime_gets_the_reward_alone() -> None:
    prompt, response = TEXT[:40], TEXT[40:]
    payload = {"prompt": prompt, "response": response, "label": None}
    assert json.dumps(post("/slime", payload, 1.5)) == "1.5"
    (item,) = parsed("/slime", payload).items
    assert (item.form, item.completions, item.prompt_text) == ("text", (prompt + response,), prompt)


def test_slime_with_a_prompt_of_turns() -> None:
    (item,) = parsed("/slime", {"prompt": MESSAGES[:1], "response": "Hello", "label": "x"}).items
    assert (item.form, item.completions) == ("conversation", ("Hello",))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "response": " "},
        {"prompt": 3, "response": "a"},
        {"prompt": [], "response": "a"},
        {"prompt": ["a"], "response": "a"},
        {"response": "a"},
        {"prompt": "a", "response": "b", "metadata": {}},
    ],
)
def test_slime_refuses_with_a_detail(body: dict[str, Any]) -> None:
    status, error = refusal("/slime", body)
    assert (status, list(error)) == (422, ["detail"])


def test_ms_swift_reads_the_number_as_text() -> None:
    reply = post("/v1/chat/completions", {"model": "our-model", "messages": MESSAGES}, -1.2345678806304932)
    assert (reply["object"], reply["id"]) == ("chat.completion", "chatcmpl-r1")
    choice = reply["choices"][0]
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "stop")
    assert float(choice["message"]["content"]) == -1.2345678806304932, "no digit is lost"


def test_nemotron_clients_read_attributes() -> None:
    reply = post("/v1/chat/completions", {"messages": MESSAGES}, 9.0, outputs=("helpfulness", "correctness"), values=[[0.35, -1.5]])
    choice = reply["choices"][0]
    assert dict(part.split(":") for part in choice["message"]["content"].split(",")) == {"helpfulness": "0.35", "correctness": "-1.5"}
    assert {entry["token"]: entry["logprob"] for entry in choice["logprobs"]["content"]} == {"helpfulness": 0.35, "correctness": -1.5}
    assert choice["reward"] == 9.0


def test_chat_gives_tools_to_the_template_and_ignores_sampling() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    request = {"messages": MESSAGES, "tools": tools, "temperature": 0.7, "max_tokens": 1, "top_logprobs": 5, "stream": False, "n": 1}
    (item,) = parsed("/v1/chat/completions", request).items
    assert item.tools == tuple(tools)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n: Input should be 1"),
        ({"images": ["x"]}, "images"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"messages": MESSAGES[:1]}, "the last one of an assistant"),
    ],
)
def test_chat_errors_are_read_by_openais_and_ms_swifts_clients(options: dict[str, Any], named: str) -> None:
    status, error = refusal("/v1/chat/completions", {"messages": MESSAGES, **options})
    assert status == 400
    assert error["object"] == "error"
    assert named in error["message"]
    assert error["error"]["message"] == error["message"]


def test_overload_on_a_shared_shape() -> None:
    status, error = as_reply(route_of("/v1/chat/completions"), OverloadedError("full", remedy="wait"), 429, "overloaded")
    assert (status, error["error"]["type"]) == (429, "RateLimitError")


def test_header_counts_where_texts_were_taken_differently() -> None:
    body = {"model": "model", "messages": ["a", "b", "c"]}
    call = parsed("/v1/score/evaluation", body)
    results = Scored([1.0, 2.0, 3.0]).of(call).results
    one = Scored([1.0, 2.0, 3.0], taken_as="as_given").of(call).results[0]
    mixed = replace(Scored([1.0, 2.0, 3.0]).of(call), results=(one, *results[1:]))
    assert call.render(mixed).headers["x-rayward-text"] == "as_given=1, rendered=2"
    assert answered("/v1/score/evaluation", body, Scored([1.0, 2.0, 3.0])).headers["x-rayward-text"] == "rendered"
