"""Rendered text to token ids, many texts in one call, and what they begin with in common only once.

A tokenizer cuts a text at its control tokens before it looks at anything else. So what stands up to the last control token of a prompt can
be tokenized apart from what follows: once for all completions of the prompt, and without the offsets that only the rest is asked for.
Tokenizers for which that is not so (checked once, on the template's own control tokens) get every text as a whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rayward.contract.control import ControlTokens
from rayward.contract.conversation import NO_INPUTS, Message
from rayward.contract.rendering import Rendered
from rayward.contract.template import ChatTemplate
from rayward.errors import ContractError

if TYPE_CHECKING:
    import tokenizers

_PROBES = ("x", " x", "\nx", "Hello there.", "x\n\n", "12 é")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered text as token ids.

    Attributes:
        ids: all of them.
        num_head: how many belong to the head, which ends with a control token of the prompt; 0 without a head.
        head_chars: where the head ends in the text that was tokenized.
        tail: the rest, with offsets.
    """

    ids: list[int]
    num_head: int
    head_chars: int
    tail: tokenizers.Encoding

    def at(self, place: int) -> int | None:
        """The token of a character that is not in the head; None where it belongs to none."""
        index = self.tail.char_to_token(place - self.head_chars)
        return None if index is None else self.num_head + int(index)

    def before(self, places: Sequence[int]) -> list[int]:
        """For each place after the head, the last token that begins before it."""
        begins = [begin for begin, _ in self.tail.offsets]
        return [self.num_head + bisect_right(begins, place - self.head_chars - 1) - 1 for place in places]


class TextTokenizer:
    """Rendered texts to ids.

    Args:
        backend: the tokenizer.
        control: its control tokens.
        template: what writes the texts.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: ControlTokens, template: ChatTemplate) -> None:
        self._backend = backend
        self._control = control
        self._template = template
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """The tokens of every text."""
        found: dict[int, Tokens] = {}
        for literal in (False, True):
            chosen = [index for index, each in enumerate(rendered) if each.literal == literal]
            if chosen:
                found.update(zip(chosen, self._alike([rendered[index] for index in chosen], literal=literal), strict=True))
        return [found[index] for index in range(len(rendered))]

    def _alike(self, rendered: Sequence[Rendered], *, literal: bool) -> list[Tokens]:
        backend = self._control.renamed if literal else self._backend
        ends = [self._control.last_end(each.text[: each.prompt_end]) if self._cuts_exactly else 0 for each in rendered]
        heads, tails = ([each.text[:end], each.text[end:]] for each, end in zip(rendered, ends, strict=True)), []
        places: dict[str, int] = {}
        of_head: list[int] = []
        for head, tail in heads:
            of_head.append(places.setdefault(head, len(places)))
            tails.append(tail)
        read = self._control.for_tokenizer if literal else str
        texts = [read(head) for head in places]
        head_ids = [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = backend.encode_batch([read(tail) for tail in tails], add_special_tokens=False)
        return [
            Tokens([*head_ids[place], *tail.ids], len(head_ids[place]), len(texts[place]), tail)
            for place, tail in zip(of_head, encoded, strict=True)
        ]

    @cached_property
    def _cuts_exactly(self) -> bool:
        for content in _PROBES:
            turns = [Message(role=role, content=content) for role in ("user", "assistant", "user", "assistant")]
            try:
                text = self._template.render(turns, NO_INPUTS)
            except ContractError:
                return False
            whole = self._ids(text)
            if any(self._ids(text[:end]) + self._ids(text[end:]) != whole for end in self._control.ends(text)):
                return False
        return True

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids
