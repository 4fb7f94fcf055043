"""JSON: a row a line, or one list of rows."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from rayward.data.record import BadRow
from rayward.data.sources.find import SourceFile
from rayward.data.sources.kinds import plain_name
from rayward.data.sources.rows import RawRow
from rayward.data.sources.streams import BOM, damaged, open_text

CHUNK_BYTES = 1024 * 1024
HEAD_BYTES = 64 * 1024
ELEMENT_BYTES = 512 * 1024 * 1024
"""The longest element of a JSON list; a text without an end would otherwise be taken for a row of the size of the file."""
_BLANK = " \t\r\n"
_NEAR_END = 16
"""Characters: a mark of JSON that is cut off by the end of what was read is shorter."""


def is_list(file: SourceFile) -> bool:
    """Whether a .json file holds one list."""
    if not plain_name(file.uri.partition("?")[0]).lower().endswith(".json"):
        return False
    with open_text(file) as stream:
        text = stream.read(HEAD_BYTES).removeprefix(BOM).lstrip()
    return text.startswith(b"[")


def json_rows(file: SourceFile, start: int, end: int | None, number: int) -> Iterator[RawRow]:
    """The rows whose lines begin in `start` to `end`, numbered by line from `number` on; blank lines are no rows.

    Raises:
        DataError: the file is damaged.
    """
    if start == 0 and is_list(file):
        yield from _list_rows(file)
        return
    with open_text(file, max(0, start - 1)) as stream:
        position = start
        if start:
            position += _skip_line(stream) - 1
        while end is None or position < end:
            line = stream.readline()
            if not line:
                return
            text = line.removeprefix(BOM if position == 0 else b"").strip()
            position += len(line)
            if text:
                try:
                    yield RawRow(number, text.decode("utf-8"))
                except UnicodeDecodeError as exc:
                    shown = text.decode("utf-8", "backslashreplace")
                    yield RawRow(number, shown, BadRow.UNPARSABLE, f"the line is not UTF-8: {exc.reason}")
            number += 1


def _skip_line(stream: io.BufferedReader) -> int:
    """Bytes of the line that an earlier range reads."""
    skipped = 0
    while part := stream.readline(CHUNK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def count_lines(file: SourceFile, start: int, end: int) -> int:
    """Lines of an uncompressed file that begin after `start` and before `end`, and the first one where `start` is 0.

    Raises:
        DataError: the file cannot be read.
    """
    count = int(start == 0 < end)
    position = max(0, start - 1)
    with open_text(file, position) as stream:
        while position < end - 1:
            chunk = stream.read(min(CHUNK_BYTES, end - 1 - position))
            if not chunk:
                break
            count += chunk.count(b"\n")
            position += len(chunk)
    return count


def _list_rows(file: SourceFile) -> Iterator[RawRow]:
    with open_text(file) as stream:
        try:
            for number, value in enumerate(_elements(stream), 1):
                yield RawRow(number, json.dumps(value))
        except (ValueError, RecursionError) as exc:
            raise damaged(file, exc) from exc


def _elements(stream: io.BufferedReader) -> Iterator[Any]:
    """The values of one JSON list, each parsed as soon as it is read.

    Raises:
        ValueError: it is not a JSON list.
    """
    window = _Window(stream)
    scan = json.JSONDecoder().raw_decode
    window.expect("[")
    if window.next() == "]":
        window.expect("]")
    else:
        while True:
            yield window.value(scan)
            if window.expect(",]") == "]":
                break
            window.next()
    if window.next():
        raise ValueError(f"there is text after the list: {window.text[window.place : window.place + 20]!r}")


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        # Lone surrogates pass here as they do in `json.loads` of bytes.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self._complete = False
        self.text = ""
        self.place = 0
        self._more(len(BOM))
        self.text = self.text.removeprefix("\ufeff")

    def next(self) -> str:
        """The next character that is not blank, which stays; empty at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in _BLANK:
                    return self.text[self.place]
                self.place += 1
            if self._complete:
                return ""
            self._more(CHUNK_BYTES)

    def expect(self, characters: str) -> str:
        """Take the next character, one of these."""
        found = self.next()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise ValueError(
                f"the list is cut off: {wanted} is missing" if not found else f"{wanted} is expected in the list, not {found!r}"
            )
        self.place += 1
        return found

    def value(self, scan: Any) -> Any:
        """Take the next value."""
        while True:
            try:
                value, end = scan(self.text, self.place)
            except json.JSONDecodeError as exc:
                # What is cut off at the end of the window fails there, except a text, which fails where it begins.
                cut = exc.pos > len(self.text) - _NEAR_END or exc.msg.startswith("Unterminated string")
                if self._complete or not cut or len(self.text) - self.place > ELEMENT_BYTES:
                    raise
            else:
                if self._complete or end <= len(self.text) - _NEAR_END:  # 12 may go on as 12.5e-3
                    self.place = end
                    return value
            self._more(max(CHUNK_BYTES, len(self.text) - self.place))

    def _more(self, size: int) -> None:
        chunk = self._stream.read(size)
        self._complete = not chunk
        self.text = self.text[self.place :] + self._decoder.decode(chunk, final=self._complete)
        self.place = 0
