"""What the dialects have in common when they read a request: every field is used, is known to change no score, or is refused by name.

Messages name fields and lengths, never what a user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayward.contract.conversation import broken_by_text, strings_in
from rayward.errors import RuleError
from rayward.wire.items import ScoreItem
from rayward.wire.rules import MAX_DEPTH, Limits, body_too_large, check_request, decode, has_escapes


class Peer(BaseModel):
    """Base of the requests of other systems."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


TextList = Annotated[list[str], Field(fail_fast=True)]
"""The first element that is no text is said, and not the millions after it."""
ObjectList = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

Request = TypeVar("Request", bound=Peer)
_MAX_ID = 2**31 - 1
_ID = re.compile(r"[!-~]{1,200}")
_SCHEMA_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


@dataclass(frozen=True, slots=True)
class Form(Generic[Request]):
    """What a request of a dialect may hold.

    Attributes:
        fields: those that decide what is scored and how the reply looks.
        without_effect: known to the dialect and accepted with any value: they change no score.
        refused: known to the dialect, with the reason why anything but an absent, empty or false value is refused.
        removed: refused with any value, as the dialect's own server does.
        others: what becomes of other names: `refuse`, or `keep` where the dialect hands a whole row around.
    """

    fields: type[Request]
    without_effect: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    others: Literal["refuse", "keep"] = "refuse"

    def read(self, body: bytes, limits: Limits) -> Request:
        """The fields of a body.

        Raises:
            RuleError: with the first rule that is broken.
        """
        return self.read_value(read_object(body, limits))

    def read_value(self, raw: Mapping[str, Any]) -> Request:
        """The same of a decoded body."""
        for name, reason in self.removed.items():
            if name in raw:
                _refuse_option(name, reason)
        for name, reason in self.refused.items():
            if raw.get(name):
                _refuse_option(name, reason)
        own, passed = self.fields.model_fields, self.without_effect | self.refused.keys()
        if self.others == "refuse":
            for name in raw:
                if name not in own and name not in passed:
                    raise RuleError("unknown_field", f"{name[:80]}: no field of this path", remedy=f"the fields are {', '.join(own)}")
        try:
            return self.fields.model_validate({name: raw[name] for name in own if name in raw})
        except ValidationError as exc:
            self._raise(exc)

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        schema = self.fields.model_json_schema()
        properties = schema.setdefault("properties", {})
        for name in sorted(self.without_effect):
            properties[name] = {"description": "Accepted; changes no score."}
        for name, reason in self.refused.items():
            properties[name] = {"enum": [None, False, 0, "", [], {}], "description": f"Refused: {reason}."}
        if self.others == "keep":
            schema["additionalProperties"] = True
        return schema

    def _raise(self, exc: ValidationError) -> NoReturn:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "the body"
        code = _SCHEMA_CODES.get(first["type"], "wrong_type")
        raise RuleError(code, f"{where}: {first['msg']}", remedy=f"the fields are {', '.join(self.fields.model_fields)}")


def read_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """A body that is a JSON object whose texts every tokenizer round-trips.

    Raises:
        RuleError: `body_too_large`, `invalid_json`, `wrong_type`, `nul_byte`, `lone_surrogate`.
    """
    if len(body) > limits.max_body_bytes:
        body_too_large(len(body), limits)
    raw = decode(body)
    if not isinstance(raw, dict):
        raise RuleError("wrong_type", "the body is no JSON object", remedy="send one JSON object")
    if has_escapes(body):
        check_characters(raw)
    return raw


def check_characters(value: object) -> None:
    """Refuse NUL bytes and lone surrogates anywhere in JSON values.

    Raises:
        RuleError: `nul_byte`, `lone_surrogate`.
    """
    for text in strings_in(value):
        broken = broken_by_text(text)
        if broken is not None:
            raise RuleError(broken.code, broken.detail, remedy="remove it from the text")


def check_depth(value: object) -> None:
    """Refuse JSON that is nested deeper than items may be: what comes back as it is must be written again.

    Raises:
        RuleError: `wrong_type`.
    """
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())]
        if not level:
            return
    raise RuleError("wrong_type", f"the body is nested deeper than {MAX_DEPTH}", remedy="flatten it")


def _refuse_option(name: str, reason: str) -> NoReturn:
    raise RuleError("unsupported_option", f"{name}: {reason}", remedy=f"leave {name} out")


def texts_of(value: object, name: str) -> list[str]:
    """One text or a list of texts, as a list.

    Raises:
        RuleError: it is something else.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise RuleError("wrong_type", f"{name}: Input should be a text or a list of texts", remedy=f"send {name} as texts")


def text_items(
    texts: Sequence[str], limits: Limits, name: str, *, prompts: Sequence[str | None] | None = None, trace: bool = False
) -> tuple[ScoreItem, ...]:
    """Whole texts, templated before or plain, as one item each.

    Args:
        name: of the field, for messages.
        prompts: the beginnings that are the prompts; where a text does not begin so, nothing is said of it.

    Raises:
        RuleError: there is none, there are too many, one is empty or too long.
    """
    _check_count(len(texts), limits, name)
    items = []
    for index, text in enumerate(texts):
        if not text.strip():
            raise RuleError("empty_completion", f"{name}[{index}] is empty", remedy="send text, or leave it out", item=index)
        if len(text) > limits.max_chars_per_text:
            raise RuleError(
                "text_too_long",
                f"{name}[{index}] has {len(text)} characters; the limit is {limits.max_chars_per_text}",
                remedy="shorten it; the model's own token limit is lower still",
                item=index,
            )
        prompt = None if prompts is None else prompts[index]
        begins = bool(prompt) and prompt != text and text.startswith(prompt or "")
        items.append(ScoreItem((), (text,), form="text", prompt_text=prompt if begins else None, trace=trace))
    return tuple(items)


def input_items(value: object, limits: Limits, name: str, *, trace: bool = False) -> tuple[ScoreItem, ...]:
    """One text or several, or the token ids of one or of several, as one item each; raises as `text_items` and `id_items`."""
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return id_items([value], limits, name, trace=trace)
    if isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return id_items(value, limits, name, trace=trace)
    return text_items(texts_of(value, name), limits, name, trace=trace)


def id_items(rows: Sequence[Sequence[Any]], limits: Limits, name: str, *, trace: bool = False) -> tuple[ScoreItem, ...]:
    """Finished texts as token ids, as one item each.

    Raises:
        RuleError: there are too many, or one is empty, too long, or no list of ids.
    """
    _check_count(len(rows), limits, name)
    for index, row in enumerate(rows):
        if not row:
            raise RuleError("empty_completion", f"{name}[{index}] is empty", remedy="send token ids, or leave it out", item=index)
        if len(row) > limits.max_chars_per_text:
            raise RuleError(
                "text_too_long",
                f"{name}[{index}] has {len(row)} token ids; the limit is {limits.max_chars_per_text}",
                remedy="shorten it; the model's own token limit is lower still",
                item=index,
            )
        if not all(type(each) is int and 0 <= each <= _MAX_ID for each in row):
            raise RuleError("wrong_type", f"{name}[{index}] holds what is no token id", remedy="send integers from 0 on", item=index)
    return tuple(ScoreItem((), ("",), form="tokens", token_ids=tuple(row), trace=trace) for row in rows)


def _check_count(number: int, limits: Limits, name: str) -> None:
    if not number:
        raise RuleError("empty_items", f"{name} is empty; the rule is at least one text", remedy="send a text")
    if number > limits.max_items:
        raise RuleError(
            "too_many_items", f"{name} has {number} texts; the limit is {limits.max_items}", remedy="split them over several requests"
        )


def pair_items(
    pairs: Sequence[tuple[str, str]], limits: Limits, name: str, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[ScoreItem, ...]:
    """Prompts and completions as conversations for the template; neighbours with one prompt become one item, so order is kept.

    Raises:
        RuleError: there is none, there are too many, or one breaks a rule.
    """
    _check_count(len(pairs), limits, name)
    listed = []
    for prompt, group in groupby(pairs, key=lambda pair: pair[0]):
        completions = [completion for _, completion in group]
        size = limits.max_completions_per_item
        for start in range(0, len(completions), size):
            listed.append({"prompt": prompt, "completions": completions[start : start + size]})
    return _checked(listed, limits, chat_template_kwargs=chat_template_kwargs)


def conversation_items(
    messages: Sequence[Any],
    limits: Limits,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[ScoreItem, ...]:
    """One conversation, whose last turn is judged.

    Raises:
        RuleError: it does not end with an assistant's turn, or breaks another rule.
    """
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or len(messages) < 2:
        role = last.get("role") if isinstance(last, dict) else None
        ends = f"end with a turn of role {str(role)[:40]!r}" if messages else "are empty"
        raise RuleError(
            "completion_turns",
            f"messages {ends}; the rule is at least two turns, the last one of an assistant, which is judged",
            remedy="append the answer that is to be scored as an assistant turn",
        )
    listed = [{"prompt": list(messages[:-1]), "completions": [[last]]}]
    return _checked(listed, limits, tools=tools, chat_template_kwargs=chat_template_kwargs)


def group_items(
    prompt: Sequence[Any],
    completions: Sequence[Any],
    limits: Limits,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[ScoreItem, ...]:
    """One prompt of turns and completions of turns, as one item.

    Raises:
        RuleError: a rule of the native schema is broken.
    """
    listed = [{"prompt": list(prompt), "completions": list(completions)}]
    return _checked(listed, limits, tools=tools, chat_template_kwargs=chat_template_kwargs)


def _checked(listed: list[dict[str, Any]], limits: Limits, **inputs: Any) -> tuple[ScoreItem, ...]:
    # The rules of the native schema are the rules of every schema. Characters were looked at with the whole body.
    given = {name: value for name, value in inputs.items() if value}
    items, _ = check_request({"items": [each | given for each in listed]}, limits, escapes=False)
    return tuple(items)


def request_id_of(value: str | None, name: str) -> str | None:
    """The caller's id of a request, fit for headers and logs.

    Raises:
        RuleError: it is too long, or holds more than printable ASCII.
    """
    if value is None or _ID.fullmatch(value):
        return value
    raise RuleError("wrong_type", f"{name}: the rule is 1 to 200 printable ASCII characters without spaces", remedy=f"leave {name} out")


def own_model(name: str | None) -> str | None:
    """The model that is asked for; None, the default one, for a path or hub name, which is of the other system's configuration."""
    return None if name is None or "/" in name else name
