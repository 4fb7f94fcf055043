"""CSV and TSV: a header, then a row of texts a record; a record may go over several lines in quotes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator

from rayward.data.record import BadRow
from rayward.data.sources.find import SourceFile
from rayward.data.sources.kinds import plain_name
from rayward.data.sources.rows import RawRow
from rayward.data.sources.streams import damaged, open_text
from rayward.errors import DataError

INDEX_COLUMN = "Unnamed: 0"
"""What pandas calls a first column without a name: the index that it writes."""
_UNCLOSED = "unexpected end of data"


def csv_rows(file: SourceFile) -> Iterator[RawRow]:
    """The records behind the header, numbered from 1; an empty field is null.

    Raises:
        DataError: the file is damaged, or has no header of distinct names.
    """
    # The limit is the process's; a text of a reward model's data is longer than its default of 128 KiB.
    csv.field_size_limit(sys.maxsize)
    with open_text(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from _records(text, file)
        finally:
            text.detach()


def _records(text: io.TextIOWrapper, file: SourceFile) -> Iterator[RawRow]:
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if not first:
        return
    lines = _Lines(first, text)
    reader = csv.reader(lines, delimiter=_delimiter(first, file), strict=True)
    try:
        header = next(reader)
    except csv.Error as exc:
        raise _no_header(file, f"the first line is no record ({exc})") from exc
    names = _names(header, file)
    number = 0
    while True:
        number += 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            if _UNCLOSED in str(exc):
                raise damaged(file, f"a quote that opens in row {number} is never closed") from exc
            shown = lines.last.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").rstrip("\r\n")
            yield RawRow(number, shown, BadRow.UNPARSABLE, f"line {reader.line_num}: {exc}")
            continue
        if not fields:
            number -= 1  # a blank line
            continue
        yield _row(number, names, fields)


class _Lines(Iterator[str]):
    """The first line and the rest, with the one that was read last."""

    def __init__(self, first: str, rest: io.TextIOWrapper) -> None:
        self._first: str | None = first
        self._rest = rest
        self.last = ""

    def __next__(self) -> str:
        self.last = next(self._rest) if self._first is None else self._first
        self._first = None
        return self.last


def _delimiter(header: str, file: SourceFile) -> str:
    if plain_name(file.uri.partition("?")[0]).lower().endswith(".tsv"):
        return "\t"
    # Spreadsheets of countries with a decimal comma write semicolons.
    return next((character for character in ",;\t" if character in header), ",")


def _names(header: list[str], file: SourceFile) -> list[str]:
    names = [name.strip() for name in header]
    if len(names) > 1 and not names[0]:
        names[0] = INDEX_COLUMN
    for name in names:
        if not name or names.count(name) > 1:
            raise _no_header(file, f"the column name {name!r} stands twice" if name else "a column of the first line has no name")
        if not name.isprintable():
            raise _no_header(file, f"the column name {name!r} is no text")
    return names


def _no_header(file: SourceFile, problem: str) -> DataError:
    return DataError(f"{file.uri}: {problem}", remedy="let the first line name the columns, each once")


def _row(number: int, names: list[str], fields: list[str]) -> RawRow:
    if len(fields) != len(names):
        problem = f"the row has {len(fields)} fields, the header {len(names)}"
        return RawRow(number, json.dumps(fields), BadRow.UNPARSABLE, problem)
    values = dict(zip(names, (field or None for field in fields), strict=True))
    raw = json.dumps(values)
    if any("\udc80" <= character <= "\udcff" for field in fields if not field.isascii() for character in field):
        return RawRow(number, raw, BadRow.UNPARSABLE, "the row is not UTF-8")
    return RawRow(number, raw)
