"""NeMo-Gym's resources server: `/verify` judges one rollout, `/compare` a group of responses to one conversation.

Requests hold OpenAI Responses: what the policy was given, and the items that it put out. A rollout whose score fails is refused: the reward
of 0.0 that NeMo-Gym's own servers write beside a failure class would be read as a reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rayward.errors import RuleError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, ObjectList, Peer, check_depth, group_items, read_object
from rayward.wire.dialects.replies import body, detail_error, flat_rewards, output_names, taken_as
from rayward.wire.rules import Limits

PRINCIPLE = "the model judges by what it was trained on; it is given no principle"
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class VerifyRequest(Peer):
    """Of `/verify`; the row's other fields come back as they are."""

    responses_create_params: dict[str, Any]
    response: dict[str, Any]


class CompareRequest(Peer):
    """Of `/compare`."""

    conversation_history: ObjectList
    response_objs: ObjectList


VERIFY = Form(VerifyRequest, refused={"principle": PRINCIPLE}, others="keep")
COMPARE = Form(CompareRequest, refused={"principle": PRINCIPLE})
SEED = Form(Peer, others="keep")


def parse_verify(request: bytes, limits: Limits) -> Call:
    """The input as a prompt, the output as one completion of turns."""
    raw = read_object(request, limits)
    check_depth(raw)
    asked = VERIFY.read_value(raw)
    params = asked.responses_create_params
    prompt = _turns(params.get("input"), "responses_create_params.input", limits)
    if params.get("instructions"):
        prompt.insert(0, {"role": "system", "content": params["instructions"]})
    completion = _turns(asked.response.get("output"), "response.output", limits)
    items = group_items(prompt, [completion], limits, tools=_tools(params.get("tools")))

    def render(answered: Answered) -> Body:
        (reward,) = flat_rewards(answered)
        added: dict[str, Any] = {"reward": reward}
        outputs = answered.results[0].outputs
        if outputs:
            added["reward_components"] = dict(zip(output_names(answered, len(outputs[0])), outputs[0], strict=True))
        about = {"model": answered.model, "version": answered.version, "taken_as": taken_as(answered)}
        return body({**raw, **added, "reward_model": about}, answered)

    return Call(items, render)


def parse_compare(request: bytes, limits: Limits) -> Call:
    """One prompt, and the responses as completions of turns."""
    asked = COMPARE.read(request, limits)
    completions = [_turns(each.get("output"), f"response_objs[{i}].output", limits) for i, each in enumerate(asked.response_objs)]
    prompt = _turns(asked.conversation_history, "conversation_history", limits)
    return Call(group_items(prompt, completions, limits), _compared)


def _compared(answered: Answered) -> Body:
    rewards = flat_rewards(answered)
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    metrics = {"mean_individual_score": mean, "std_individual_score": deviation}
    return body({"rewards": rewards, "comparison_results": None, "metrics": metrics}, answered)


def parse_seed(request: bytes, limits: Limits) -> Call:
    """A session; a reward model keeps none."""
    if request:
        SEED.read(request, limits)
    return Call((), lambda answered: Body({}))


def _turns(items: object, name: str, limits: Limits) -> list[dict[str, Any]]:
    # Items of the Responses API as turns: what an assistant thought, called and said in a row is one turn.
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        _refuse(name, "Input should be a text or a list of items", code="wrong_type")
    if len(items) > limits.max_items:
        _refuse(name, f"has {len(items)} items; the limit is {limits.max_items}", code="too_many_items")
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where = f"{name}[{index}]"
        if not isinstance(item, dict):
            _refuse(where, "Input should be an object", code="wrong_type")
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(turns, item, where)
        elif kind == "reasoning":
            _add_reasoning(_assistant(turns, "tool_calls", "content"), item, where)
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function", "function": {k: item.get(k) for k in ("name", "arguments")}}
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _text(output, f"{where}.output")
            turns.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
        else:
            _refuse(where, f"is of type {str(kind)[:40]!r}; texts, thoughts, function calls and their outputs are scored")
    return turns


def _assistant(turns: list[dict[str, Any]], *after: str) -> dict[str, Any]:
    # The assistant turn that goes on, or a new one where there is none, or where it already has what follows what is added.
    if not turns or turns[-1]["role"] != "assistant" or any(turns[-1].get(name) for name in after):
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _add_message(turns: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    content = item.get("content")
    text = content if isinstance(content, str) else _text(content, f"{where}.content")
    if item.get("role") == "assistant":
        _assistant(turns, "tool_calls")["content"] += text
    else:
        turns.append({"role": item.get("role"), "content": text})


def _add_reasoning(turn: dict[str, Any], item: Mapping[str, Any], where: str) -> None:
    text = _text(item.get("content") or item.get("summary") or [], where)
    if not text and item.get("encrypted_content"):
        _refuse(where, "is encrypted; only texts are scored")
    turn["reasoning_content"] = turn.get("reasoning_content", "") + text


def _text(parts: object, where: str) -> str:
    if not isinstance(parts, list):
        _refuse(where, "Input should be a text or a list of text parts", code="wrong_type")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            _refuse(where, f"has a part of type {str(kind)[:40]!r}; only texts are scored")
        texts.append(part["text"])
    return "".join(texts)


def _tools(tools: object) -> Sequence[dict[str, Any]] | None:
    # The Responses API has a function's schema flat, chat templates are given it as chat completions have it.
    if not tools:
        return None
    if not isinstance(tools, list):
        _refuse("responses_create_params.tools", "Input should be a list", code="wrong_type")
    found = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            _refuse(f"responses_create_params.tools[{index}]", "is no function; chat templates are given functions alone")
        if isinstance(tool.get("function"), dict):
            found.append(tool)
        else:
            found.append({"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "strict") and v is not None}})
    return found


def _refuse(where: str, problem: str, *, code: str = "unsupported_message") -> NoReturn:
    raise RuleError(code, f"{where}: {problem}", remedy="send what the Responses API sends, texts only")


_VERIFIED: JSON = {
    "type": "object",
    "required": ["responses_create_params", "response", "reward"],
    "properties": {"reward": {"type": "number"}, "reward_components": {"type": "object", "additionalProperties": {"type": "number"}}},
}
_COMPARED: JSON = {
    "type": "object",
    "required": ["rewards"],
    "properties": {"rewards": {"type": "array", "items": {"type": "number"}}},
}

ROUTES = (
    Route(
        path="/verify",
        dialect="nemo_gym",
        summary="The reward of a rollout, beside the rollout",
        parse=parse_verify,
        error=detail_error,
        request=VERIFY.schema(),
        reply=_VERIFIED,
    ),
    Route(
        path="/compare",
        dialect="nemo_gym",
        summary="The rewards of a group of responses",
        parse=parse_compare,
        error=detail_error,
        request=COMPARE.schema(),
        reply=_COMPARED,
    ),
    Route(
        path="/seed_session",
        dialect="nemo_gym",
        summary="What NeMo-Gym's agents call before a rollout; nothing is kept",
        parse=parse_seed,
        error=detail_error,
        request=SEED.schema(),
        reply={"type": "object"},
        asks="alive",
    ),
)
