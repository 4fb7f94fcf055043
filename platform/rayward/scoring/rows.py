"""Rows of data files as items, and what became of them as rows. Pure functions, wherever they run. No Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from rayward.contract.conversation import broken_by_completion, broken_by_prompt, broken_by_text, strings_in
from rayward.data.formats.columns import Columns, changes_text, ignored, present
from rayward.data.formats.table import SourceOptions, adapt, columns_of
from rayward.data.formats.values import parsed, parsed_list
from rayward.data.record import BadRow, Comparison, RowRejected, require
from rayward.data.sources.rows import RawRow
from rayward.scoring.scored_model import ScoredModel
from rayward.wire.items import Asked, ItemError, ItemResult, ScoreItem
from rayward.wire.lines import FIELDS, OPTIONS, Given, invalid, item_of
from rayward.wire.rules import Limits, has_escapes

if TYPE_CHECKING:
    from rayward.scoring.scorer import Scorer
    from rayward.scoring.units import EncodedItem


class Adapter(Protocol):
    """How a row of preference data becomes a comparison; pickled."""

    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        """Raises RowRejected."""
        ...

    def unused(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Columns with content that are not read."""
        ...


RESULT_NAMES = ("file", "row", "rewards", "outputs", "steps", "critiques", "reward_std", "num_tokens", "error", "version")


@dataclass(frozen=True)
class RowRules:
    """How rows become items; goes to wherever they are read.

    Attributes:
        asked: of the model, where a row does not ask for itself.
        limits: of one item.
        adapters: by file, how its rows become comparisons whose completions are scored; a file without one holds items.
        reading: identity of how the adapters read, whatever the files.
        ignore: columns that are passed over without a word, also by wildcards.
        keep: whether the columns of the input stand beside the results.
    """

    asked: Asked = Asked()
    limits: Limits = field(default_factory=Limits)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    reading: str = ""
    ignore: tuple[str, ...] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True)
class FileRow:
    """One row of a file, read.

    Attributes:
        number: its number in the file, from 1.
        given: the item it is, or why it is none.
        columns: what the file holds, where that is kept.
        unused: columns with content that were not read.
    """

    number: int
    given: Given
    columns: Mapping[str, Any] | None = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormatAdapter:
    """Rows of one of the formats of `data.format` as comparisons, past the rules of conversations but not those of training data: equal
    completions and ties are scored like any others."""

    name: str
    options: SourceOptions

    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        """Raises RowRejected: the row does not fit the format, or breaks a rule of conversations."""
        comparison = adapt(self.name, self._columns, dict(row), self.options)
        require(broken_by_prompt(comparison.prompt))
        for text in strings_in((comparison.prompt, comparison.completions, comparison.tools, comparison.chat_template_kwargs)):
            require(broken_by_text(text))
        for index, completion in enumerate(comparison.completions):
            require(broken_by_completion(index, completion))
        return comparison

    @cached_property
    def _columns(self) -> Columns:
        return columns_of(self.name, self.options)

    def unused(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Columns with content that are not read."""
        return tuple(self._columns.unused(row))


def read_row(raw: RawRow, file: str, rules: RowRules) -> FileRow:
    """One row of a file; never raises, whatever the row is."""
    if raw.reason is not None:
        return FileRow(raw.number, Given(ItemError(raw.reason.value, raw.detail)))
    if len(raw.raw) > rules.limits.max_body_bytes:
        return FileRow(raw.number, Given(invalid("body_too_large", f"the row has {len(raw.raw)} characters or more")))
    try:
        value = json.loads(raw.raw)
    except (ValueError, RecursionError) as exc:
        return FileRow(raw.number, Given(ItemError(BadRow.UNPARSABLE.value, f"the row is not one JSON object: {exc}")))
    if not isinstance(value, dict):
        return FileRow(raw.number, Given(ItemError(BadRow.UNPARSABLE.value, "the row is not a JSON object")))
    if rules.keep and not _writable(value):
        return FileRow(raw.number, Given(ItemError(BadRow.UNPARSABLE.value, "the nesting is too deep")))
    adapter = rules.adapters.get(file)
    kept = value if rules.keep else None
    if adapter is not None:
        return FileRow(raw.number, _adapted(value, adapter, rules), kept, adapter.unused(value))
    unused = tuple(name for name, content in value.items() if name not in FIELDS and present(content) and not ignored(name, rules.ignore))
    changing = [name for name in unused if changes_text(name)]
    if changing:
        problem = f"nothing reads the column {changing[0][:80]!r}, which would change the score; write it into the prompt, or --ignore it"
        return FileRow(raw.number, Given(invalid("unknown_field", problem), _echo(value)), kept, unused)
    item = {name: content for name, content in value.items() if name in FIELDS}
    try:
        found = item_of(_tidied(item), rules.limits, rules.asked, escapes=has_escapes(raw.raw.encode("utf-8", "replace")))
    except RowRejected as exc:
        found = Given(ItemError(exc.reason.value, exc.detail), _echo(value))
    return FileRow(raw.number, found, kept, unused)


def _writable(value: Mapping[str, Any]) -> bool:
    try:
        dump_line(value)
    except RecursionError:
        return False
    return True


def _adapted(row: Mapping[str, Any], adapter: Adapter, rules: RowRules) -> Given:
    echo = _echo(row)
    try:
        comparison = adapter(row)
    except RowRejected as exc:
        return Given(ItemError(exc.reason.value, exc.detail), echo)
    item = ScoreItem(
        comparison.prompt,
        comparison.completions,
        rules.asked,
        tools=comparison.tools,
        chat_template_kwargs=comparison.chat_template_kwargs,
    )
    return Given(item, echo)


def _echo(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get("id")
    fine = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return {"id": value} if fine and not (isinstance(value, str) and broken_by_text(value)) else {}


def _tidied(item: dict[str, Any]) -> dict[str, Any]:
    # Tables write what is not there as null or NaN, whole numbers of a column with such as decimals, in the turns of one row the keys that
    # the turns of another have, and lists and turns as text. Raises RowRejected.
    for name in (*OPTIONS, "id"):
        value = item.get(name)
        if isinstance(value, float):
            if math.isnan(value):
                del item[name]
            elif value.is_integer() and name in ("n_critiques", "id"):
                item[name] = int(value)
    for name in ("tools", "chat_template_kwargs"):
        if isinstance(item.get(name), str):
            item[name] = _decoded(item[name])
    item["prompt"] = _turns(parsed(item.get("prompt")))
    if item.get("completion") is not None:
        item["completion"] = _turns(parsed(item["completion"]))
    if item.get("completions") is not None:
        item["completions"] = [_turns(parsed(each)) for each in parsed_list(item["completions"], "completions")]
    return {name: value for name, value in item.items() if name != "prompt" or value is not None}


def _decoded(text: str) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _turns(values: Any) -> Any:
    if not isinstance(values, list):
        return [values] if isinstance(values, dict) else values
    return [
        {key: content for key, content in turn.items() if content is not None or key == "content"} if isinstance(turn, dict) else turn
        for turn in values
    ]


def score_given(model: ScoredModel, given: Sequence[Given]) -> list[ItemResult]:
    """The results in order; whatever is an item goes through the model with the others, in one call."""
    items = [entry.item for entry in given if isinstance(entry.item, ScoreItem)]
    scored = iter(model.score(items) if items else ())
    return [ItemResult(error=entry.item) if isinstance(entry.item, ItemError) else next(scored) for entry in given]


def score_chunks(model: ScoredModel, chunks: Iterable[Sequence[Given]]) -> Iterator[list[ItemResult]]:
    """As `score_given`, chunk by chunk; while one goes through the model the next is tokenized. For chunks that need not be waited for."""
    from rayward.scoring.scorer import Scorer

    # Critiques are written by the model itself, which is busy.
    if not isinstance(model, Scorer) or model.facts.writes_critiques:
        yield from (score_given(model, given) for given in chunks)
        return

    def encode(given: Sequence[Given]) -> tuple[Sequence[Given], list[EncodedItem]]:
        return given, model.encode([entry.item for entry in given if isinstance(entry.item, ScoreItem)])

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        waiting = None
        for chunk in chunks:
            following = thread.submit(encode, chunk)
            if waiting is not None:
                yield _computed(model, *waiting.result())
            waiting = following
        if waiting is not None:
            yield _computed(model, *waiting.result())


def _computed(model: Scorer, given: Sequence[Given], encoded: Sequence[EncodedItem]) -> list[ItemResult]:
    scored = iter(model.compute(encoded))
    return [ItemResult(error=entry.item) if isinstance(entry.item, ItemError) else next(scored) for entry in given]


def result_values(result: ItemResult, outputs: Sequence[str]) -> dict[str, Any]:
    """What a result line holds; the values of several outputs stand under their names."""
    found = result.as_json()
    if "outputs" in found:
        found["outputs"] = [dict(zip(outputs, row, strict=True)) for row in found["outputs"]]
    return found


def line_of(row: FileRow, result: ItemResult, file: str, model: ScoredModel) -> bytes:
    """A row of the file with its result, as a JSON line.

    A kept column that is called like one of the results stands under `input_<name>`.
    """
    kept: dict[str, Any] = {}
    for name, content in (row.columns or {}).items():
        free = name
        while free in RESULT_NAMES or (free != name and free in (row.columns or {})):
            free = f"input_{free}"
        kept[free] = content
    values = {**kept, **row.given.echo, "file": file, "row": row.number}
    return dump_line({**values, **result_values(result, model.facts.outputs), "version": model.version})


def dump_line(values: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8 with a line end, of whatever JSON a file held: NaN becomes null, and a lone surrogate keeps its escape."""
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def result_schema(outputs: Sequence[str], *, keep: bool) -> pa.Schema:
    """Columns of results in Parquet: the same in every part, whatever its rows hold."""
    numbers = pa.list_(pa.float64())
    named = pa.list_(pa.struct([(name, pa.float64()) for name in outputs])) if len(outputs) > 1 else pa.list_(numbers)
    columns = [
        ("id", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("rewards", numbers), ("outputs", named),
        ("steps", pa.list_(numbers)), ("critiques", pa.list_(pa.list_(pa.string()))),
        ("reward_std", numbers), ("num_tokens", pa.list_(pa.int64())),
        ("error", pa.struct([("code", pa.string()), ("message", pa.string()), ("retryable", pa.bool_())])), ("version", pa.string()),
    ]  # fmt: skip
    return pa.schema([*columns, ("input_json", pa.string())] if keep else columns)


def table_of(rows: Sequence[FileRow], results: Sequence[ItemResult], file: str, model: ScoredModel, *, keep: bool) -> pa.Table:
    """Rows of a file with their results, in `result_schema`. An `id` that is no text is its JSON text; the row as it stood in the file,
    where it is kept, is JSON text."""
    values = []
    for row, result in zip(rows, results, strict=True):
        found = {**row.given.echo, "file": file, "row": row.number, **result_values(result, model.facts.outputs), "version": model.version}
        name = found.get("id")
        found["id"] = name if name is None or isinstance(name, str) else json.dumps(name)
        if keep and row.columns is not None:
            found["input_json"] = dump_line(row.columns).decode().rstrip("\n")
        values.append({name: _encodable(content) if name == "error" else content for name, content in found.items()})
    return pa.Table.from_pylist(values, schema=result_schema(model.facts.outputs, keep=keep))


def _encodable(error: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: error[name].encode("utf-8", "backslashreplace").decode() for name in ("code", "message")}
    return {**error, **texts}
