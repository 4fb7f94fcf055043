"""The rules that a request must keep before anything is tokenized; every refusal names the item and the rule.

Pydantic and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from rayward.contract.conversation import (
    BrokenRule,
    Completion,
    Message,
    RuleBrokenError,
    broken_by_completion,
    broken_by_prompt,
    broken_by_role,
    broken_by_text,
    completion_of,
    parse_turn,
    strings_in,
)
from rayward.errors import RuleError
from rayward.wire.items import Asked, ScoreItem
from rayward.wire.native import ScoreRequest, WireItem, WireMessage

MAX_DEPTH = 64
"""Of JSON values inside an item."""

MAX_FIELDS = 64
"""Of a request, an item or a turn, known and unknown ones."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold."""

    max_items: int = 1024
    max_completions_per_item: int = 256
    max_chars_per_text: int = 200_000
    max_body_bytes: int = 32 * 1024 * 1024
    max_critiques: int = 16


def parse_request(body: bytes, limits: Limits) -> tuple[list[ScoreItem], str | None]:
    """Read a request body and apply every rule that needs no tokenizer.

    Returns:
        The items, and the model name asked for.

    Raises:
        RuleError: with the first rule that is broken, and the item.
    """
    if len(body) > limits.max_body_bytes:
        body_too_large(len(body), limits)
    # Valid UTF-8 can carry NUL and lone surrogates only as escapes, so other bodies need no walk.
    return check_request(decode(body), limits, escapes=has_escapes(body))


def has_escapes(body: bytes) -> bool:
    """Whether a JSON text may hold NUL or lone surrogates."""
    return b"\\u0000" in body or b"\\ud" in body.lower()


def check_request(raw: Any, limits: Limits, *, escapes: bool = True) -> tuple[list[ScoreItem], str | None]:
    """Apply every rule that needs no tokenizer to a decoded request.

    Args:
        escapes: whether a text may hold NUL or lone surrogates.

    Returns and raises: as `parse_request`.
    """
    items, request = checked(raw, limits, escapes=escapes)
    return items, request.model


def checked(raw: Any, limits: Limits, *, escapes: bool = True) -> tuple[list[ScoreItem], ScoreRequest]:
    """The items of a decoded request, and what else it says.

    Raises:
        RuleError: as `parse_request`.
    """
    _check_sizes(raw, limits)
    _check_fields(raw)
    if escapes:
        _check_characters(raw)
    try:
        request = ScoreRequest.model_validate(raw)
    except ValidationError as exc:
        _raise_schema_violation(exc)
    asked = request.asked
    _check_critiques(asked, limits)
    items = [_to_item(index, item, asked, limits, escapes=escapes) for index, item in enumerate(request.items)]
    return [replace(item, trace=True) for item in items] if request.trace else items, request


def body_too_large(num_bytes: int, limits: Limits) -> NoReturn:
    """Refuse a body by its size.

    Raises:
        RuleError: always.
    """
    raise RuleError(
        "body_too_large",
        f"the body has {num_bytes} bytes or more; the limit is {limits.max_body_bytes}",
        remedy="split the items over several requests",
    )


def decode(body: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        RuleError: `invalid_json`; also for NaN and Infinity, which JSON does not have.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_reject_constant)
    except RecursionError:
        problem = "the nesting is too deep"
    except ValueError as exc:  # UnicodeDecodeError, JSONDecodeError, and integers with thousands of digits
        problem = str(exc)
    raise RuleError("invalid_json", f"the body is not JSON in UTF-8: {problem}", remedy="send one JSON object in UTF-8")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_sizes(raw: Any, limits: Limits) -> None:
    # Before the schema: a schema error is reported per item, and there may be millions.
    items = raw.get("items") if isinstance(raw, dict) else None
    if not isinstance(items, list):
        return
    if not items:
        raise RuleError("empty_items", "items is empty; the rule is at least one item", remedy="send an item")
    if len(items) > limits.max_items:
        raise RuleError(
            "too_many_items", f"{len(items)} items; the limit is {limits.max_items}", remedy="split the items over several requests"
        )
    for index, item in enumerate(items):
        completions = item.get("completions") if isinstance(item, dict) else None
        if isinstance(completions, list) and len(completions) > limits.max_completions_per_item:
            raise RuleError(
                "too_many_completions",
                f"item {index}: {len(completions)} completions; the limit is {limits.max_completions_per_item}",
                remedy="repeat the prompt in several items",
                item=index,
            )


def _check_fields(raw: Any) -> None:
    # As above: a request, an item or a turn of a million fields would be as many errors.
    items = raw.get("items") if isinstance(raw, dict) else None
    objects = [raw, *(items if isinstance(items, list) else ())]
    for item in objects[1:]:
        if isinstance(item, dict):
            completions = item.get("completions")
            for turns in (item.get("prompt"), *(completions if isinstance(completions, list) else ())):
                objects += turns if isinstance(turns, list) else ()
    for value in objects:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise RuleError("unknown_field", f"an object has {len(value)} fields; none here has more than {MAX_FIELDS}", remedy=_FORM)


def _check_characters(raw: Any) -> None:
    items = raw.get("items") if isinstance(raw, dict) else None
    for index, item in enumerate(items if isinstance(items, list) else ()):
        for text in strings_in(item):
            _require(broken_by_text(text), f"item {index}", index)
    for text in strings_in({k: v for k, v in raw.items() if k != "items"} if isinstance(raw, dict) else raw):
        _require(broken_by_text(text), "the request", None)


_REMEDIES: Mapping[str, str] = {
    "unknown_role": "use one of these roles",
    "nul_byte": "remove it from the text",
    "lone_surrogate": "send a surrogate pair, or remove it",
    "empty_prompt": "send at least one turn with text",
    "prompt_end": "move the last assistant turn into completions, or mark it with prefix: true if they go on with it",
    "empty_completion": "send text, or leave it out",
    "completion_turns": "send a text, or turns that begin and end with the assistant's; move earlier turns into the prompt",
    "unsupported_message": "send texts and calls only",
}


def _require(broken: BrokenRule | None, where: str, item: int | None) -> None:
    if broken is not None:
        raise RuleError(broken.code, f"{where}: {broken.detail}", remedy=_REMEDIES[broken.code], item=item)


_FORM = (
    'the form is {"items": [{"prompt": str | messages, "completions": [str | messages, ...], "tools"?: [object, ...], '
    '"chat_template_kwargs"?: object}], "model"?: str, "version"?: str, "weights"?: str, '
    '"normalise"?: "raw" | "centred" | "standardised", '
    '"n_critiques"?: int >= 1, "temperature"?: 0 to 2, "deadline_ms"?: int >= 1, "trace"?: bool}; '
    "a message has role, content, tool_calls, tool_call_id, name, reasoning_content, prefix"
)
_SCHEMA_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


def _raise_schema_violation(exc: ValidationError) -> NoReturn:
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    loc = [part for part in first["loc"] if part not in ("text", "messages")]
    item = loc[1] if len(loc) > 1 and loc[0] == "items" and isinstance(loc[1], int) else None
    code = _SCHEMA_CODES.get(first["type"], "wrong_type")
    where = ".".join(str(part) for part in loc)[:200] or "the body"
    rule = "an object" if first["type"] in ("model_type", "model_attributes_type") else first["msg"]
    raise RuleError(
        code,
        f"{where}: {rule}" if rule == first["msg"] else f"{where}: Input should be {rule}",
        remedy=_FORM,
        item=item,
    )


def _to_item(index: int, item: WireItem, asked: Asked, limits: Limits, *, escapes: bool) -> ScoreItem:
    if not item.completions:
        raise RuleError(
            "empty_completions", f"item {index}: completions is empty; the rule is at least one", remedy="send a completion", item=index
        )
    prompt = _prompt_turns(index, item.prompt)
    completions = tuple(_completion(index, k, completion) for k, completion in enumerate(item.completions))
    parts: list[tuple[str, Any]] = [(f"turn {number} of the prompt", [turn]) for number, turn in enumerate(prompt)]
    parts += [(f"completion {k}", completion) for k, completion in enumerate(completions)]
    for what, value in parts:
        texts = value if isinstance(value, str) else [[text for name, text in turn.items() if name != "role"] for turn in value]
        _check_values(index, texts, what, limits, escapes=escapes)
    for what, value in (("tools", item.tools), ("chat_template_kwargs", item.chat_template_kwargs)):
        _check_values(index, value, what, limits, escapes=escapes)
    tools = None if item.tools is None else tuple(item.tools)
    return ScoreItem(prompt, completions, asked, tools=tools or None, chat_template_kwargs=item.chat_template_kwargs or None)


def _check_critiques(asked: Asked, limits: Limits) -> None:
    if asked.n_critiques > limits.max_critiques:
        raise RuleError(
            "too_many_critiques", f"n_critiques is {asked.n_critiques}; the limit is {limits.max_critiques}", remedy="ask for fewer"
        )
    if asked.n_critiques > 1 and asked.temperature == 0:
        raise RuleError(
            "same_critiques",
            f"n_critiques is {asked.n_critiques} and temperature 0, which writes the same critique every time",
            remedy="set temperature, for example to 0.5",
        )


def _prompt_turns(index: int, prompt: str | Sequence[WireMessage]) -> tuple[Message, ...]:
    turns = (
        (Message(role="user", content=prompt),)
        if isinstance(prompt, str)
        else tuple(_turn(index, turn, f"turn {number} of the prompt") for number, turn in enumerate(prompt))
    )
    _require(broken_by_prompt(turns), f"item {index}", index)
    return turns


def _completion(index: int, k: int, completion: str | Sequence[WireMessage]) -> Completion:
    if isinstance(completion, str):
        found: Completion = completion
    else:
        turns = [_turn(index, turn, f"turn {number} of completion {k}") for number, turn in enumerate(completion)]
        if not turns:
            _require(BrokenRule("completion_turns", f"completion {k} has no turn"), f"item {index}", index)
        found = completion_of(turns)
    _require(broken_by_completion(k, found), f"item {index}", index)
    return found


def _turn(index: int, message: WireMessage, where: str) -> Message:
    _require(broken_by_role(message.role), f"item {index}: {where}", index)
    given = {name: value for name in message.model_fields_set if (value := getattr(message, name)) is not None}
    code, problem = "wrong_type", ""
    if "content" not in given and not any(given.get(name) for name in _IN_PLACE_OF_CONTENT):
        code = "wrong_type" if "content" in message.model_fields_set else "missing_field"
        problem = f"content is {'null' if code == 'wrong_type' else 'missing'}; the rule is a text, unless the turn has calls or a thought"
    else:
        try:
            return parse_turn(given)
        except RuleBrokenError as exc:
            code, problem = exc.broken.code, exc.broken.detail
        except TypeError as exc:
            problem = str(exc)
    raise RuleError(
        code,
        f"item {index}: {where}: {problem}",
        remedy=_REMEDIES.get(code, _FORM),
        item=index,
    )


_IN_PLACE_OF_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def _check_values(index: int, value: Any, what: str, limits: Limits, *, escapes: bool) -> None:
    # Of a turn, a completion, or what else the template is given: all texts together, however deep they stand.
    num_chars, pending = 0, [(value, 0)]
    while pending:
        current, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise RuleError("wrong_type", f"item {index}: {what} is nested deeper than {MAX_DEPTH}", remedy="flatten it", item=index)
        if isinstance(current, str):
            num_chars += len(current)
            if escapes:
                _require(broken_by_text(current), f"item {index}: {what}", index)
        elif isinstance(current, Mapping):
            pending += [(each, depth + 1) for pair in current.items() for each in pair]
        elif isinstance(current, list | tuple):
            pending += [(each, depth + 1) for each in current]
    if num_chars > limits.max_chars_per_text:
        raise RuleError(
            "text_too_long",
            f"item {index}: {what} has {num_chars} characters in all its texts; the limit is {limits.max_chars_per_text}",
            remedy="shorten it; the model's own token limit is lower still",
            item=index,
        )
