"""What makes two rows the same: the token ids of prompt and completions, or their texts but for case, spaces and punctuation. Pure."""

from __future__ import annotations

import hashlib
import re
import string
import sys
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from rayward.contract.encoder import Encoding
from rayward.data.record import Comparison, dump_record

OPERATORS = "-*/%.,"
"""Punctuation that tells `3-2` from `3/2` and `3.5` from `35`: kept before a digit."""
_LONE = re.compile(r"[-*/%](?! ?\d)|[.,](?!\d)")
_BEFORE_DIGIT = re.compile(r"[-*/%.,] ?\d")
_NO_OPERATORS = str.maketrans(dict.fromkeys(OPERATORS, " "))
_APART = str.maketrans({operator: f" {operator} " for operator in OPERATORS})
_ASCII_SYMBOLS = "$+<=>^`|~"
_CONTROL = {*map(chr, range(32)), "\x7f"}
_ASCII_SPACES = str.maketrans(dict.fromkeys(({*string.punctuation} | _CONTROL) - {*_ASCII_SYMBOLS, *OPERATORS}, " "))
KEY_BYTES = 16


@lru_cache(maxsize=1)
def _spaces() -> dict[int, str]:
    # Punctuation and white space become spaces; a symbol is a word of its own.
    table: dict[int, str] = {}
    for code in range(sys.maxunicode + 1):
        char, category = chr(code), unicodedata.category(chr(code))
        if category[0] == "S":
            table[code] = f" {char} "
        elif (category[0] in "PZ" or category in ("Cc", "Cf")) and char not in OPERATORS:
            table[code] = " "
    return table


def _words(text: str) -> str:
    # ASCII needs no compatibility form and is most of the data; one character for another is the quick way through it.
    if not text.isascii():
        return unicodedata.normalize("NFKC", text).casefold().translate(_spaces())
    plain = text.lower().translate(_ASCII_SPACES)
    for symbol in _ASCII_SYMBOLS:
        if symbol in plain:
            plain = plain.replace(symbol, f" {symbol} ")
    return plain


def normalised(text: str) -> str:
    """The text without case, punctuation and repeated spaces, in compatibility form; of a text of punctuation alone the text itself."""
    plain = _words(text)
    if _BEFORE_DIGIT.search(plain) is None:  # mostly, and quicker to see than the place of each operator
        return " ".join(plain.translate(_NO_OPERATORS).split()) or text
    return " ".join(_LONE.sub(" ", plain).translate(_APART).split()) or text


@dataclass(frozen=True, slots=True)
class Identity:
    """Keys of a comparison, each a hash of 16 bytes.

    Attributes:
        near_prompt: equal for prompts of equal ids, and for prompts that differ in case, spaces and punctuation only.
        content: of the prompt's ids and the set of the completions' ids: equal keys are duplicates or contradictions.
        near_content: as `near_prompt`, of prompt and completions; equal wherever `content` is.
        judgement: of the judgement with completions in the order of their keys.
        record: of everything that the record says.
        completions: of each completion.
    """

    near_prompt: bytes
    content: bytes
    near_content: bytes
    judgement: bytes
    record: bytes
    completions: tuple[str, ...]


def identify(comparison: Comparison, encodings: Sequence[Encoding], texts: str, *, unknown_id: int | None = None) -> Identity:
    """The keys of a comparison.

    Args:
        encodings: of each completion, with no turn gone and no critique.
        texts: all of its texts.
        unknown_id: the token that different characters may become.
    """
    prompt = encodings[0].prompt_key
    completions = tuple(_hash(prompt.encode(), array("i", encoding.ids).tobytes()).hex() for encoding in encodings)
    near_key = near_prompt_key(encodings[0], unknown_id=unknown_id)
    near = sorted(
        key if unknown_id is not None and unknown_id in encoding.ids else normalised(encoding.rest_text)
        for key, encoding in zip(completions, encodings, strict=True)
    )
    keyed = replace(comparison, completions=completions)
    return Identity(
        near_key,
        _hash(*(key.encode() for key in sorted(completions))),
        _hash(near_key, *(text.encode("utf-8", "surrogatepass") for text in near)),
        bytes.fromhex(keyed.judgement_key()),
        _hash(texts.encode(), dump_record(replace(comparison, prompt=(), completions=(), critiques=None)).encode()),
        completions,
    )


def near_prompt_key(encoding: Encoding, *, unknown_id: int | None = None) -> bytes:
    """`Identity.near_prompt` of a conversation of the prompt."""
    # Where characters became an unknown token, texts tell apart what the ids do not.
    unclear = unknown_id is not None and unknown_id in encoding.ids[: encoding.text_start]
    return _hash((encoding.prompt_key if unclear else normalised(encoding.prompt_text)).encode("utf-8", "surrogatepass"))


def _hash(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()
