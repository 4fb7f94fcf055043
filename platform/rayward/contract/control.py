"""The text of a message can never become a control token: what a template writes and what people write are told apart.

Before a conversation is rendered, every control token inside its own texts is replaced by a character that stands for it; the template
then writes its control tokens around them. For the ids, a copy of the tokenizer knows the template's control tokens under names that no
text can hold, and the characters become the original texts again: plain text, tokenized where it stands, in one call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rayward.contract.conversation import strings_in
from rayward.errors import ContractError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STAND_IN, _NAME = 0xF0000, 0x100000
_NUM_STAND_INS = 0xFFFE
_BETWEEN = "\u2063"  # invisible, and in no control token
_FOREIGN = re.compile(f"[{chr(_STAND_IN)}-{chr(_STAND_IN + _NUM_STAND_INS - 1)}{chr(_NAME)}-{chr(_NAME + _NUM_STAND_INS - 1)}]")


class ControlTokens:
    """The control tokens of a tokenizer and template.

    Args:
        backend: the tokenizer.
        texts: the control tokens: those that are special, and those that the template writes around user and system turns.
        always: whether every text is tokenized under other names, not only one that holds a control token.
    """

    def __init__(self, backend: Tokenizer, texts: Iterable[str], *, always: bool = False) -> None:
        self._backend = backend
        self.always = always
        # The longest first, as the tokenizer takes them.
        self.texts = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))[:_NUM_STAND_INS]
        self._stand_ins = {text: chr(_STAND_IN + index) for index, text in enumerate(self.texts)}
        self._pattern = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None
        self._renamed: Tokenizer | None = None

    def __contains__(self, text: str) -> bool:
        return self._pattern is not None and self._pattern.search(text) is not None

    def first_in(self, text: str) -> str | None:
        """The control token that stands first in a text, if any."""
        found = self._pattern.search(text) if self._pattern else None
        return found[0] if found else None

    def begins(self, text: str) -> str | None:
        """The control token that a text begins with, white space aside."""
        found = self._pattern.match(text.lstrip()) if self._pattern else None
        return found[0] if found else None

    def ends(self, text: str) -> list[int]:
        """Where the control tokens of a text end."""
        return [found.end() for found in self._pattern.finditer(text)] if self._pattern else []

    def last_end(self, text: str) -> int:
        """Where the last control token of a text ends; 0 without any."""
        return max(self.ends(text), default=0)

    def stand_in(self, value: Any) -> Any:
        """JSON values with every control token in their texts replaced; the same object where there is none.

        Raises:
            ContractError: a text holds one of the characters that stand for control tokens.
        """
        texts = "\0".join(strings_in(value))
        if self._pattern is None or not (self._pattern.search(texts) or (self.always and _FOREIGN.search(texts))):
            return value
        return self._replaced(value)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            self.refuse_stand_ins(value)
            assert self._pattern is not None
            return self._pattern.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            return {self._replaced(key): self._replaced(entry) for key, entry in value.items()}
        return [self._replaced(entry) for entry in value] if isinstance(value, list | tuple) else value

    @staticmethod
    def refuse_stand_ins(text: str) -> None:
        """Refuse a text that holds the characters themselves.

        Raises:
            ContractError: it does.
        """
        if _FOREIGN.search(text):
            raise ContractError(
                "a text holds characters of a private-use plane of Unicode, which stand for control tokens here",
                remedy="remove them from the text",
            )

    def count(self, text: str) -> int:
        """How many control tokens stand in a text."""
        return sum(1 for _ in self._pattern.finditer(text)) if self._pattern else 0

    def apart(self, value: Any) -> Any:
        """JSON values whose texts can make no control token with what stands beside them; the same object where none could."""
        return self._apart(value) if any(self._is_piece(text) for text in strings_in(value)) else value

    def _apart(self, value: Any) -> Any:
        if isinstance(value, str):
            return f"{_BETWEEN}{value}{_BETWEEN}" if self._is_piece(value) else value
        if isinstance(value, Mapping):
            return {key: self._apart(entry) for key, entry in value.items()}
        return [self._apart(entry) for entry in value] if isinstance(value, list | tuple) else value

    def _is_piece(self, text: str) -> bool:
        # Whether it ends as a control token begins, or begins as one ends.
        firsts, lasts, longest = self._pieces
        if self._first_chars.isdisjoint(text[-longest:]) and self._last_chars.isdisjoint(text[:longest]):
            return False
        sizes = range(1, min(len(text), longest) + 1)
        return any(text[-size:] in firsts or text[:size] in lasts for size in sizes)

    @cached_property
    def _first_chars(self) -> frozenset[str]:
        return frozenset(text[0] for text in self.texts)

    @cached_property
    def _last_chars(self) -> frozenset[str]:
        return frozenset(text[-1] for text in self.texts)

    @cached_property
    def _pieces(self) -> tuple[frozenset[str], frozenset[str], int]:
        firsts = frozenset(text[:size] for text in self.texts for size in range(1, len(text)))
        lasts = frozenset(text[size:] for text in self.texts for size in range(1, len(text)))
        return firsts, lasts, max((len(text) for text in self.texts), default=1) - 1

    def restored(self, text: str) -> str:
        """A rendered text with its own control tokens again, for people."""
        return _FOREIGN.sub(lambda found: self.texts[ord(found[0]) - _STAND_IN], text) if _FOREIGN.search(text) else text

    def for_tokenizer(self, text: str) -> str:
        """What the renamed tokenizer gets for a rendered text."""
        assert self._pattern is not None
        named = self._pattern.sub(lambda found: self._name(self.texts.index(found[0])), text)
        return re.sub(
            f"[{chr(_STAND_IN)}-{chr(_STAND_IN + len(self.texts) - 1)}]", lambda found: self.texts[ord(found[0]) - _STAND_IN], named
        )

    @staticmethod
    def _name(index: int) -> str:
        return chr(_NAME + index)

    @property
    def renamed(self) -> Tokenizer:
        """The tokenizer that knows control tokens under names which no text holds.

        Raises:
            ContractError: this kind of tokenizer cannot tell them apart.
        """
        if self._renamed is None:
            self._renamed = _renamed(self._backend, {text: self._name(index) for index, text in enumerate(self.texts)})
        return self._renamed


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    try:
        renamed = Tokenizer.from_str(json.dumps(state))
    # Broad on purpose: the library raises plain exceptions for what it cannot read.
    except Exception as exc:
        raise _cannot(str(exc)) from exc
    wrong = [text for text, name in names.items() if renamed.token_to_id(name) != backend.token_to_id(text)]
    if wrong:
        raise _cannot(f"{wrong[0]!r} would get another id")
    renamed.no_padding()
    renamed.no_truncation()
    return renamed


def _cannot(why: str) -> ContractError:
    return ContractError(
        f"the text of a message holds a control token of the model, and this kind of tokenizer cannot read it as plain text: {why}",
        remedy="remove control tokens from the texts of messages",
    )
