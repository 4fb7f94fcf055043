"""Rendered text to token ids, many texts in one call, and what they begin with in common only once.

A tokenizer cuts a text at its control tokens before it looks at anything else. So what stands up to the last control token of a prompt can
be tokenized apart from what follows: once for all completions of the prompt, and without the offsets that only the rest is asked for.
Tokenizers for which that is not so (checked once, on the template's own control tokens) get every text as a whole.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rayward.contract.control import ControlTokens
from rayward.contract.conversation import NO_INPUTS, Message
from rayward.contract.rendering import Rendered, common_length
from rayward.contract.template import ChatTemplate
from rayward.errors import ContractError

if TYPE_CHECKING:
    import tokenizers

HEADS_KEPT = 4
BEFORES_KEPT = 1024
_PROBES = ("x", " x", "\nx", "Hello there.", "x\n\n", "12 é")


@dataclass(frozen=True)
class Head:
    """What texts begin with in common: it ends with a control token of the prompt, or is empty.

    Attributes:
        num_chars: of the text that was tokenized.
    """

    ids: list[int]
    num_chars: int

    @cached_property
    def key(self) -> bytes:
        """Hash of the ids."""
        return hashlib.blake2b(array("q", self.ids).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered text as token ids.

    Attributes:
        head: shared with the other texts that begin so.
        tail: the rest, with offsets where they were asked for.
        start: the first token of what was written last.
    """

    head: Head
    tail: tokenizers.Encoding
    start: int

    def __len__(self) -> int:
        return len(self.head.ids) + len(self.tail)

    @property
    def ids(self) -> list[int]:
        """All of them, in a new list: many texts of one long prompt are short as long as nobody asks."""
        return [*self.head.ids, *self.tail.ids]

    def before(self, places: Sequence[int]) -> list[int]:
        """For each place after the head, the last token that begins before it."""
        begins = [begin for begin, _ in self.tail.offsets]
        return [len(self.head.ids) + bisect_right(begins, place - self.head.num_chars - 1) - 1 for place in places]


class TextTokenizer:
    """Rendered texts to ids.

    Args:
        backend: the tokenizer.
        control: its control tokens.
        template: what writes the texts.
        end_token: that of the contract.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: ControlTokens, template: ChatTemplate, end_token: str) -> None:
        self._backend = backend
        self._control = control
        self._template = template
        self._end = end_token
        self._befores: dict[tuple[bool, str], list[int]] = {}
        self._known: dict[bool, dict[str, Head]] = {False: {}, True: {}}
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False

    def tokenize(self, rendered: Sequence[Rendered], *, offsets: bool = False) -> list[Tokens]:
        """The tokens of every text.

        Args:
            offsets: whether places in the text will be asked for.
        """
        found: dict[int, Tokens] = {}
        for literal in (False, True):
            chosen = [index for index, each in enumerate(rendered) if each.literal == literal]
            if chosen:
                found.update(zip(chosen, self._alike([rendered[index] for index in chosen], literal, offsets), strict=True))
        return [found[index] for index in range(len(rendered))]

    def _alike(self, rendered: Sequence[Rendered], literal: bool, offsets: bool) -> list[Tokens]:
        backend = self._control.renamed if literal else self._backend
        read = self._control.for_tokenizer if literal else str
        cuts = [self._control.last_end(each.text[: each.prompt_end]) if self._cuts_exactly else 0 for each in rendered]
        begun = [each.text[:cut] for each, cut in zip(rendered, cuts, strict=True)]
        known = self._known[literal]
        heads = {text: known[text] for text in dict.fromkeys(begun) if text in known}
        new = [text for text in dict.fromkeys(begun) if text not in heads]
        texts = [read(text) for text in new]
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        heads |= {text: Head(each.ids, len(as_read)) for text, as_read, each in zip(new, texts, found, strict=True)}
        # The last ones are often those of the next calls: a long prompt whose completions do not fit into one, and what is left of it.
        latest = {**known, begun[-1]: heads[begun[-1]]}
        self._known[literal] = dict(list(latest.items())[-HEADS_KEPT:])
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        tails = encode([read(each.text[cut:]) for each, cut in zip(rendered, cuts, strict=True)], add_special_tokens=False)
        starts = [self._before(read(each.text[cut : each.start]), literal=literal) for each, cut in zip(rendered, cuts, strict=True)]
        return [
            Tokens(heads[text], tail, len(heads[text].ids) + common_length(tail.ids, before))
            for text, tail, before in zip(begun, tails, starts, strict=True)
        ]

    def beginning(self, rendered: Rendered, end: int) -> list[int]:
        """The ids of a text up to the end of one of its control tokens."""
        backend = self._control.renamed if rendered.literal else self._backend
        text = self._control.for_tokenizer(rendered.text[:end]) if rendered.literal else rendered.text[:end]
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _before(self, text: str, *, literal: bool) -> list[int]:
        # What stands before the completion, as it is tokenized where the completion is empty: a token over the border is the completion's.
        if (literal, text) not in self._befores:
            if len(self._befores) >= BEFORES_KEPT:
                self._befores.clear()
            backend = self._control.renamed if literal else self._backend
            end = self._control.for_tokenizer(self._end) if literal else self._end
            self._befores[literal, text] = backend.encode_batch_fast([text + end], add_special_tokens=False)[0].ids[:-1]
        return self._befores[literal, text]

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
