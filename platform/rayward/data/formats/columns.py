"""What a column's name and value say about it: whether leaving it out would change a row, or it is harmless.

A column is *present* in a row where its value is neither null nor empty. A present column that the adapter does not read is named in
the report; one whose name says that it is part of the row's text or judgement (`changes_meaning`) is an error until it is read by a
mapping or listed in `data.ignore`. No Ray and no tokenizer here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from rayward.data.record import NUMBER_COLUMNS

COMMON_COLUMNS = frozenset({"id", "source", "system", "system_prompt", "tools", "chat_template_kwargs", *NUMBER_COLUMNS})
"""Read from a row of any format: a name, where it came from, a system turn, what the template gets, and numbers such as `weight`."""

_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MEDIA = _words(
    """
    image images img imgs picture pictures photo photos pixel pixels audio audios speech waveform video videos frames
    multimodal
    """
)
"""No text model sees what they hold; a name like `image_url` is no metadata either."""

_TEXT = _words(
    """
    system sys preamble rubric rubrics
    developer prompt prompts instruction instructions input inputs question questions query queries history histories
    conversation conversations message messages dialog dialogs dialogue dialogues transcript turns context contexts passage
    passages document documents persona response responses answer answers completion completions candidate candidates output
    outputs generation generations reply replies prefix suffix
    """
)

_TEMPLATE = _words("tool tools function functions thinking kwargs")

_JUDGEMENT = _words(
    """
    grade grades graded rank ranks ranked ranking rankings preference preferences preferred label labels labelled labeled
    vote votes winner winners loser losers better worse best worst tie ties margin margins strength weight weights reward
    rewards likert verdict verdicts judgement judgements judgment judgments points stars thumbs thumb utility elo
    """
)
_SCORE = re.compile(
    r"scor(e|es|ed|ing)\d*|.+(?<!under)scores?|ratings?|rated?|(chosen|rejected|user|human|overall|avg|mean|quality)ratings?"
)

_FURTHER = re.compile(r"(chosen|rejected)[_ -]?\d+", re.IGNORECASE)
"""One more answer beside the two that are read."""

_HARMLESS_LAST = _words(
    """
    id ids uid uuid guid hash md5 sha sha1 sha256 index idx url urls uri link links lang language languages locale model
    models name names type types source sources count counts len length lengths num tokens date time timestamp version
    license licence split subset category categories kind kinds dataset author creator annotator annotators worker workers judge status
    file filename path meta metadata tag tags
    """
)
"""A name that ends so speaks about the word before it: `prompt_id`, `response_model`, `input_tokens`."""

_HARMLESS_FIRST = _words("num n count len length")


@lru_cache(maxsize=4096)
def changes_meaning(name: str) -> bool:
    """Whether a column of this name is part of the text or the judgement of a row, in any spelling (`chosen-rating`, `scoreChosen`)."""
    tokens = [token.lower() for token in _TOKEN.findall(name)]
    if any(token in _MEDIA for token in tokens):
        return True
    if is_metadata(name):
        return False
    if _FURTHER.fullmatch(name):
        return True
    return any(token in _TEXT or token in _TEMPLATE or token in _JUDGEMENT or _SCORE.fullmatch(token) for token in tokens)


@lru_cache(maxsize=4096)
def changes_text(name: str) -> bool:
    """Whether a column of this name is part of what a model would be shown, whatever is known of the judgement."""
    tokens = [token.lower() for token in _TOKEN.findall(name)]
    if any(token in _MEDIA for token in tokens):
        return True
    return not is_metadata(name) and any(token in _TEXT or token in _TEMPLATE for token in tokens)


def is_media(name: str) -> bool:
    """Whether the name is that of images, sounds or videos, which no model here reads."""
    return any(token.lower() in _MEDIA for token in _TOKEN.findall(name))


@lru_cache(maxsize=4096)
def is_metadata(name: str) -> bool:
    """Whether the name is one that speaks about a row and is not part of it: `id`, `language`, `chosen_model`, `num_turns`."""
    tokens = [token.lower() for token in _TOKEN.findall(name)]
    # `model_a` and `model_2` speak about models like `model` does.
    while len(tokens) > 1 and (tokens[-1].isdigit() or len(tokens[-1]) == 1):
        tokens.pop()
    if not tokens or any(token in _MEDIA for token in tokens):
        return False
    return tokens[-1] in _HARMLESS_LAST or (len(tokens) > 1 and tokens[0] in _HARMLESS_FIRST)


def _leaves(value: Any) -> Iterator[Any]:
    # No recursion: JSON may be nested deeper than what is left of the stack.
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, list | tuple):
            pending += current
        elif isinstance(current, dict):
            pending += current.values()
        else:
            yield current


def present(value: Any) -> bool:
    """Whether a value says anything: not null, and no empty text, list or object, nor a list of such."""
    return any(leaf is not None and not (isinstance(leaf, str) and not leaf.strip()) for leaf in _leaves(value))


def _holds_text(value: Any) -> bool:
    return any(isinstance(leaf, str) for leaf in _leaves(value))


def type_of(value: Any) -> str:
    """The type of a value in a word: text, number, boolean, list, object."""
    names = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", tuple: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def ignored(name: str, patterns: Collection[str]) -> bool:
    """Whether a name is one of `data.ignore`, which may hold wildcards."""
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Columns:
    """What becomes of the columns of one source.

    Attributes:
        consumed: read by the adapter.
        metadata: known to be harmless; not mentioned.
        ignore: names and wildcards of `data.ignore`.
        settings: columns that are read only where a setting is given, and its name; they are mentioned with it.
        texts_only: no judgement is wanted, so that a column that is one is not missed.
    """

    consumed: frozenset[str]
    metadata: frozenset[str] = frozenset()
    ignore: tuple[str, ...] = ()
    settings: Mapping[str, str] | None = None
    texts_only: bool = False

    def unused(self, row: Mapping[str, Any]) -> list[str]:
        """The present columns that nothing reads and that are to be mentioned."""
        return [
            name
            for name, value in row.items()
            if name not in self.consumed and name not in self.metadata and present(value) and not ignored(name, self.ignore)
        ]

    def missed(self, row: Mapping[str, Any]) -> list[str]:
        """Of the unused ones those without which the row would mean something else."""
        matters = changes_text if self.texts_only else changes_meaning
        return [name for name in self.unused(row) if name not in (self.settings or ()) and matters(name)]

    def other_texts(self, row: Mapping[str, Any]) -> list[str]:
        """Of the unused ones those that may hold the prompt: texts, turns or other values with a text inside, not named as metadata is."""
        return [name for name in self.unused(row) if _holds_text(row[name]) and not is_metadata(name)]


def described(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, int, Any]]:
    """Of each column its types, the number of rows where it is present, and the first such value; in the order of first sight."""
    types: dict[str, dict[str, None]] = {}
    counts: dict[str, int] = {}
    examples: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            types.setdefault(name, {})
            counts.setdefault(name, 0)
            if present(value):
                types[name].setdefault(type_of(value))
                counts[name] += 1
                examples.setdefault(name, value)
    return {name: (" or ".join(found) or "null", counts[name], examples.get(name)) for name, found in types.items()}


def names(columns: Iterable[str], limit: int = 500) -> str:
    """Names of columns for a message: printable, and not endless."""
    return ", ".join(sorted(str(name) for name in columns))[:limit].encode("utf-8", "backslashreplace").decode()
