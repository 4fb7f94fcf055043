"""Turns as the tools of others write them, brought into the form of chat templates: objects with role and content."""

from __future__ import annotations

import json
from typing import Any

from rayward.data.formats.columns import changes_meaning, is_metadata
from rayward.data.formats.values import Row, as_list, as_text, kind_of, parsed, required
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
_FIELDS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "prefix", "reasoning_content", "reasoning", "thinking"})
_ABOUT = frozenset({"country", "state", "header", "hashed_ip"})
"""Of turns of public logs, beside what a name says by itself: about the speaker, not the text."""
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
    elif turn.get("role") == "assistant" and isinstance(turn.get("function_call"), dict) and not turn.get("tool_calls"):
        # The older form of one call, and below of its result.
        rest = {name: value for name, value in turn.items() if name != "function_call"}
        return {**rest, "content": turn.get("content") or "", "tool_calls": _calls(turn["function_call"], where)}
    elif turn.get("role") == "function":
        return {**turn, "role": "tool"}
    else:
        return turn
    rest = {name: value for name, value in turn.items() if name in ("tool_call_id", "name", "reasoning_content")}
    if speaker in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, where)}
    return {"role": _ROLES.get(speaker, speaker), "content": content, **rest}


def without_metadata(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn without the fields that speak about it: ids, languages, counts of tokens, flags. What may be part of its text stays."""
    return {name: value for name, value in turn.items() if name in _FIELDS or not _is_about(name, value)}


def _is_about(name: str, value: Any) -> bool:
    return name in _ABOUT or (not changes_meaning(name) and (is_metadata(name) or isinstance(value, bool | int | float)))


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


def with_tools(row: Row) -> Row:
    """The row with its bare schemas of tools (`name`, `parameters`), a list or the JSON text of one, in the form that templates expect."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return row
    if not isinstance(tools, list):
        return row
    bare = [isinstance(tool, dict) and "name" in tool and "function" not in tool and tool.get("type") != "function" for tool in tools]
    wrapped = [{"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(tools, bare, strict=True)]
    return {**row, "tools": wrapped}


def _is_bare_call(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "assistant" and bool(turn.get("tool_calls")) and not turn.get("content")
