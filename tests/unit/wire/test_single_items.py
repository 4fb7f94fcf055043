"""One line is one item, whatever it holds."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rayward.contract.conversation import broken_by_text, strings_in
from rayward.wire.items import Asked, ItemError, ScoreItem
from rayward.wire.lines import INVALID, Given, parse_line
from rayward.wire.rules import Limits

LIMITS = Limits(max_body_bytes=2000, max_chars_per_text=500)
GOOD: dict[str, Any] = {"prompt": "Hi", "completions": ["Hello", "Hey"]}


def parse(value: object, asked: Asked = Asked()) -> Given:
    return parse_line(value if isinstance(value, bytes) else json.dumps(value).encode(), LIMITS, asked)


def item(value: object, asked: Asked = Asked()) -> ScoreItem:
    found = parse(value, asked).item
    assert isinstance(found, ScoreItem), found
    return found


def error(value: object, asked: Asked = Asked()) -> str:
    found = parse(value, asked).item
    assert isinstance(found, ItemError)
    assert found.code == INVALID
    return found.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a", "completions": ["b"]}, {"prompt": "c", "completions": ["d"]}', "invalid_json"),
        (b'{"prompt": "a", "completions": ["b"]} {"prompt": "c", "completions": ["d"]}', "invalid_json"),
        (b'], "items": [', "invalid_json"),
        (b'{"prompt": "a", "completions": ["b"]}], "items": [{"prompt": "x", "completions": ["y"]}', "invalid_json"),
        (b'{"prompt": "a", "completions": ["b"]}], "model": "m", "more": [1', "invalid_json"),
        (b'{"items": [{"prompt": "x", "completions": ["y"]}]}', "missing_field: prompt"),
        (b'{"prompt": "a", "completions": ["b"], "model": "m"}', "unknown_field: model"),
        (b'[{"prompt": "a", "completions": ["b"]}]', "wrong_type: the line is a JSON list"),
        (b'"{}"', "wrong_type: the line is a JSON text"),
        (b"null", "wrong_type: the line is a JSON null"),
        (b"{}", "missing_field: prompt"),
        (b'{"prompt": "a"}', "missing_field: completions"),
        (b'{"prompt": "a", "completions": []}', "empty_completions: completions is empty"),
        (b'{"prompt": "a", "completions": "b"}', "wrong_type: completions"),
        (b'{"prompt": "a", "completion": "b", "completions": ["c"]}', "unknown_field: completion and completions are both given"),
        (b'{"prompt": "a", "completions": ["b\xff"]}', "not one JSON object in UTF-8"),
        (b'{"prompt": "a", "completions": ["b\\ud800"]}', "lone_surrogate"),
        (b'{"prompt": "a", "completions": ["b\\u0000"]}', "nul_byte"),
        (b'{"prompt": "a", "completions": ["b"], "id": "\\ud800"}', "lone_surrogate: id"),
        (b'{"prompt": "a", "completions": ["b"], "id": {"a": 1}}', "wrong_type: id is a JSON object"),
        (b'{"prompt": "a", "completions": ["b"], "id": 1e999}', "wrong_type: id"),
        (b'{"prompt": "a", "completions": ["b"], "id": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "completions": ["b"], "\\ud800": 1}', "lone_surrogate"),
        (b'{"prompt": "a", "completions": ["b"], "n_critiques": 0}', "wrong_type: n_critiques"),
        (b'{"prompt": "a", "completions": ["b"], "n_critiques": 2}', "same_critiques"),
        (b'{"prompt": "a", "completions": ["b"], "temperature": 3}', "wrong_type: temperature"),
        (b'{"prompt": "a", "completions": ["b"], "normalise": "no"}', "wrong_type: normalise"),
        (b'{"prompt": "a", "completions": ["b"], "temprature": 1}', "unknown_field: temprature"),
        (b"[" * 1990, "nesting is too deep"),
        (b'{"id": ' + b"1" * 1900 + b"}", "missing_field"),
        (b'{"prompt": "' + b"a" * 2000 + b'"}', "body_too_large"),
        (b'{"prompt": "' + b"a" * 501 + b'", "completions": ["b"]}', "text_too_long"),
        ('{"prompt": "a", "completions": ["b"]}'.encode("utf-16"), "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_of_the_line_alone(line: bytes, says: str) -> None:
    message = error(line)
    assert says in message
    assert "item 0" not in message
    assert "items.0" not in message


def test_a_line_in_its_plainest_and_its_fullest_form() -> None:
    assert item(GOOD) == ScoreItem(({"role": "user", "content": "Hi"},), ("Hello", "Hey"))
    full = {
        "id": 7,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello"}],
        "weights": "w", "normalise": "centred", "n_critiques": 3, "temperature": 0.5,
    }  # fmt: skip
    found = parse(full)
    assert found.echo == {"id": 7}
    assert isinstance(found.item, ScoreItem)
    assert found.item.completions == ("Hello",)
    assert found.item.asked == Asked("w", "centred", 3, 0.5)


def test_a_byte_order_mark_and_space_are_no_part_of_the_line() -> None:
    assert item(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r") == item(GOOD)


@pytest.mark.parametrize("name", ["a", "", "über", 7, -1, 1.5, True, None, 10**30])
def test_the_id_comes_back_as_it_is_whether_the_item_is_good_or_not(name: Any) -> None:
    for rest in (GOOD, {"prompt": ""}):
        found = parse({**rest, "id": name})
        assert (found.echo["id"], type(found.echo["id"])) == (name, type(name))
    assert parse(GOOD).echo == {}


def test_a_line_goes_before_the_command_and_is_checked_with_it() -> None:
    command = Asked(weights="w", n_critiques=2, temperature=0.5)
    assert item(GOOD, command).asked == command
    assert item({**GOOD, "weights": "v"}, command).asked == Asked("v", "raw", 2, 0.5)
    assert item({**GOOD, "weights": None, "temperature": None}, command).asked == command
    assert "same_critiques" in error({**GOOD, "temperature": 0}, command)


def test_nothing_that_can_stand_in_a_line_raises_or_reaches_another() -> None:
    draw = random.Random(0)
    values = (GOOD, {**GOOD, "id": "ü\u2028", "temperature": 1.0}, {"prompt": [GOOD]})
    whole = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    pieces = [
        b'], "items": [', b"}, {", b"\xff", b"\\ud83d", b"\x00", b"\xef\xbb\xbf", b"NaN", b"1e999", b"[", b"{", b'"', b"\\", b",", b"null",
        b'"completion": "x",', b'"id": [],',
    ]  # fmt: skip
    alone = item(GOOD)
    for _ in range(20_000):
        line = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(line) + 1)
            match draw.randrange(4):
                case 0:
                    line[at:at] = draw.choice(pieces)
                case 1:
                    del line[at : at + draw.randint(1, 8)]
                case 2:
                    line[at : at + 1] = bytes([draw.randrange(256)])
                case _:
                    line += draw.choice(pieces) + draw.choice(whole)
        found = parse_line(bytes(line), LIMITS)
        if isinstance(found.item, ScoreItem):
            # Then the line alone is a JSON object, and what is scored stands in it.
            value = json.loads(line.decode("utf-8-sig"))
            assert found.item.completions == tuple(value.get("completions") or [value["completion"]])
            assert all(broken_by_text(text) is None for text in strings_in(found.item.completions))
        else:
            assert found.item.code == INVALID
        json.dumps(found.echo, allow_nan=False).encode()
    assert item(GOOD) == alone
