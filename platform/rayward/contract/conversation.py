"""Turns of a conversation, and the rules that every text, prompt and completion keeps, wherever it comes from. Light.

Each rule is a function that returns what is broken, or None. Who asks decides what a broken rule is: prepare quarantines the row, the
service refuses the item.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates expect.

    Besides role and text, where a turn has them: `tool_calls` (`[{"type": "function", "function": {"name", "arguments"}}]`, arguments as
    an object), of a tool's answer `tool_call_id` and `name`, `reasoning_content` (what was thought before the text), and `prefix`: of the
    last turn of a prompt, that an assistant has begun it and the completion goes on.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    prefix: NotRequired[bool]


Completion: TypeAlias = str | tuple[Message, ...]
"""What is judged: the text of one assistant turn, or turns that begin and end with an assistant's (a call of a tool, a trajectory)."""

TakenAs: TypeAlias = Literal["templated", "rendered", "as_given"]
"""What became of texts: put through the contract's template; recognised as templated before and taken as they are; or plain texts without
roles, which no template can be applied to, tokenized as they stand."""


@dataclass(frozen=True, slots=True)
class TemplateInputs:
    """What a conversation gives its chat template besides turns.

    Attributes:
        tools: schemas of the tools that may be called.
        chat_template_kwargs: other variables, which win over those of the contract.
    """

    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tools: Sequence[dict[str, Any]] | None, chat_template_kwargs: Mapping[str, Any] | None) -> TemplateInputs:
        """The same, of values that may be absent."""
        return NO_INPUTS if not tools and not chat_template_kwargs else cls(tuple(tools or ()), dict(chat_template_kwargs or {}))

    def to_json(self) -> str | None:
        """The same as text, for the way between two steps; None of nothing."""
        if not self.tools and not self.chat_template_kwargs:
            return None
        return json.dumps({"tools": self.tools, "chat_template_kwargs": dict(self.chat_template_kwargs)})

    @classmethod
    def from_json(cls, text: str | None) -> TemplateInputs:
        """Inverse of `to_json`."""
        return NO_INPUTS if text is None else cls.of(**json.loads(text))


NO_INPUTS = TemplateInputs()

RuleCode = Literal[
    "unknown_role",
    "nul_byte",
    "lone_surrogate",
    "empty_prompt",
    "prompt_end",
    "empty_completion",
    "completion_turns",
    "unsupported_message",
]


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """What a conversation does not keep.

    Attributes:
        code: the rule.
        detail: what is wrong, in words.
    """

    code: RuleCode
    detail: str


class RuleBrokenError(ValueError):
    """Raised by `parse_turn` alone; who calls it makes a rejected row or a refused item of it."""

    def __init__(self, broken: BrokenRule) -> None:
        super().__init__(broken.detail)
        self.broken = broken


def completion_of(turns: Sequence[Message]) -> Completion:
    """Turns in the one form that a completion of them has."""
    if len(turns) == 1 and set(turns[0]) == {"role", "content"} and turns[0]["role"] == "assistant":
        return turns[0]["content"]
    return tuple(turns)


def turns_of(completion: Completion) -> tuple[Message, ...]:
    """A completion as turns."""
    return (Message(role="assistant", content=completion),) if isinstance(completion, str) else completion


def text_of(completion: Completion) -> str:
    """A completion as one text, for people and for lengths; turns have their role before them."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1:
        return _turn_text(completion[0])
    return "\n\n".join(f"{turn['role']}: {_turn_text(turn)}" for turn in completion)


def _turn_text(turn: Message) -> str:
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join(part for part in (turn.get("reasoning_content", ""), turn["content"], *calls) if part)


def strings_in(value: object) -> Iterator[str]:
    """Every text in JSON values, names of fields included."""
    # No recursion: JSON may be nested deeper than what is left of the stack.
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, str):
            yield current
        elif isinstance(current, list | tuple):
            pending += current
        elif isinstance(current, dict) or isinstance(current, Mapping):  # noqa: SIM101 - the second one is slow, and rare
            pending += current.keys()
            pending += current.values()


_TEXT_PARTS = ("text", "input_text", "output_text")
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "prefix"})
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_HARMLESS_KEYS = frozenset({"id", "type", "weight", "loss", "train", "language", "model", "annotations"})
"""Of turns as people have them: they say nothing to a reward model."""
_PART_KEYS = frozenset({"type", "text", "cache_control", "annotations", "index"})
_CALL_KEYS = frozenset({"id", "type", "function", "index", "name", "arguments", "parameters"})
_FUNCTION_KEYS = _CALL_KEYS | {"strict"}


def parse_turn(value: Mapping[str, Any], *, extra: Literal["refuse", "leave"] = "refuse") -> Message:
    """A turn in any of its usual forms: text parts are joined, a call may stand without text, thinking has one name.

    Args:
        value: with a `role` that is a text, and a `content` or something in its place.
        extra: what becomes of fields that no template knows and that say nothing (ids, languages): an error, or left out.

    Raises:
        RuleBrokenError: a part would be lost: an image, a sound, a field of unknown meaning.
        TypeError: a field has the wrong type; the message names it.
    """
    turn = Message(role=value["role"], content=_content(value.get("content"), value))
    reasoning = {key: value[key] for key in _REASONING_KEYS if value.get(key)}
    if reasoning:
        texts = set(_typed(key, text, str, "a text") for key, text in reasoning.items())
        if len(texts) > 1:
            raise RuleBrokenError(BrokenRule("unsupported_message", f"the turn has {', '.join(reasoning)}, which differ"))
        turn["reasoning_content"] = texts.pop()
    if value.get("tool_calls"):
        turn["tool_calls"] = [_call(call, index) for index, call in enumerate(_typed("tool_calls", value["tool_calls"], list, "a list"))]
    for key in ("tool_call_id", "name"):
        if value.get(key) is not None:
            turn[key] = _typed(key, value[key], str, "a text")
    if value.get("prefix") is not None and _typed("prefix", value["prefix"], bool, "true or false"):
        turn["prefix"] = True
    for key in value:
        if key in _TURN_KEYS or key in _REASONING_KEYS or value[key] is None or value[key] in ("", [], {}):
            continue
        if extra == "refuse" or key not in _HARMLESS_KEYS:
            raise RuleBrokenError(
                BrokenRule("unsupported_message", f"the turn has a field {str(key)[:40]!r} that no chat template is given")
            )
    return turn


def _content(content: object, turn: Mapping[str, Any]) -> str:
    if isinstance(content, str):
        return content
    if content is None and (turn.get("tool_calls") or any(turn.get(key) for key in _REASONING_KEYS)):
        return ""
    if not isinstance(content, list):
        raise TypeError(f"content is {_kind(content)}; the rule is a text, or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind is None and text is not None and set(part) == {"text"}:
            kind = "text"
        if kind not in _TEXT_PARTS:
            what = f"of type {str(kind)[:40]!r}" if kind else _kind(part)
            raise RuleBrokenError(
                BrokenRule("unsupported_message", f"part {index} of the content is {what}; only texts are supported, no images or sounds")
            )
        if isinstance(part, Mapping):
            _require_known(part, _PART_KEYS, f"part {index} of the content")
        if not isinstance(text, str):
            raise TypeError(f"part {index} of the content has a text that is {_kind(text)}")
        texts.append(text)
    return "".join(texts)


def _call(call: object, index: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise TypeError(f"tool_calls[{index}] is {_kind(call)}; the rule is an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TypeError(f"tool_calls[{index}] names no function; the rule is an object with name and arguments")
    _require_known(call, _CALL_KEYS, f"tool_calls[{index}]")
    _require_known(function, _FUNCTION_KEYS, f"the function of tool_calls[{index}]")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        # Providers send the arguments as JSON in a text; templates print objects.
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    if not isinstance(arguments, str | Mapping):
        raise TypeError(f"tool_calls[{index}] has arguments that are {_kind(arguments)}; the rule is an object")
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        found["id"] = call["id"]
    return found


def _require_known(value: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    unknown = [key for key in value if key not in known and value[key] not in (None, "", [], {})]
    if unknown:
        raise RuleBrokenError(
            BrokenRule("unsupported_message", f"{where} has a field {str(unknown[0])[:40]!r} that no chat template is given")
        )


def _typed(key: str, value: Any, kind: type, rule: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {_kind(value)}; the rule is {rule}")
    return value


def _kind(value: object) -> str:
    names = {"str": "a text", "list": "a list", "dict": "an object", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def broken_by_role(role: str) -> BrokenRule | None:
    """A role is one of ROLES."""
    if role in ROLES:
        return None
    return BrokenRule("unknown_role", f"role {role[:40]!r} is not one of {', '.join(ROLES)}")


def broken_by_text(text: str) -> BrokenRule | None:
    """A text holds only what every tokenizer round-trips: no NUL bytes, no lone surrogates."""
    if "\x00" in text:
        return BrokenRule("nul_byte", "a text holds a NUL byte")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        return BrokenRule("lone_surrogate", "a text holds a lone surrogate, which is no character")
    return None


def broken_by_prompt(turns: Sequence[Message]) -> BrokenRule | None:
    """A prompt has known roles and a text besides the system's, and ends where an assistant answers, or has begun to."""
    if not turns:
        return BrokenRule("empty_prompt", "the prompt has no turn")
    for number, turn in enumerate(turns):
        if (broken := broken_by_role(turn["role"])) is not None:
            return broken
        if turn.get("prefix") and (number < len(turns) - 1 or turn["role"] != "assistant" or turn.get("tool_calls")):
            return BrokenRule("prompt_end", f"turn {number} has prefix: true; the rule is the last turn of a prompt, an assistant's text")
    if not any(_turn_text(turn).strip() for turn in turns if turn["role"] not in ("system", "developer") and not turn.get("prefix")):
        return BrokenRule("empty_prompt", "the prompt holds no text")
    # A completion is an answer: templates print two assistant turns in a row in ways nobody trained on.
    last = turns[-1]["role"]
    if last not in ("user", "tool") and not turns[-1].get("prefix"):
        return BrokenRule(
            "prompt_end",
            f"the prompt ends with a turn of the {last}; the rule is a user or tool turn, or an assistant turn with prefix: true that the "
            "completion goes on with",
        )
    return None


def broken_by_completion(index: int, completion: Completion) -> BrokenRule | None:
    """A completion has a text or a call in its last turn; of several turns the first and the last are an assistant's."""
    turns = turns_of(completion)
    for turn in turns:
        if (broken := broken_by_role(turn["role"])) is not None:
            return broken
    if any(turn.get("prefix") for turn in turns):
        return BrokenRule(
            "completion_turns", f"completion {index} has a turn with prefix: true; only the last turn of a prompt may have it"
        )
    roles = [turn["role"] for turn in turns]
    if not roles:
        return BrokenRule("empty_completion", f"completion {index} has no turn")
    if roles[0] != "assistant" or roles[-1] != "assistant" or ("assistant", "assistant") in pairwise(roles):
        return BrokenRule(
            "completion_turns",
            f"completion {index} has turns [{', '.join(roles[:8])}]; the rule is an assistant turn first and last, and never two in a row",
        )
    return None if _turn_text(turns[-1]).strip() else BrokenRule("empty_completion", f"completion {index} is empty")
