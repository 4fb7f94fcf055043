from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from rayward.contract.conversation import TemplateInputs
from rayward.errors import RequestError, RuleError
from rayward.wire.items import Asked, ItemError, ItemResult
from rayward.wire.native import ScoreReply, ScoreRequest, build_reply, error_reply
from rayward.wire.rules import Limits, parse_request

LIMITS = Limits(max_items=100, max_completions_per_item=4, max_chars_per_text=1000, max_body_bytes=1_000_000)
FLOOD = {f"k{number}": 1 for number in range(65)}
GOOD = {"prompt": "Hi", "completions": ["Hello"]}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "c1"}


def call(arguments: Any) -> dict[str, Any]:
    """An assistant's turn that calls a function, in OpenAI's form."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def items(bad: Any, *, position: int = 1) -> bytes:
    """A body whose item 1 is the bad one."""
    listed = [GOOD, GOOD]
    listed[position] = bad
    return json.dumps({"items": listed}).encode()


def prompt(value: Any) -> bytes:
    return items({"prompt": value, "completions": ["Hello"]})


def completions(value: Any) -> bytes:
    return items({"prompt": "Hi", "completions": value})


BAD_REQUESTS: list[tuple[str, bytes, str, int, int | None]] = [
    ("empty body", b"", "invalid_json", 400, None),
    ("not JSON", b"{", "invalid_json", 400, None),
    ("not UTF-8", b'{"items": [{"prompt": "\xff"}]}', "invalid_json", 400, None),
    ("UTF-16", '{"items": []}'.encode("utf-16"), "invalid_json", 400, None),
    ("NaN literal", b'{"items": NaN}', "invalid_json", 400, None),
    ("Infinity literal", b'{"items": -Infinity}', "invalid_json", 400, None),
    ("raw control character", b'{"items": [{"prompt": "a\x00b"}]}', "invalid_json", 400, None),
    ("deep nesting", b'{"items": ' + b"[" * 90_000, "invalid_json", 400, None),
    ("huge integer", b'{"items": ' + b"1" * 10_000 + b"}", "invalid_json", 400, None),
    ("body over the limit", b" " * 1_000_001, "body_too_large", 413, None),
    ("a list", b"[]", "wrong_type", 422, None),
    ("null", b"null", "wrong_type", 422, None),
    ("a string", b'"items"', "wrong_type", 422, None),
    ("no items", b"{}", "missing_field", 422, None),
    ("items is a mapping", b'{"items": {}}', "wrong_type", 422, None),
    ("items is null", b'{"items": null}', "wrong_type", 422, None),
    ("items is empty", b'{"items": []}', "empty_items", 422, None),
    ("10,000 items", json.dumps({"items": [GOOD] * 10_000}).encode(), "too_many_items", 413, None),
    ("10,000 wrong items", json.dumps({"items": [0] * 10_000}).encode(), "too_many_items", 413, None),
    ("unknown key", json.dumps({"items": [GOOD], "temperatur": 1}).encode(), "unknown_field", 422, None),
    ("no critique", json.dumps({"items": [GOOD], "n_critiques": 0}).encode(), "wrong_type", 422, None),
    ("temperature of 3", json.dumps({"items": [GOOD], "temperature": 3}).encode(), "wrong_type", 422, None),
    ("17 critiques", json.dumps({"items": [GOOD], "n_critiques": 17, "temperature": 1}).encode(), "too_many_critiques", 422, None),
    ("the same critique twice", json.dumps({"items": [GOOD], "n_critiques": 2}).encode(), "same_critiques", 422, None),
    ("model is a number", json.dumps({"items": [GOOD], "model": 3}).encode(), "wrong_type", 422, None),
    ("NUL in model", json.dumps({"items": [GOOD], "model": "a\x00"}).encode(), "nul_byte", 422, None),
    ("surrogate key", json.dumps({"items": [GOOD], "\ud800": 1}).encode(), "lone_surrogate", 422, None),
    ("item is null", items(None), "wrong_type", 422, 1),
    ("item is a list", items([]), "wrong_type", 422, 1),
    ("item with unknown key", items({**GOOD, "weight": 1}), "unknown_field", 422, 1),
    ("item with a flood of keys", items({**GOOD, **FLOOD}), "unknown_field", 422, None),
    ("turn with a flood of keys", prompt([{**USER, **FLOOD}]), "unknown_field", 422, None),
    ("request with a flood of keys", json.dumps({"items": [GOOD], **FLOOD}).encode(), "unknown_field", 422, None),
    ("item without prompt", items({"completions": ["a"]}), "missing_field", 422, 1),
    ("item without completions", items({"prompt": "a"}), "missing_field", 422, 1),
    ("prompt is a number", prompt(7), "wrong_type", 422, 1),
    ("prompt is null", prompt(None), "wrong_type", 422, 1),
    ("prompt is a mapping", prompt(USER), "wrong_type", 422, 1),
    ("prompt is empty", prompt(""), "empty_prompt", 422, 1),
    ("prompt is white space", prompt(" \n\t"), "empty_prompt", 422, 1),
    ("prompt without turns", prompt([]), "empty_prompt", 422, 1),
    ("prompt of a system turn", prompt([{"role": "system", "content": "Be brief"}]), "empty_prompt", 422, 1),
    ("prompt ends with an assistant turn", prompt([USER, ASSISTANT]), "prompt_end", 422, 1),
    ("prompt ends with a system turn", prompt([USER, {"role": "system", "content": "x"}]), "prompt_end", 422, 1),
    ("prompt with unknown role", prompt([{"role": "human", "content": "Hi"}]), "unknown_role", 422, 1),
    ("turn without content", prompt([{"role": "user"}]), "missing_field", 422, 1),
    ("turn without content but null", prompt([{"role": "user", "content": None}]), "wrong_type", 422, 1),
    ("turn with unknown key", prompt([{**USER, "image": "x"}]), "unknown_field", 422, 1),
    ("turn with a name that is none", prompt([{**USER, "name": 7}]), "wrong_type", 422, 1),
    ("turn content is a number", prompt([{"role": "user", "content": 7}]), "wrong_type", 422, 1),
    ("an image", prompt([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]), "unsupported_message", 422, 1),
    ("a sound", prompt([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]), "unsupported_message", 422, 1),
    ("a sound beside the text", prompt([{**USER, "audio": {"id": "a"}}]), "unsupported_message", 422, 1),
    ("a refusal", completions([[{**ASSISTANT, "refusal": "No."}]]), "unsupported_message", 422, 1),
    ("a text part that is a number", prompt([{"role": "user", "content": [{"type": "text", "text": 7}]}]), "wrong_type", 422, 1),
    ("two thoughts that differ", completions([[{**ASSISTANT, "reasoning": "a", "thinking": "b"}]]), "unsupported_message", 422, 1),
    ("calls are a mapping", completions([[{**ASSISTANT, "tool_calls": {}}, ASSISTANT]]), "completion_turns", 422, 1),
    ("a call is a text", completions([[{**ASSISTANT, "tool_calls": ["f"]}]]), "wrong_type", 422, 1),
    ("a call without a function", completions([[{**ASSISTANT, "tool_calls": [{"id": "1"}]}]]), "wrong_type", 422, 1),
    ("a prefix before the end", prompt([{**ASSISTANT, "prefix": True}, USER]), "prompt_end", 422, 1),
    ("a prefix in a completion", completions([[{**ASSISTANT, "prefix": True}]]), "completion_turns", 422, 1),
    ("a prefix that is a text", prompt([USER, {**ASSISTANT, "prefix": "yes"}]), "wrong_type", 422, 1),
    ("a completion that ends with a result", completions([[ASSISTANT, {"role": "tool", "content": "4"}]]), "completion_turns", 422, 1),
    ("tools are a mapping", items({**GOOD, "tools": {}}), "wrong_type", 422, 1),
    ("a tool is a text", items({**GOOD, "tools": ["f"]}), "wrong_type", 422, 1),
    ("variables are a list", items({**GOOD, "chat_template_kwargs": []}), "wrong_type", 422, 1),
    ("images beside the texts", items({**GOOD, "images": ["x"]}), "unknown_field", 422, 1),
    ("NUL in a tool", items({**GOOD, "tools": [{"name": "a", "description": {"deep": ["\x00"]}}]}), "nul_byte", 422, 1),
    ("surrogate in a variable's name", items({**GOOD, "chat_template_kwargs": {"\ud800": 1}}), "lone_surrogate", 422, 1),
    ("NUL in arguments that are JSON in a text", completions([[call('{"a": "\\u0000"}')]]), "nul_byte", 422, 1),
    ("surrogate in arguments that are JSON in a text", completions([[call('{"\\ud83d": 1}')]]), "lone_surrogate", 422, 1),
    ("long arguments", completions([[call({"a": ["x" * 600, "y" * 500]})]]), "text_too_long", 413, 1),
    (
        "long thoughts and text",
        completions([[{**ASSISTANT, "content": "x" * 600, "reasoning_content": "y" * 500}]]),
        "text_too_long",
        413,
        1,
    ),
    ("a long text in parts", prompt([{"role": "user", "content": [{"type": "text", "text": "x" * 600}] * 2}]), "text_too_long", 413, 1),
    (
        "long turns of a completion",
        completions([[call({"a": "x" * 600}), RESULT, {**ASSISTANT, "content": "y" * 500}]]),
        "text_too_long",
        413,
        1,
    ),
    ("long tools", items({**GOOD, "tools": [{"name": "x" * 600}, {"name": "y" * 500}]}), "text_too_long", 413, 1),
    ("long names of variables", items({**GOOD, "chat_template_kwargs": {"x" * 1001: 1}}), "text_too_long", 413, 1),
    ("deep arguments", completions([[call(nested(70))]]), "wrong_type", 422, 1),
    ("deep arguments in a text", completions([[call(json.dumps(nested(70)))]]), "wrong_type", 422, 1),
    ("deep tools", items({**GOOD, "tools": [nested(70)]}), "wrong_type", 422, 1),
    ("turn is a string", prompt(["Hi"]), "wrong_type", 422, 1),
    ("completions is a string", completions("Hello"), "wrong_type", 422, 1),
    ("completions is null", completions(None), "wrong_type", 422, 1),
    ("completions is empty", completions([]), "empty_completions", 422, 1),
    ("too many completions", completions(["a", "b", "c", "d", "e"]), "too_many_completions", 413, 1),
    ("completion is a number", completions(["a", 1.5]), "wrong_type", 422, 1),
    ("completion is empty", completions(["a", ""]), "empty_completion", 422, 1),
    ("completion is white space", completions(["\u00a0 "]), "empty_completion", 422, 1),
    ("completion without turns", completions([[]]), "completion_turns", 422, 1),
    ("completion of a user turn", completions([[USER]]), "completion_turns", 422, 1),
    ("completion of two turns", completions([[ASSISTANT, ASSISTANT]]), "completion_turns", 422, 1),
    ("completion with unknown role", completions([[{"role": "bot", "content": "x"}]]), "unknown_role", 422, 1),
    ("completion turn is empty", completions([[{"role": "assistant", "content": " "}]]), "empty_completion", 422, 1),
    ("NUL in a prompt", prompt("a\x00b"), "nul_byte", 422, 1),
    ("NUL in a turn", prompt([{"role": "user", "content": "\x00"}]), "nul_byte", 422, 1),
    ("NUL in a completion", completions(["ok", "a\x00"]), "nul_byte", 422, 1),
    ("lone surrogate in a prompt", prompt("a\ud83d"), "lone_surrogate", 422, 1),
    ("lone surrogate in a completion", completions(["\udc00"]), "lone_surrogate", 422, 1),
    ("lone surrogate, capital escape", items({}).replace(b"{}", rb'{"prompt": "\uD800", "completions": ["a"]}'), "lone_surrogate", 422, 1),
    ("lone surrogate as an item's key", items({**GOOD, "\ud800": 1}), "lone_surrogate", 422, 1),
    ("long prompt", prompt("x" * 1001), "text_too_long", 413, 1),
    ("long completion", completions(["x", "y" * 1001]), "text_too_long", 413, 1),
]


@pytest.mark.parametrize(("body", "code", "status", "item"), [case[1:] for case in BAD_REQUESTS], ids=[case[0] for case in BAD_REQUESTS])
def test_bad_request_is_refused_with_item_and_rule(body: bytes, code: str, status: int, item: int | None) -> None:
    with pytest.raises(RuleError) as caught:
        parse_request(body, LIMITS)
    error = caught.value
    assert (error.code, error.status, error.item) == (code, status, item)
    reply_status, reply = error_reply(error)
    assert reply_status == status
    assert reply.error.code == code
    assert reply.error.item == item
    assert reply.error.remedy
    if item is not None:
        assert str(item) in reply.error.message
    json.loads(reply.model_dump_json())


def test_error_message_does_not_grow_with_the_request() -> None:
    limits = Limits(max_chars_per_text=10**6)
    for body in (prompt([{"role": "r" * 100_000, "content": "x"}]), items({**GOOD, "k" * 100_000: 1})):
        with pytest.raises(RuleError) as caught:
            parse_request(body, limits)
        assert len(caught.value.problem) < 500


def test_good_request_becomes_items() -> None:
    body = {
        "model": "rm",
        "items": [
            {"prompt": "Hi 🙂 \\u0000", "completions": ["a", [{"role": "assistant", "content": "b"}], "a"]},
            {
                "prompt": [{"role": "system", "content": ""}, USER, ASSISTANT, {"role": "tool", "content": "42"}],
                "completions": [" padded "],
            },
        ],
    }
    parsed, model = parse_request(json.dumps(body).encode(), LIMITS)
    assert model == "rm"
    assert parsed[0].prompt == ({"role": "user", "content": "Hi 🙂 \\u0000"},)
    assert parsed[0].completions == ("a", "b", "a")
    assert parsed[1].prompt == tuple(body["items"][1]["prompt"])  # type: ignore[index]
    assert parsed[1].completions == (" padded ",)


def test_turns_in_their_usual_forms_become_the_one_form() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    item = {
        "prompt": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts, "name": "Ann"},
            call('{"a": 1}'),
            RESULT,
            {"role": "assistant", "content": "It is", "prefix": True, "refusal": None, "annotations": []},
        ],
        "completions": [" 42.", [{**ASSISTANT, "thinking": "Hm."}], [call({"b": [1, 2]}), RESULT, ASSISTANT]],
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": False, "date": "1 May 2025"},
    }
    (parsed,), _ = parse_request(json.dumps({"items": [item]}).encode(), LIMITS)
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert parsed.prompt == (
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi there", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        RESULT,
        {"role": "assistant", "content": "It is", "prefix": True},
    )
    plain, thought, trajectory = parsed.completions
    assert plain == " 42."
    assert thought == ({"role": "assistant", "content": "Hello", "reasoning_content": "Hm."},)
    assert [turn["role"] for turn in trajectory] == ["assistant", "tool", "assistant"]  # type: ignore[index]
    assert parsed.inputs == TemplateInputs.of(tools, {"enable_thinking": False, "date": "1 May 2025"})
    (bare,), _ = parse_request(json.dumps({"items": [{**GOOD, "tools": None, "chat_template_kwargs": {}}]}).encode(), LIMITS)
    assert (bare.tools, bare.chat_template_kwargs) == (None, None)


def test_the_refusal_names_turn_and_part() -> None:
    image = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "u"}}]}
    with pytest.raises(RuleError, match=r"item 1: turn 1 of the prompt: part 1 of the content is of type 'image_url'.*no images"):
        parse_request(prompt([{"role": "system", "content": "x"}, image]), LIMITS)
    with pytest.raises(RuleError, match=r"item 1: turn 0 of completion 0: tool_calls\[0\] names no function"):
        parse_request(completions([[{**ASSISTANT, "tool_calls": [{}]}]]), LIMITS)


def test_request_at_every_limit_is_accepted() -> None:
    body = {"items": [{"prompt": "x" * 1000, "completions": ["y" * 1000] * 4}] * 20}
    parsed, _ = parse_request(json.dumps(body).encode(), LIMITS)
    assert len(parsed) == 20


def test_rule_error_is_a_request_error() -> None:
    assert issubclass(RuleError, RequestError)


def test_reply_holds_rewards_or_error_in_order() -> None:
    results = [
        ItemResult(rewards=(1.5, -0.25), tokens=10, tokens_computed=6),
        ItemResult(error=ItemError("too_long", "9 tokens")),
        ItemResult(rewards=(0.0,), tokens=3, tokens_computed=3),
    ]
    reply = build_reply("score-1", "rm", "abc", results)
    assert json.loads(reply.model_dump_json(exclude_none=True)) == {
        "id": "score-1",
        "model": "rm",
        "version": "abc",
        "results": [
            {"rewards": [1.5, -0.25]},
            {"error": {"code": "too_long", "message": "9 tokens", "retryable": False}},
            {"rewards": [0.0]},
        ],
        "usage": {"tokens": 13, "tokens_computed": 9},
    }


REPLY = '{"id": "1", "model": "m", "version": "v", "results": [%s], "usage": {"tokens": 1, "tokens_computed": 1}}'


@pytest.mark.parametrize(
    "result",
    [
        '{"rewards": [NaN]}',
        '{"rewards": [Infinity]}',
        '{"rewards": null}',
        '{"rewards": ["1"]}',
        '{"rewards": [true]}',
        "{}",
        '{"rewards": [1.0], "error": {"code": "x", "message": "y"}}',
        '{"rewards": [1.0], "reward": 1.0}',
        '{"rewards": [1.0], "outputs": [[NaN]]}',
        '{"error": {"code": 1, "message": "y"}}',
    ],
)
def test_reply_cannot_hold_what_is_no_reward(result: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        ScoreReply.model_validate_json(REPLY % result)


def test_a_result_that_is_not_finite_is_never_written() -> None:
    # Not even as null, which is what JSON would make of it.
    nan = ItemResult(rewards=(float("nan"),))
    with pytest.raises(ValueError, match="finite number"):
        build_reply("score-1", "rm", "abc", [nan])
    with pytest.raises(ValueError, match="finite number"):
        nan.as_json()


def test_reply_client_and_result_line_share_one_schema() -> None:
    result = ItemResult(rewards=(1.5,), steps=((0.25, 0.5),), critiques=(("ok",),), reward_std=(0.5,), tokens=9, tokens_computed=8)
    reply = build_reply("score-1", "rm", "abc", [result])
    written = reply.model_dump_json(exclude_none=True)
    assert json.loads(written)["results"] == [result.as_json()]
    # Tokens are counted in the usage of the reply, not item by item.
    (read,) = ScoreReply.model_validate_json(written).results
    assert read == replace(result, tokens=0, tokens_computed=0)


@pytest.mark.parametrize("both", [{}, {"rewards": (1.0,), "error": ItemError("x", "y")}])
def test_a_result_is_rewards_or_an_error(both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either rewards or an error"):
        ItemResult(**both)


def test_what_is_asked_reaches_every_item_and_only_what_differs_is_sent() -> None:
    asked = Asked(weights="w", normalise="centred", n_critiques=3, temperature=0.5)
    assert Asked().given() == {}
    assert asked.given() == {"weights": "w", "normalise": "centred", "n_critiques": 3, "temperature": 0.5}
    found, _ = parse_request(json.dumps({"items": [GOOD, GOOD], **asked.given()}).encode(), LIMITS)
    assert [item.asked for item in found] == [asked, asked]


@pytest.mark.parametrize(
    "bad",
    [
        {"items": [1] * 1000},
        {"items": [{**GOOD, "tools": [1] * 1000}]},
        {"items": [{**GOOD, "completions": [1] * 1000}]},
        {"items": [{**GOOD, "completions": [[1] * 1000]}]},
        {"items": [{**GOOD, "prompt": [1] * 1000}]},
    ],
)
def test_a_list_of_faults_is_one_error(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ScoreRequest.model_validate(bad)
    assert caught.value.error_count() == 1
