"""Turns of a conversation, and the rules that every text, prompt and completion keeps, wherever it comes from. Light.

Each rule is a function that returns what is broken, or None. Who asks decides what a broken rule is: prepare quarantines the row, the
service refuses the item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates expect."""

    role: str
    content: str


RuleCode = Literal["unknown_role", "nul_byte", "lone_surrogate", "empty_prompt", "prompt_end", "empty_completion"]


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """What a conversation does not keep.

    Attributes:
        code: the rule.
        detail: what is wrong, in words.
    """

    code: RuleCode
    detail: str


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
    """A prompt has known roles and a text besides the system's, and ends where an assistant answers."""
    if not turns:
        return BrokenRule("empty_prompt", "the prompt has no turn")
    for turn in turns:
        if (broken := broken_by_role(turn["role"])) is not None:
            return broken
    if not any(turn["content"].strip() for turn in turns if turn["role"] != "system"):
        return BrokenRule("empty_prompt", "the prompt holds no text")
    # A completion is an answer: templates print two assistant turns in a row in ways nobody trained on.
    last = turns[-1]["role"]
    if last not in ("user", "tool"):
        return BrokenRule("prompt_end", f"the prompt ends with a turn of the {last}; the rule is a user or tool turn")
    return None


def broken_by_completion(index: int, text: str) -> BrokenRule | None:
    """A completion has a text."""
    return None if text.strip() else BrokenRule("empty_completion", f"completion {index} is empty")
