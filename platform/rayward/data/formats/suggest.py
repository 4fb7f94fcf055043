"""A `data.sources` block guessed from the columns of a sample, to be pasted and corrected. No Ray and no tokenizer here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from rayward.config.sources import word_of
from rayward.data.formats.columns import is_metadata, present
from rayward.data.formats.fields import Row

_PROMPTS = ("prompt", "question", "query", "problem", "task", "input", "context", "conversations", "conversation", "messages", "history")
_PAIRS = (
    ("chosen", "rejected"),
    ("better", "worse"),
    ("good", "bad"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("winner", "loser"),
    ("more", "less"),
)
_SIDES = (("a", "b"), ("1", "2"), ("0", "1"), ("first", "second"), ("left", "right"), ("x", "y"))
_LABELS = (
    *("label", "labels", "winner", "preference", "preferred", "choice", "verdict", "goldlabel"),
    *("judgement", "judgment", "better", "vote", "votes"),
)
_TEXTS = ("text", "content", "output", "answer", "response", "completion", "value")
_VOTES = ("value", "vote", "label", "choice", "preference")
_NUMBERS = ("score", "rating", "rank_score", "preference", "reward", "rank")
_ANSWERS = ("completion", "response", "answer", "output", "reply", "system_output", "target")
_CRITIQUES = ("critique", "feedback", "rationale", "explanation", "review")
UNTOLD = "SAY-WHICH-COLUMN"
"""Stands where nothing was found."""


def suggest(path: str, rows: Sequence[Row]) -> str:
    """A block of YAML for `data.sources` that maps the columns of a sample, as far as their names and values tell.

    Args:
        path: of the source.
        rows: at least one.
    """
    sample = _Sample(rows)
    block: dict[str, Any] = {"path": path, "columns": {}}
    notes: list[str] = []
    _answers(sample, block, notes)
    paths = [path for given in block["columns"].values() for path in ([given] if isinstance(given, str) else given)]
    used = set(_LABELS) & set(sample.names) | {path.split(".")[0] for path in paths}
    _prompt(sample, block, used)
    text = yaml.safe_dump({"data": {"sources": [block]}}, sort_keys=False, allow_unicode=True, width=120)
    return text + "".join(f"# {note}\n" for note in notes)


class _Sample:
    """The columns of a sample by what they hold."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.names = list(dict.fromkeys(str(name) for row in rows for name in row))

    def value(self, name: str) -> Any:
        return next((row[name] for row in self.rows if present(row.get(name))), None)

    def is_text(self, name: str) -> bool:
        value = self.value(name)
        return isinstance(value, str) or (isinstance(value, list | dict) and bool(value) and _is_turns(value))

    def text_in(self, name: str) -> str | None:
        """A path to a text in a column: itself, or a part of an object."""
        value = self.value(name)
        if self.is_text(name):
            return name
        if isinstance(value, dict):
            return next((f"{name}.{key}" for key in _TEXTS if isinstance(value.get(key), str)), None)
        return None

    def values(self, name: str) -> list[Any]:
        """The different labels in a column, or in its votes."""
        given = [row[name] for row in self.rows if present(row.get(name))]
        flat = [each for value in given for each in (value if isinstance(value, list) else [value])]
        plain = [next((each[key] for key in _VOTES if key in each), None) if isinstance(each, dict) else each for each in flat]
        return list({word_of(value): value for value in plain if isinstance(value, str | int | float)}.values())


def _is_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _tokens(name: str) -> list[str]:
    return [token.lower() for token in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _paired(sample: _Sample, sides: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Two columns of texts whose names differ in one word only."""
    for first, second in sides:
        for name in sample.names:
            tokens = _tokens(name)
            if first not in tokens or is_metadata(name) or sample.text_in(name) is None:
                continue
            other = [second if token == first else token for token in tokens]
            found = next((each for each in sample.names if _tokens(each) == other and sample.text_in(each) is not None), None)
            if found is not None:
                return sample.text_in(name) or name, sample.text_in(found) or found
    return None


def _answers(sample: _Sample, block: dict[str, Any], notes: list[str]) -> None:
    columns = block["columns"]
    if (pair := _paired(sample, _PAIRS)) is not None:
        columns["chosen"], columns["rejected"] = pair
        return
    if (pair := _paired(sample, _SIDES)) is not None:
        columns["first"], columns["second"] = pair
        label = next((name for name in sample.names if "".join(_tokens(name)) in _LABELS), None)
        value = None if label is None else sample.value(label)
        if label is not None and isinstance(value, list):
            inner = next((key for key in _VOTES if isinstance(value[0], dict) and key in value[0]), None)
            columns["votes"] = label if inner is None else f"{label}.*.{inner}"
        else:
            columns["label"] = label or UNTOLD
        block["judgement"] = _meaning(sample.values(label) if label else [], pair)
        notes.append("check which values of the label find the first answer better, which the second, and which are ties")
        return
    for name in sample.names:
        value = sample.value(name)
        if not (isinstance(value, list) and value and all(isinstance(each, dict) for each in value)) or _is_turns(value):
            continue
        text = next((key for key in (*_TEXTS, *value[0]) if isinstance(value[0].get(key), str)), None)
        number = next((key for key in (*_NUMBERS, *value[0]) if _is_number(value[0].get(key))), None)
        if text is not None and number is not None:
            columns["completions"], columns["ranks" if number == "rank" else "scores"] = f"{name}.*.{text}", f"{name}.*.{number}"
            notes.append("of scores the highest is the best; judgement: {lower_is_better: true} turns them round")
            return
    answer = next((name for word in _ANSWERS for name in sample.names if word in name.lower() and sample.is_text(name)), None)
    columns["completion"] = answer or UNTOLD
    critique = next((name for name in sample.names if any(word in name.lower() for word in _CRITIQUES) and sample.is_text(name)), None)
    if critique is not None:
        columns["critiques"] = critique
        return
    label = next((name for name in sample.names if name.lower() in ("label", "labels")), None)
    if label is not None:
        columns["label"] = label
        return
    numbers = {name: name for name in sample.names if _is_number(sample.value(name)) and name not in ("id", "index")}
    nested = next((name for name in sample.names if _is_ratings(sample.value(name))), None)
    block["ratings"] = nested or numbers or {"quality": UNTOLD}
    notes.append("name the ratings to keep in data.attributes")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ratings(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_number(each) or each is None for each in value.values())


def _meaning(values: Sequence[Any], pair: tuple[str, str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"first": [], "second": [], "tie": []}
    marks = [set(_tokens(name)) - set(_tokens(other)) for name, other in (pair, pair[::-1])]
    for value in values[:20]:
        word = word_of(value)
        tokens = set(_tokens(str(value))) | {word}
        if tokens & {"tie", "equal", "same", "both", "neither", "draw"} or "=" in word:
            found["tie"].append(value)
        elif ">" in word or "<" in word:
            better = set(_tokens(word.partition(">")[0] if ">" in word else word.partition("<")[2]))
            found["first" if better & marks[0] else "second"].append(value)
        elif tokens & marks[0]:
            found["first"].append(value)
        elif tokens & marks[1]:
            found["second"].append(value)
    return {side: listed or [UNTOLD] for side, listed in found.items() if listed or side != "tie"}


def _prompt(sample: _Sample, block: dict[str, Any], used: set[str]) -> None:
    free = [name for name in sample.names if name not in used and sample.is_text(name)]
    by_name = {name.lower(): name for name in free}
    if "instruction" in by_name:
        extra = by_name.get("input") or by_name.get("context")
        if extra is not None:
            block["prompt_template"] = f"{{{by_name['instruction']}}}\n\n{{{extra}}}"
        else:
            block["columns"]["prompt"] = by_name["instruction"]
    else:
        # An answer that is a whole conversation brings its prompt.
        first = next(iter(block["columns"].values()), None)
        whole = isinstance(first, str) and isinstance(sample.value(first), list) and len(sample.value(first)) > 1
        named = next((by_name[word] for word in _PROMPTS if word in by_name), None)
        named = named or next((name for word in _PROMPTS for name in free if word in name.lower()), None)
        named = named or next((name for name in free if not is_metadata(name) and isinstance(sample.value(name), str)), None)
        if named is not None:
            block["columns"]["prompt"] = named
        elif not whole:
            block["columns"]["prompt"] = UNTOLD
    if "system" in by_name:
        block["columns"]["system"] = by_name["system"]


def shown(value: Any, limit: int = 70) -> str:
    """A value on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return (text if len(text) <= limit else text[: limit - 1] + "…").encode("utf-8", "backslashreplace").decode()
