"""One set of rules: what the service refuses to score is what `prepare` refuses to train on."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from rayward.contract.conversation import ROLES, Message, RuleCode, broken_by_completion, broken_by_prompt, broken_by_role, broken_by_text
from rayward.data.formats.fields import SourceOptions
from rayward.data.formats.table import FORMATS
from rayward.data.record import BadRow, RowRejected, validate
from rayward.errors import RuleError
from rayward.wire.rules import Limits, parse_request

CASES: list[tuple[RuleCode, BadRow, list[tuple[str, str]], str]] = [
    ("unknown_role", BadRow.UNKNOWN_ROLE, [("user", "Why?"), ("critic", "x")], "Yes."),
    ("nul_byte", BadRow.BAD_TEXT, [("user", "Why\x00?")], "Yes."),
    ("nul_byte", BadRow.BAD_TEXT, [("user", "Why?")], "Yes\x00."),
    ("lone_surrogate", BadRow.BAD_TEXT, [("user", "Why?")], "\ud83d Yes."),
    ("empty_prompt", BadRow.EMPTY_PROMPT, [], "Yes."),
    ("empty_prompt", BadRow.EMPTY_PROMPT, [("system", "Be brief."), ("user", " \n")], "Yes."),
    ("prompt_end", BadRow.WRONG_TYPE, [("user", "Why?"), ("assistant", "Because.")], "Yes."),
    ("prompt_end", BadRow.WRONG_TYPE, [("user", "Why?"), ("system", "Answer.")], "Yes."),
    ("empty_completion", BadRow.EMPTY_COMPLETION, [("user", "Why?")], "\t "),
]


def prepare(row: dict[str, Any]) -> None:
    validate(FORMATS["trl"].adapt(row, SourceOptions("s", prompt_key="prompt")), ties="keep")


@pytest.mark.parametrize(("code", "reason", "turns", "completion"), CASES)
def test_a_conversation_that_is_refused_is_refused_everywhere(
    code: RuleCode, reason: BadRow, turns: list[tuple[str, str]], completion: str
) -> None:
    prompt = [Message(role=role, content=content) for role, content in turns]
    body = json.dumps({"items": [{"prompt": prompt, "completions": ["No.", completion]}]}).encode()
    with pytest.raises(RuleError) as refused:
        parse_request(body, Limits())
    assert (refused.value.code, refused.value.item) == (code, 0)
    with pytest.raises(RowRejected) as rejected:
        prepare({"prompt": prompt, "chosen": completion, "rejected": "No."})
    assert rejected.value.reason == reason
    # Of the item and the row each says where; the rule is in the same words.
    words = rejected.value.detail.rpartition(": ")[2]
    assert words.replace("completion 0", "completion 1") in str(refused.value)


def test_every_rule_is_tried() -> None:
    # The other two depend on the form that turns are given in: test_turns.py.
    assert {code for code, *_ in CASES} == set(get_args(RuleCode)) - {"completion_turns", "unsupported_message"}


def test_what_keeps_the_rules_is_not_broken() -> None:
    turns = [Message(role=role, content=f"{role} é 😀") for role in ("system", "user", "assistant", "tool")]
    assert broken_by_prompt(turns) is None
    assert broken_by_prompt([*turns[:1], Message(role="user", content="Why?")]) is None
    assert [broken_by_role(role) for role in ROLES] == [None] * len(ROLES)
    assert broken_by_text("tab\t, line\n, 😀") is None
    assert broken_by_completion(0, " x ") is None
