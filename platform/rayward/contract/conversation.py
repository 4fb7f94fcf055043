"""Turns of a conversation, and the rules that every text, prompt and completion keeps, wherever it comes from. Light."""

from __future__ import annotations

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates expect."""

    role: str
    content: str
