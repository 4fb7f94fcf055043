"""Turns with calls, thoughts and parts: one form of each, and nothing of them is lost on the way to the text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.tokenizer import CHATML, END, START, make_tokenizer
from transformers import PreTrainedTokenizerFast

from rayward.contract.contract import Contract
from rayward.contract.conversation import (
    BrokenRule,
    Message,
    RuleBrokenError,
    TemplateInputs,
    broken_by_completion,
    broken_by_prompt,
    completion_of,
    parse_turn,
    text_of,
    turns_of,
)
from rayward.contract.encoder import Encoder
from rayward.errors import ChangedTextError, ContractError, TooLongError, UnsupportedMessageError

USER = Message(role="user", content="Weather in Oslo?")
CALL: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOLS = ({"type": "function", "function": {"name": "get_weather", "description": "weather of a city", "parameters": {}}},)
AGENT = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path)


def encoder_of(tokenizer: PreTrainedTokenizerFast, template: str, **settings: Any) -> Encoder:
    tokenizer.chat_template = template
    return Encoder(Contract.from_tokenizer(tokenizer, **{"max_tokens": 4096, **settings}), tokenizer)


@pytest.mark.parametrize(
    ("given", "turn"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "ab"}),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, {"role": "user", "content": "ab"}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ),
        ({"role": "assistant", "content": "x", "thinking": "y"}, {"role": "assistant", "content": "x", "reasoning_content": "y"}),
        ({"role": "assistant", "content": "x", "reasoning": "", "tool_calls": []}, {"role": "assistant", "content": "x"}),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "image_url": None}]},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "user", "content": "x", "id": 3, "refusal": None}, {"role": "user", "content": "x"}),
    ],
)
def test_a_turn_has_one_form(given: dict[str, Any], turn: dict[str, Any]) -> None:
    assert parse_turn(given, extra="leave") == turn


@pytest.mark.parametrize(
    "given",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"image": "x"}]},
        {"role": "user", "content": "a", "images": ["x.png"]},
        {"role": "user", "content": [{"type": "text", "text": "a", "image": "x.png"}]},
        {"role": "assistant", "tool_calls": [{**CALL, "output": "3 degrees"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}, "result": "x"}}]},
        {"role": "assistant", "content": "a", "function_call": {"name": "f"}},
        {"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"},
    ],
)
def test_what_would_be_lost_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(RuleBrokenError) as refused:
        parse_turn(given, extra="leave")
    assert refused.value.broken.code == "unsupported_message"


@pytest.mark.parametrize(
    "given",
    [
        {"role": "user", "content": 3},
        {"role": "user", "content": None},
        {"role": "assistant", "content": "", "tool_calls": {"name": "f"}},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
        {"role": "tool", "content": "x", "tool_call_id": 3},
    ],
)
def test_a_field_of_the_wrong_type_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"content|tool_calls|tool_call_id"):
        parse_turn(given)


def test_a_field_that_says_nothing_is_refused_on_the_wire_only() -> None:
    assert parse_turn({"role": "user", "content": "x", "language": "en"}, extra="leave") == {"role": "user", "content": "x"}
    with pytest.raises(RuleBrokenError, match="language"):
        parse_turn({"role": "user", "content": "x", "language": "en"})


def test_a_completion_is_a_text_or_turns() -> None:
    plain = Message(role="assistant", content="x")
    called = Message(role="assistant", content="", tool_calls=[CALL])
    answer = Message(role="tool", content="3 degrees")
    assert completion_of([plain]) == "x"
    assert turns_of("x") == (plain,)
    assert completion_of([called]) == (called,)
    assert "get_weather" in text_of((called,))
    for turns, code in (
        ((called,), None),
        ((called, answer, plain), None),
        ((called, answer), "completion_turns"),
        ((answer, plain), "completion_turns"),
        ((plain, plain), "completion_turns"),
        ((), "empty_completion"),
        ((Message(role="assistant", content=" "),), "empty_completion"),
    ):
        broken = broken_by_completion(0, turns)
        assert (broken and broken.code) == code, turns


def test_a_prompt_may_end_with_a_turn_that_an_assistant_has_begun(tokenizer: PreTrainedTokenizerFast) -> None:
    begun = Message(role="assistant", content="It is ", prefix=True)
    assert broken_by_prompt([USER, begun]) is None
    for wrong in ([begun, USER], [Message(role="user", content="x", prefix=True)]):
        assert isinstance(broken_by_prompt(wrong), BrokenRule)
    encoder = encoder_of(tokenizer, CHATML)
    found, whole = encoder.encode_parts((USER, begun), "cold."), encoder.encode_parts((USER,), "It is cold.")
    assert found.ids == whole.ids
    assert tokenizer.decode(found.ids[found.text_start :]) == f"cold.{END}"
    assert found.prompt_key != whole.prompt_key, "another prompt, though the same text"


def test_calls_thoughts_and_tools_reach_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer, AGENT)
    called = Message(role="assistant", content="", tool_calls=[CALL], reasoning_content="I must look.")
    answer = Message(role="tool", content="3", tool_call_id="1", name="get_weather")
    branch = (called, answer, Message(role="assistant", content="Three degrees."))
    inputs = TemplateInputs(TOOLS)
    text = encoder.render((USER,), branch, inputs=inputs)
    plain = tokenizer.apply_chat_template([USER, *branch], tools=list(TOOLS), tokenize=False)  # type: ignore[arg-type]
    assert isinstance(plain, str)
    assert text == plain.rstrip()
    found = encoder.encode_parts((USER,), branch, inputs=inputs)
    assert found.ids == tokenizer(plain.rstrip(), add_special_tokens=False)["input_ids"]
    assert str(tokenizer.decode(found.ids[found.text_start :])).startswith("<think>I must look.</think><call>get_weather")
    assert found.prompt_key == encoder.encode_parts((USER,), "It is cold.", inputs=inputs).prompt_key
    assert found.prompt_key != encoder.encode_parts((USER,), "It is cold.").prompt_key


@pytest.mark.parametrize(
    ("template", "turn", "says"),
    [
        (CHATML, Message(role="assistant", content="x", tool_calls=[CALL]), "call 0 of turn 1"),
        (CHATML, Message(role="assistant", content="x", reasoning_content="y"), "the reasoning of turn 1"),
        (
            AGENT.replace("{{ c.function.arguments | tojson }}", ""),
            Message(role="assistant", content="", tool_calls=[CALL]),
            "the arguments",
        ),
        (
            AGENT.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            Message(role="assistant", content="", tool_calls=[CALL, CALL]),
            "call 1",
        ),
    ],
)
def test_a_part_that_the_template_does_not_show_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, turn: Message, says: str
) -> None:
    with pytest.raises(UnsupportedMessageError, match=says):
        encoder_of(tokenizer, template).encode((USER,), (turn,))
    found = encoder_of(tokenizer, template, unshown_text="accept").encode_parts((USER,), (turn,))
    assert says in (found.changed or "")


def test_tools_variables_and_system_turns_are_parts_too(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedMessageError, match=r"tools\[0\]"):
        encoder_of(tokenizer, CHATML).encode((USER,), "x", inputs=TemplateInputs(TOOLS))
    with pytest.raises(UnsupportedMessageError, match="enable_thinking"):
        encoder_of(tokenizer, CHATML).encode((USER,), "x", inputs=TemplateInputs((), {"enable_thinking": False}))
    with pytest.raises(ContractError, match="messages"):
        encoder_of(tokenizer, CHATML).encode((USER,), "x", inputs=TemplateInputs((), {"messages": []}))
    without = CHATML.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    with pytest.raises(UnsupportedMessageError, match=r"turn 0 \(system\)"):
        encoder_of(tokenizer, without).encode((Message(role="system", content="Be brief."), USER), "x")


def test_a_developer_is_the_system_where_the_template_knows_none(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = (Message(role="developer", content="Be brief."), USER)
    assert f"{START}system\nBe brief." in encoder_of(tokenizer, CHATML).render(prompt, "x")
    knows = "{% if messages[0].role == 'developer' %}!{% endif %}" + CHATML
    assert f"{START}developer\nBe brief." in encoder_of(tokenizer, knows).render(prompt, "x")


@pytest.mark.parametrize(
    ("change", "completion", "trimmed"),
    [
        (".split('</think>')[-1]", "<think>x</think>Seven", None),
        (".replace('a', 'b')", "banana", None),
        (" | trim", " Seven\n", True),
        (" | trim", "Seven", False),
    ],
)
def test_a_completion_stands_before_its_end_token_as_it_was_given(
    tokenizer: PreTrainedTokenizerFast, change: str, completion: str, trimmed: bool | None
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content" + change + " }}<|im_end|>\n{% endfor %}"
    if trimmed is None:
        with pytest.raises(ChangedTextError, match="changes the completion"):
            encoder_of(tokenizer, template).encode((USER,), completion)
        found = encoder_of(tokenizer, template, unshown_text="accept").encode_parts((USER,), completion)
        assert "changes the completion" in (found.changed or "")
    else:
        assert encoder_of(tokenizer, template).encode_parts((USER,), completion).trimmed is trimmed


def test_truncation_is_that_of_trying_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = (Message(role="system", content="s"), *(Message(role=("user", "assistant")[i % 2], content="x" * (i % 7)) for i in range(41)))
    whole = encoder_of(tokenizer, CHATML)
    starts = [1, *(i for i in range(2, len(prompt)) if prompt[i]["role"] == "user")]
    lengths = [len(whole.encode([prompt[0], *prompt[start:]], "yes")) for start in starts]
    for limit in range(60, lengths[0] + 2, 7):
        cut = encoder_of(tokenizer, CHATML, max_tokens=limit)
        expected = next((length for length in lengths if length <= limit), None)
        if expected is None:
            with pytest.raises(TooLongError, match=str(lengths[-1])):
                cut.encode(prompt, "yes")
        else:
            found = cut.encode_parts(prompt, "yes")
            assert (len(found.ids), found.num_tokens, found.truncated) == (expected, lengths[0], expected < lengths[0])


def test_what_truncation_renders_does_not_grow_with_the_square_of_the_turns(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tuple(Message(role=("user", "assistant")[i % 2], content="word " * 20) for i in range(801))
    encoder = encoder_of(tokenizer, CHATML, max_tokens=400)
    encoder.encode(prompt, "yes")
    rendered = 0
    apply = tokenizer.apply_chat_template

    def counting(turns: list[Any], **kwargs: Any) -> Any:
        nonlocal rendered
        rendered += len(turns)
        return apply(turns, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    started = time.perf_counter()
    assert len(encoder.encode(prompt, "no")) <= 400
    assert rendered < 1.2 * len(prompt), f"{rendered} turns in {time.perf_counter() - started:.2f} s"


def test_inputs_survive_the_way_between_two_steps() -> None:
    inputs = TemplateInputs(TOOLS, {"enable_thinking": False})
    text = inputs.to_json()
    assert text is not None
    assert TemplateInputs.from_json(text) == inputs
    assert json.loads(text)["tools"] == list(TOOLS)
    assert TemplateInputs.from_json(TemplateInputs().to_json()) == TemplateInputs()
