"""Typed access to the columns of a row: what a value may be written as, and what is refused.

A number may be written as a text; metadata may be anything and becomes a text. No Ray and no tokenizer here.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rayward.data.record import BadRow, RowRejected

Row = Mapping[str, Any]
FLOAT32_MAX = 3.4028234663852886e38
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LIKE_TURNS = re.compile(r"""\[?\s*\{\s*(['"])(role|content|from|value)\1\s*:""")
_WORDS = {"true": 1.0, "false": 0.0}


def required(row: Row, key: str) -> Any:
    """The value of a column.

    Raises:
        RowRejected: it is absent or null.
    """
    value = row.get(key)
    if value is None:
        raise RowRejected(BadRow.MISSING_FIELD, f"field {key!r} is {'null' if key in row else 'missing'}")
    return value


def as_text(value: Any, key: str) -> str:
    """The value as a text; rejected when it is none."""
    if not isinstance(value, str):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {kind_of(value)}; the rule is a text")
    return value


def as_number(value: Any, key: str) -> float:
    """The value, a number or the text of one, as a float that fp32 can hold (else infinite); rejected when it is no number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_shown(value)}; the rule is a number")
    try:
        number = float(value)
    except OverflowError as exc:
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is an integer too large for a float") from exc
    # The shards hold fp32: what does not fit is infinite there, and must be refused as such here.
    return number if math.isnan(number) or abs(number) <= FLOAT32_MAX else math.copysign(math.inf, number)


def as_rating(value: Any, key: str) -> float:
    """Like `as_number`; true and false are 1 and 0, also as words."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (number := _WORDS.get(value.strip().lower())) is not None:
        return number
    return as_number(value, key)


def as_list(value: Any, key: str) -> list[Any]:
    """The value as a list; rejected when it is none."""
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {kind_of(value)}; the rule is a list")
    return value


def as_object(value: Any, key: str) -> dict[str, Any]:
    """The value as an object; rejected when it is none."""
    if not isinstance(value, dict):
        raise RowRejected(BadRow.WRONG_TYPE, f"{key} is {kind_of(value)}; the rule is an object")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {"str": "a text", "list": "a list", "dict": "an object", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _shown(value: Any) -> str:
    return f"a text ({value[:40]!r})" if isinstance(value, str) else kind_of(value)


def missing(value: Any) -> bool:
    """Whether a column of numbers has no value here: null, or the empty text of a table without types."""
    return value is None or (isinstance(value, str) and not value.strip())


def optional(row: Row, key: str) -> float | None:
    """A number, or None where the column is absent or has no value."""
    return None if missing(row.get(key)) else as_number(row[key], key)


def as_name(value: Any) -> str:
    """Metadata as a text, whatever it is; empty where there is none.

    Whole numbers lose a decimal point that a table gave them (1.0 is "1"), the names of a list are joined, an object is its `name` or `id`.
    """
    if isinstance(value, str):
        return value
    if missing(value) or value in ([], {}) or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(as_name(each) for each in value)
    if isinstance(value, dict) and (named := [value[key] for key in ("name", "id") if isinstance(value.get(key), str) and value[key]]):
        return str(named[0])
    return json.dumps(value, sort_keys=True)


def parsed(value: Any) -> Any:
    """Turns that a table keeps as text, as JSON or as Python prints them, parsed; any other value as it is.

    Raises:
        RowRejected: a text looks like turns and cannot be parsed, so that it would be read as an answer.
    """
    if not (isinstance(value, str) and (text := value.strip()) and text[0] + text[-1] in ("[]", "{}")):
        return value
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if _LIKE_TURNS.match(text) is None:
            return value
        found = _printed(text)
    turns = found if isinstance(found, list) else [found]
    return found if turns and all(_is_turn(turn) for turn in turns) else value


def _printed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as exc:
        raise RowRejected(
            BadRow.WRONG_TYPE, f"the text {text[:40]!r} looks like messages and is neither their JSON nor what Python prints of them"
        ) from exc


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and (
        ("role" in value and ("content" in value or "tool_calls" in value)) or {"from", "value"} <= value.keys()
    )


def parsed_list(value: Any, key: str) -> list[Any]:
    """A list, or the JSON text of one; rejected when it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is a text that is no JSON: {exc}; the rule is a list") from exc
    return as_list(value, key)
