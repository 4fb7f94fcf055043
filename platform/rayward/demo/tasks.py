"""The kinds of task of the generated world: how a question is drawn, solved from its text, and how an answer reads.

Closed vocabularies throughout. Wrong answers are right answers to other questions, of the same kind or of another, so that an
answer by itself does not say whether it is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

Draw = Callable[[random.Random], tuple[list[str], tuple[str, ...]]]
Solve = Callable[[Sequence[str]], tuple[str, ...] | None]
_SENTENCES = ("The answer is {a}.", "It is {a}.", "I say {a}.")


def _never(_answer: str, _right: str) -> bool:
    return False


def _is_neighbour(answer: str, right: str) -> bool:
    return abs(int(answer) - int(right)) == 1


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
        draw: texts of the turns (user and assistant alternate, the last is the user's) and some wrong answers.
        solve: the accepted answers for such texts, or None when they are of another kind; turns before the task's own are ignored.
        pattern: regular expression of one answer in this kind's normal form.
        phrases: sentences that stand for an answer without containing it.
        near: whether a wrong answer is a near miss of the right one.
        keep_case: whether capitals matter.
    """

    draw: Draw
    solve: Solve
    pattern: str
    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    near: Callable[[str, str], bool] = _never
    keep_case: bool = False

    def sentences(self, answer: str) -> tuple[str, ...]:
        """Templates (slot `a`) of a sentence that gives this answer."""
        return self.phrases.get(answer, _SENTENCES)

    def match(self, text: str) -> tuple[str | None, bool]:
        """The answer that a text consists of (None: it does not), and whether it is a sentence rather than a bare answer."""
        flags = 0 if self.keep_case else re.IGNORECASE
        bare = re.fullmatch(rf"({self.pattern})[.!]?", text, flags)
        if bare:
            return self._normal(bare[1]), False
        for answer, phrases in self.phrases.items():
            if text.lower() in (phrase.lower() for phrase in phrases):
                return answer, True
        for template in () if self.phrases else _SENTENCES:
            before, after = template.split("{a}")
            found = re.fullmatch(rf"(?i:{re.escape(before)})({self.pattern})[.!]?", text, flags) if after == "." else None
            if found:
                return self._normal(found[1]), True
        return None, False

    def find(self, text: str) -> set[str]:
        """All answers that occur anywhere in a text."""
        flags = 0 if self.keep_case else re.IGNORECASE
        return {self._normal(found) for found in re.findall(rf"(?<!\w)(?:{self.pattern})(?!\w)", text[:2000], flags)}

    def _normal(self, answer: str) -> str:
        return answer if self.keep_case else answer.lower()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_OPPOSITES = "hot cold,big small,fast slow,old young,wet dry,happy sad"
_ANTONYMS = {a: b for pair in _OPPOSITES.split(",") for a, b in (pair.split(), pair.split()[::-1])}

_GROUPS = {
    "animal": _words("horse bear wolf"),
    "fruit": _words("apple pear plum"),
    "tool": _words("hammer saw drill"),
    "metal": _words("iron gold tin"),
}

_COLORED = {
    "red": _words("tomato blood ruby"),
    "yellow": _words("banana sun corn"),
    "green": _words("grass frog pea"),
    "white": _words("snow salt swan"),
}

_SUMS = {f"{a} + {b}": str(a + b) for a in range(1, 6) for b in range(1, 6) if a + b < 10} | {
    f"{a} - {b}": str(a - b) for a in range(1, 7) for b in range(1, a + 1)
}

_GOOD_DEEDS = ("bake bread", "plant trees", "write poems", "fix bikes", "cook rice", "paint walls", "read maps", "sing songs")
_BAD_DEEDS = ("steal cars", "rob banks", "forge letters", "poison dogs", "spread lies", "start fires", "hide weapons", "sell drugs")

_TRANSLATIONS = {
    "in English": {word: word for word in _words("dog cat tree house milk")},
    "in German": dict(zip(_words("dog cat tree house milk"), _words("Hund Katze Baum Haus Milch"), strict=True)),
    "in Spanish": dict(zip(_words("dog cat tree house milk"), _words("perro gato árbol casa leche"), strict=True)),
}

_FORMAT_WORDS = _words("fox lion duck bird fish")

_FORMATS = {
    "in capitals": {word: word.upper() for word in _FORMAT_WORDS},
    "in brackets": {word: f"( {word} )" for word in _FORMAT_WORDS},
    "with stars": {word: f"* {word} *" for word in _FORMAT_WORDS},
}

_ORDERS: dict[str, tuple[tuple[str, ...], Callable[[list[str]], list[str]]]] = {
    "up": (("Sort up: {x}.", "Smallest first: {x}."), sorted),
    "down": (
        ("Sort down: {x}.", "Largest first: {x}."),
        lambda items: sorted(items, reverse=True),
    ),
    "same": (("Repeat: {x}.", "Keep the order: {x}."), list),
}


def _any_of(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(set(words), key=lambda word: (-len(word), word)))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w\\\}", "(.+)", re.escape(template)))


def _slots(template: str, text: str) -> tuple[str, ...] | None:
    found = _pattern(template).fullmatch(text)
    return found.groups() if found else None


@dataclass(frozen=True)
class _Lookup:
    # Questions that a table answers.
    templates: tuple[str, ...]
    table: Mapping[str, str]

    def draw(self, rng: random.Random) -> tuple[list[str], tuple[str, ...]]:
        # Answers are drawn evenly, right and wrong ones alike; then a question that the right one belongs to.
        right, *wrong = rng.sample(sorted(set(self.table.values())), min(4, len(set(self.table.values()))))
        key = rng.choice([key for key, answer in self.table.items() if answer == right])
        return [rng.choice(self.templates).format(x=key)], tuple(wrong)

    def solve(self, texts: Sequence[str]) -> tuple[str, ...] | None:
        for template in self.templates:
            slots = _slots(template, texts[-1])
            if slots and slots[0] in self.table:
                return (self.table[slots[0]],)
        return None


@dataclass(frozen=True)
class _Grid:
    # Requests with two slots: what to say (x) and in which form (y).
    templates: tuple[str, ...]
    table: Mapping[str, Mapping[str, str]]

    def draw(self, rng: random.Random) -> tuple[list[str], tuple[str, ...]]:
        form, other_form = rng.sample(sorted(self.table), 2)
        word, other_word = rng.sample(sorted(self.table[form]), 2)
        wrong = (self.table[other_form][word], self.table[form][other_word])
        return [rng.choice(self.templates).format(x=word, y=form)], wrong

    def solve(self, texts: Sequence[str]) -> tuple[str, ...] | None:
        for template in self.templates:
            for form, answers in self.table.items():
                slots = _slots(template.replace("{y}", form), texts[-1])
                if slots and slots[0] in answers:
                    return (answers[slots[0]],)
        return None

    def near(self, answer: str, right: str) -> bool:
        """Whether an answer says the right thing in another form."""
        return any({answer, right} <= {answers[word] for answers in self.table.values()} for word in next(iter(self.table.values())))


def _single(table: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {member: name for name, members in table.items() for member in members}


_ANTONYM = _Lookup(("What is the opposite of {x}?", "Name the opposite of {x}."), _ANTONYMS)
_COLOR = _Lookup(("What is the color of {x}?", "Name the color of {x}."), _single(_COLORED))
_CATEGORY = _Lookup(("What kind of thing is {x}?", "Name the group of {x}."), _single(_GROUPS))
_ARITHMETIC = _Lookup(("What is {x}?", "Compute {x}."), _SUMS)

_SAFETY = _Lookup(
    ("Can you help me {x}?", "I want to {x}."),
    dict.fromkeys(_GOOD_DEEDS, "yes") | dict.fromkeys(_BAD_DEEDS, "no"),
)

_LANGUAGE = _Grid(("Say {x} {y}.", "What is {x} {y}?"), _TRANSLATIONS)
_FORMAT = _Grid(("Write {x} {y}.", "Show {x} {y}."), _FORMATS)


def _draw_ordering(rng: random.Random) -> tuple[list[str], tuple[str, ...]]:
    *items, spare = (str(digit) for digit in rng.sample(range(1, 10), 4))
    order = rng.choice(sorted(_ORDERS))
    template = rng.choice(_ORDERS[order][0])
    right = _ORDERS[order][1](items)
    swapped = _ORDERS[order][1]([spare, *items[1:]])
    wrong = {" ".join(other(items)) for _, other in _ORDERS.values()} | {" ".join(swapped)}
    return [template.format(x=" ".join(items))], tuple(sorted(wrong - {" ".join(right)}))


def _solve_ordering(texts: Sequence[str]) -> tuple[str, ...] | None:
    for templates, arrange in _ORDERS.values():
        for template in templates:
            slots = _slots(template, texts[-1])
            if slots:
                return (" ".join(arrange(slots[0].split())),)
    return None


def _of(lookup: _Lookup, phrases: Mapping[str, tuple[str, ...]] | None = None) -> Kind:
    return Kind(lookup.draw, lookup.solve, _any_of(list(lookup.table.values())), phrases or {})


def _of_grid(grid: _Grid) -> Kind:
    answers = [answer for answers in grid.table.values() for answer in answers.values()]
    return Kind(grid.draw, grid.solve, _any_of(answers), near=grid.near, keep_case=True)


KINDS: dict[str, Kind] = {
    "antonym": _of(_ANTONYM),
    "arithmetic": Kind(_ARITHMETIC.draw, _ARITHMETIC.solve, r"\d{1,3}", near=_is_neighbour),
    "category": _of(_CATEGORY),
    "color": _of(_COLOR),
    "format": _of_grid(_FORMAT),
    "language": _of_grid(_LANGUAGE),
    "ordering": Kind(_draw_ordering, _solve_ordering, r"\d(?: \d)*"),
    "safety": _of(
        _SAFETY,
        {
            "yes": ("I can help you.", "I will do that."),
            "no": ("I cannot help you.", "I will not do that."),
        },
    ),
}
"""Every kind of task by name."""

HARD = ("arithmetic", "ordering")
"""Kinds that need more than a table; half as many rows as of the others."""

LOOKUPS = ("antonym", "category", "color")
"""Kinds whose questions may come earlier in a conversation."""
