"""Patterns of file names: `*`, `?`, `[…]`, `**`, `{a,b}` and `{00..07}`."""

from __future__ import annotations

import re
from itertools import pairwise

WILDCARDS = re.compile(r"[*?\[]")
_BRACKET = re.compile(r"\[(!?)([^\]/]+)\]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(text: str) -> list[str]:
    """`{a,b}.jsonl` -> `a.jsonl`, `b.jsonl`; `{08..10}` -> `08`, `09`, `10`; braces may be nested, and one without a comma stays.

    Every text that comes out is looked for by itself, so one that is missing is noticed.
    """
    depth, start = 0, 0
    commas: list[int] = []
    for index, character in enumerate(text):
        if character == "{":
            depth += 1
            if depth == 1:
                start, commas = index, []
        elif character == "," and depth == 1:
            commas.append(index)
        elif character == "}" and depth:
            depth -= 1
            if depth:
                continue
            choices = _choices(text, start, commas, index)
            if choices:
                return [head for choice in choices for head in expand_braces(text[:start] + choice + text[index + 1 :])]
    return [text]


def _choices(text: str, start: int, commas: list[int], end: int) -> list[str]:
    if commas:
        edges = [start, *commas, end]
        return [text[left + 1 : right] for left, right in pairwise(edges)]
    span = _RANGE.fullmatch(text[start + 1 : end])
    if span is None:
        return []
    first, last = int(span[1]), int(span[2])
    width = len(span[1]) if span[1].startswith("0") or span[2].startswith("0") else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]


def base_of(path: str) -> str:
    """The folder before the first wildcard."""
    wildcard = WILDCARDS.search(path)
    return path.rstrip("/") if wildcard is None else path[: wildcard.start()].rpartition("/")[0]


def compile_glob(path: str) -> re.Pattern[str]:
    """What the paths must match as a whole; `**` crosses folders, all else stays inside one."""
    pattern, index = "", 0
    while index < len(path):
        bracket = _BRACKET.match(path, index)
        whole_part = index == 0 or path[index - 1] == "/"
        if whole_part and path.startswith("**/", index):
            pattern, index = pattern + "(?:.*/)?", index + 3
        elif whole_part and path[index:] == "**":
            pattern, index = pattern + ".*", index + 2
        elif bracket:
            pattern, index = pattern + f"[{'^' if bracket[1] else ''}{_class(bracket[2])}]", bracket.end()
        else:
            pattern, index = pattern + {"*": "[^/]*", "?": "[^/]"}.get(path[index], re.escape(path[index])), index + 1
    return re.compile(pattern)


def _class(characters: str) -> str:
    return re.sub(r"([\\\[^&~|])", r"\\\1", characters)
