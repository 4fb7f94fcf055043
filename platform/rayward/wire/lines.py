"""One item on its own, as `rayward score` reads it: a JSON line, or the columns of a row. Pydantic and the standard library only.

    {"prompt": str | messages, "completions": [str | messages, ...] | "completion": str | messages, "id"?: scalar,
     "weights"?, "normalise"?, "n_critiques"?, "temperature"?}

Whatever is wrong with it is an error of this item. What it asks of the model goes before what is asked of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rayward.contract.conversation import broken_by_text
from rayward.errors import RuleError
from rayward.wire.items import Asked, ItemError, ScoreItem
from rayward.wire.native import Options, WireItem
from rayward.wire.rules import Limits, check_request, has_escapes

INVALID = "invalid_item"
"""Code of an item that breaks a rule before anything is computed; the message begins with the rule."""

BOM = b"\xef\xbb\xbf"
OPTIONS = frozenset(Options.model_fields) - {"model", "version", "deadline_ms"}
FIELDS = frozenset(WireItem.model_fields) | {"completion", "id"} | OPTIONS
"""Names that mean something in an item."""

MAX_ID_CHARS = 10_000
_FORM = 'the form is {"prompt": str | messages, "completions": [str | messages, ...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True, slots=True)
class Given:
    """What was given for one item.

    Attributes:
        item: what to score, or why it cannot be.
        echo: its `id`, if it has one, to stand in the result.
    """

    item: ScoreItem | ItemError
    echo: Mapping[str, Any] = field(default_factory=dict)


def parse_line(line: bytes, limits: Limits, asked: Asked = Asked()) -> Given:
    """One line as one item; never raises, whatever the line is.

    Args:
        line: bytes of one JSON object; a byte order mark before it is passed over.
        asked: what the item does not ask for itself.
    """
    if len(line) > limits.max_body_bytes:
        return Given(invalid("body_too_large", f"the line has {len(line)} bytes or more; the limit is {limits.max_body_bytes}"))
    try:
        value = json.loads(line.removeprefix(BOM).decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        return Given(invalid("invalid_json", "the nesting is too deep"))
    except ValueError as exc:  # UnicodeDecodeError, JSONDecodeError, and integers with thousands of digits
        return Given(invalid("invalid_json", f"the line is not one JSON object in UTF-8: {exc}"))
    if not isinstance(value, dict):
        return Given(invalid("wrong_type", f"the line is a JSON {_kind(value)}; the rule is an object; {_FORM}"))
    return item_of(value, limits, asked, escapes=has_escapes(line))


def item_of(value: Mapping[str, Any], limits: Limits, asked: Asked = Asked(), *, escapes: bool = True) -> Given:
    """A decoded object as one item, by the rules of the wire; never raises.

    Args:
        escapes: whether a text may hold NUL or lone surrogates.
    """
    echo: dict[str, Any] = {}
    try:
        if "id" in value:
            echo["id"] = _checked_id(value["id"])
        given = {name: content for name, content in value.items() if name != "id"}
        # A column that a table has for other rows is null in this one.
        options = {name: content for name in OPTIONS if (content := given.pop(name, None)) is not None}
        if given.get("completion") is not None:
            if given.get("completions") is not None:
                raise RuleError("unknown_field", "completion and completions are both given", remedy="give one of them")
            given["completions"] = [given["completion"]]
        given.pop("completion", None)
        (item,), _ = check_request({**asked.given(), **options, "items": [given]}, limits, escapes=escapes)
    except RuleError as exc:
        return Given(invalid(exc.code, _of_one(exc.problem)), echo)
    return Given(item, echo)


def invalid(rule: str, problem: str) -> ItemError:
    """The error of an item that breaks a rule."""
    return ItemError(INVALID, f"{rule}: {problem}")


def _checked_id(value: Any) -> Any:
    if not (value is None or isinstance(value, str | int | float | bool)):
        raise RuleError("wrong_type", f"id is a JSON {_kind(value)}; the rule is a text, number, boolean or null", remedy="correct it")
    if isinstance(value, float) and not math.isfinite(value):
        raise RuleError("wrong_type", "id is a number beyond the range of numbers", remedy="write it as a text")
    if isinstance(value, str):
        if len(value) > MAX_ID_CHARS:
            raise RuleError("text_too_long", f"id has {len(value)} characters; the limit is {MAX_ID_CHARS}", remedy="shorten it")
        if (broken := broken_by_text(value)) is not None:
            raise RuleError(broken.code, f"id: {broken.detail}", remedy="remove it from the id")
    return value


def _of_one(problem: str) -> str:
    # The rules count items; here there is one.
    for prefix in ("item 0: ", "items.0.", "items.0: "):
        if problem.startswith(prefix):
            return problem.removeprefix(prefix)
    return problem


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
