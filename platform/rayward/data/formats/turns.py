"""Turns as the tools of others write them, brought into the form of chat templates: objects with role and content."""

from __future__ import annotations

import json
from typing import Any

from rayward.data.formats.values import as_list, as_text, kind_of, parsed, required
from rayward.data.record import BadRow, RowRejected

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call", "function-call")


def plain_turns(value: Any, key: str) -> list[Any]:
    """Turns with role and content, from turns with `from` and `value` (ShareGPT), `human` and `assistant`, or the JSON text of turns.

    Turns that are a call (`function_call`, `tool_call`) become an assistant's turn with `tool_calls`; calls in a row become one turn.
    Other values stay as they are: the caller's rules judge them.

    Raises:
        RowRejected: no list, an unknown speaker, or a call that is not the JSON of one.
    """
    turns: list[Any] = []
    for index, turn in enumerate(as_list(parsed(value), key)):
        where = f"{key}[{index}]"
        if isinstance(turn, dict) and {"human", "assistant"} <= turn.keys():
            turns += [{"role": "user", "content": turn["human"]}, {"role": "assistant", "content": turn["assistant"]}]
            continue
        plain = _plain(turn, where)
        if turns and _is_bare_call(plain) and _is_bare_call(turns[-1]):
            turns[-1] = {**turns[-1], "tool_calls": [*turns[-1]["tool_calls"], *plain["tool_calls"]]}
        else:
            turns.append(plain)
    return turns


def _plain(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict):
        return turn
    if "from" in turn and "role" not in turn:
        content, speaker = required(turn, "value"), as_text(required(turn, "from"), f"{where}.from")
    elif turn.get("role") in (*_CALLS, *_ROLES) and "content" in turn:
        content, speaker = turn["content"], turn["role"]
    else:
        return turn
    rest = {name: value for name, value in turn.items() if name in ("tool_call_id", "name", "reasoning_content")}
    if speaker in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, where)}
    return {"role": _ROLES.get(speaker, speaker), "content": content, **rest}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as exc:
        raise RowRejected(BadRow.UNPARSABLE, f"{where}: the call is not JSON: {exc}") from exc
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            raise RowRejected(BadRow.WRONG_TYPE, f"{where}: the call is {kind_of(call)}; the rule is an object with name and arguments")
    if not calls:
        raise RowRejected(BadRow.WRONG_TYPE, f"{where}: the call is an empty list")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]


def _is_bare_call(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant" and bool(turn.get("tool_calls")) and not turn.get("content")
