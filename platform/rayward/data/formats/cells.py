"""Where a mapping finds things in a row: paths, a template of the prompt, and the values by standard name.

A column is named by its exact name or by a path with dots (`votes.0.value`; `*` is every element of a list); the longest exact name
wins, so that names with dots can be given. No Ray and no tokenizer here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayward.config.sources import ROW_NAMES, SourceConfig, heads_of, template_fields, word_of
from rayward.data.formats.columns import COMMON_COLUMNS, Columns, names, present
from rayward.data.formats.fields import Row, SourceOptions
from rayward.data.formats.values import as_rating, kind_of, missing
from rayward.data.record import BadRow, RowRejected
from rayward.errors import DataFormatError

_OWN_NAMES = frozenset({"prompt", *ROW_NAMES}) | COMMON_COLUMNS
"""Standard names that are read from the column of the same name where the mapping gives no other."""

Path = str | Sequence[str]


def find(value: Any, path: str) -> Any:
    """What stands at a path, None where nothing does."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping):
        if path in value:
            return value[path]
        cuts = [index for index, character in enumerate(path) if character == "."]
        head = next((path[:cut] for cut in reversed(cuts) if path[:cut] in value), None)
        return None if head is None else find(value[head], path[len(head) + 1 :])
    if isinstance(value, list):
        head, _, rest = path.partition(".")
        if head == "*":
            return [find(each, rest) if rest else each for each in value]
        if re.fullmatch(r"-?\d+", head) and -len(value) <= int(head) < len(value):
            return find(value[int(head)], rest) if rest else value[int(head)]
    return None


def gather(row: Row, path: Path) -> Any:
    """What stands at a path, or the list of what stands at several (lists of `*` are joined)."""
    if isinstance(path, str):
        return find(row, path)
    values: list[Any] = []
    for each in path:
        value = find(row, each)
        if "*" in each.split(".") and isinstance(value, list):
            values += value
        else:
            values.append(value)
    return values


def reads(source: SourceConfig, options: SourceOptions, of_format: Columns | None) -> Columns:
    """What becomes of the columns of a mapped source.

    Args:
        of_format: of the format that reads the renamed rows; None: the mapping makes the comparison itself.
    """
    named = source.heads
    # What a mapped name covers is not read from the column of that name.
    covered = frozenset(source.columns) | ({"prompt"} if source.prompt_template is not None else frozenset())
    ignore = (*options.ignore, *source.ignore)
    if of_format is None:
        return Columns(named | (_OWN_NAMES - covered), ignore=ignore)
    return Columns(named | (of_format.consumed - covered), of_format.metadata - covered, ignore, of_format.settings)


def require_known(source: SourceConfig, rows: Sequence[Row], where: str) -> None:
    """Refuse a mapping that names columns which no row of the sample has.

    Raises:
        DataFormatError: naming them, and the columns that there are.
    """
    made = {name for pattern in source.extract.values() for name in re.compile(pattern).groupindex}
    known = {str(key) for row in rows for key in row} | made
    unknown = {path: setting for path, setting in source.paths.items() if not heads_of(path) & known}
    if unknown:
        path, setting = next(iter(unknown.items()))
        raise DataFormatError(
            f"{where}: data.sources[].{setting} names the column {path!r}, which none of the first {len(rows)} rows has; "
            f"the columns are: {names(known)}",
            remedy="correct the name; a path has dots between its parts",
        )


def renamed(row: Row, source: SourceConfig) -> dict[str, Any]:
    """The row with its columns under the names that the mapping gives them; columns that it reads are gone under their own."""
    cells = Cells(row, source)
    rest = {name: value for name, value in row.items() if name not in source.heads and source.columns.get(name, "") is not None}
    new = {name: value for name in source.columns if (value := cells[name]) is not None}
    if source.prompt_template is not None:
        new["prompt"] = cells.template(source.prompt_template)
    result = {**rest, **new}
    if source.system is not None and not present(result.get("system")):
        result["system"] = source.system
    return result


class Cells:
    """The values of one row by standard name."""

    def __init__(self, row: Row, source: SourceConfig) -> None:
        self.source = source
        self.row: Row = row
        for column, pattern in source.extract.items():
            value = find(row, column)
            match = re.search(pattern, value) if isinstance(value, str) else None
            if match is None:
                raise RowRejected(BadRow.UNPARSABLE, f"column {column!r} is {shown(value)}, where extract {pattern!r} finds nothing")
            self.row = {**self.row, **match.groupdict()}
        self.used = source.heads

    def __getitem__(self, name: str) -> Any:
        if name in self.source.columns:
            path = self.source.columns[name]
            return None if path is None else gather(self.row, path)
        # A column that the mapping uses for something else is not also what its own name says.
        return self.row.get(name) if name in _OWN_NAMES and name not in self.used else None

    def required(self, name: str) -> Any:
        """The value of a standard name.

        Raises:
            RowRejected: there is none.
        """
        value = self[name]
        if value is None:
            raise RowRejected(BadRow.MISSING_FIELD, f"{self.where(name)} is null or missing")
        return value

    def where(self, name: str) -> str:
        """A standard name and its column, for messages."""
        path = self.source.columns.get(name, name)
        return f"{name} (column {path!r})"

    def number(self, name: str) -> float | None:
        """The number of a standard name, None where there is none."""
        return self.as_number(self[name], self.where(name))

    def as_number(self, value: Any, where: str) -> float | None:
        """A number, by `judgement.values` where it is a word; None where there is none."""
        word = None if isinstance(value, dict | list) or value is None else word_of(value)
        known = self.source.judgement.numbers
        if word in known:
            return known[word]
        return None if missing(value) else as_rating(value, where)

    def template(self, template: str) -> str:
        """The prompt; a column that is null, empty or absent goes with the text before it."""
        text, trailing = "", ""
        for literal, name in template_fields(template):
            if name is None:
                trailing = literal
                break
            value = self[name] if name in self.source.columns else find(self.row, name)
            if present(value):
                text += literal + _text_of(value, name)
        fields = len(template_fields(template)) > 1
        return (text + trailing).strip() if text or not fields else ""


def _text_of(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return word_of(value)
    if isinstance(value, list):
        return "\n".join(_text_of(each, name) for each in value if present(each))
    raise RowRejected(BadRow.WRONG_TYPE, f"prompt_template: {name!r} is {kind_of(value)}; the rule is a text, a number or a list of them")


def shown(value: Any) -> str:
    """A value for a message."""
    return repr(value)[:80] if isinstance(value, str | int | float | bool) else kind_of(value)
