"""The row-level steps of `prepare`, as functions from Arrow table to Arrow table. No Ray: `prepare` maps them over blocks.

Every input row stays in the stream to the end: a step that cannot use a row fills `reason` and `detail` and passes it on.
Text travels as ASCII-escaped JSON, because Arrow strings cannot hold the lone surrogates that quarantine has to report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rayward.contract.conversation import broken_by_prompt
from rayward.data.formats.table import SourceOptions, columns_of
from rayward.data.formats.table import adapt as adapt_one
from rayward.data.prepare.leftover import Leftovers
from rayward.data.prepared import PREPARED_SCHEMA
from rayward.data.record import BadRow, Comparison, RowRejected, ranked_by, require, validate
from rayward.data.sources.read import BATCH_ROWS, ReadUnit, read_unit
from rayward.data.sources.rows import RawRow
from rayward.errors import DataError

RAW_LIMIT = 2000
"""Characters of a quarantined row that are kept."""

BENCHMARK = "contamination"
"""Role of files whose prompts must not be trained on."""

READ_SCHEMA = pa.schema(
    [
        # row | merged (its completions stand in another row) | total (number = rows of the unit) | damaged (detail = the fault of the
        # file) | grouping (number = rows or groups of what detail says)
        pa.field("kind", pa.string()),
        pa.field("role", pa.string()),  # train | validation | contamination
        pa.field("file", pa.string()),
        pa.field("number", pa.int64()),
        pa.field("raw", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("leftover", pa.string()),  # on one row of a block: its columns that nothing reads, counted
    ]
)

KEY = pa.binary()

KEYED_SCHEMA = pa.schema(
    [
        *(pa.field(field.name, field.type) for field in READ_SCHEMA if field.name != "raw"),
        pa.field("source", pa.string()),
        pa.field("near_prompt", KEY),  # the keys of `identity.Identity` (this one by `Policy.split_by`)
        pa.field("content", KEY),
        pa.field("near_content", KEY),
        pa.field("judgement", KEY),
        pa.field("record_key", KEY),
        pa.field("tied", pa.bool_()),  # all completions are ranked equal
        pa.field("split", pa.string()),  # train | validation; null for rows that are not used
        pa.field("order", pa.string()),  # the position in a split is the rank of this key
        pa.field("beside", pa.string()),  # place of the row that this one is a near duplicate of, or whose prompt it repeats
    ]
)
"""What tells rows apart and places them: all that moves between tasks."""

ENCODED_SCHEMA = pa.schema(
    [
        *(pa.field(field.name, field.type) for field in PREPARED_SCHEMA if field.name != "row"),
        *(field for field in KEYED_SCHEMA if field.name != "source"),
        pa.field("raw", pa.string()),
        pa.field("record", pa.string()),  # where rows may join; else null
        pa.field("completion_keys", pa.list_(pa.string())),
        pa.field("truncated", pa.bool_()),
        pa.field("trimmed", pa.bool_()),  # the template cut white space around a completion
        pa.field("changed", pa.string()),  # what else the template changed, in words
    ]
)


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How `adapt` reads rows.

    Attributes:
        formats: by file, the name of the format and the adapter's options.
        ties: policy for completions of equal rank.
        rank_by: column and name of the attribute that ranks a row that is unranked and stays alone.
    """

    formats: Mapping[str, tuple[str, SourceOptions]]
    ties: Literal["quarantine", "keep"]
    rank_by: tuple[int, str] | None = None


@dataclass(slots=True)
class Draft:
    """A row on its way: what an adapter made of it, or why nothing."""

    source: str
    comparison: Comparison | None = None
    reason: BadRow | None = None
    detail: str | None = None

    def reject(self, rejected: RowRejected) -> None:
        """Quarantine the row."""
        self.comparison, self.reason, self.detail = None, rejected.reason, printable(rejected.detail)


def read(unit: ReadUnit) -> Iterator[pa.Table]:
    """Rows of one unit in tables of READ_SCHEMA, then one line with their number; a damaged file becomes a `damaged` line."""
    total = 0
    batch: list[RawRow] = []
    damage: str | None = None
    try:
        for raw in read_unit(unit):
            if unit.last_number is not None and raw.number > unit.last_number:
                break
            batch.append(raw)
            if len(batch) == BATCH_ROWS:
                total += len(batch)
                yield _read_table(unit, batch)
                batch = []
    except DataError as exc:
        # Raised here it would reach the user as a Ray task error; as a line, all damaged files are reported together.
        damage = exc.problem
    total += len(batch)
    yield _read_table(unit, batch)
    marks = [{"kind": "total", "number": total}]
    if damage is not None:
        marks.append({"kind": "damaged", "number": 0, "detail": damage})
    yield pa.Table.from_pylist([{"role": unit.file.role, "file": unit.file.uri, "raw": "", **mark} for mark in marks], schema=READ_SCHEMA)


def _read_table(unit: ReadUnit, rows: Sequence[RawRow]) -> pa.Table:
    size = len(rows)
    return pa.Table.from_arrays(
        [
            pa.array(["row"] * size, pa.string()),
            pa.array([unit.file.role] * size, pa.string()),
            pa.array([unit.file.uri] * size, pa.string()),
            pa.array([row.number for row in rows], pa.int64()),
            pa.array([row.raw for row in rows], pa.string()),
            pa.array([row.reason for row in rows], pa.string()),
            pa.array([row.detail if row.reason else None for row in rows], pa.string()),
            pa.nulls(size, pa.string()),
        ],
        schema=READ_SCHEMA,
    )


def adapt(table: pa.Table, plan: Adaptation, leftovers: Leftovers | None = None) -> list[Draft]:
    """Parse, adapt and validate the rows of a table of READ_SCHEMA; `leftovers` counts the columns that nothing reads."""
    drafts = []
    columns = {file: columns_of(*plan.formats[file]) for file in table.column("file").unique().to_pylist()}
    names = ("kind", "role", "file", "raw", "reason", "detail")
    for kind, role, file, raw, reason, detail in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        name, options = plan.formats[file]
        draft = Draft(options.source, reason=reason, detail=detail)
        drafts.append(draft)
        if kind != "row" or reason is not None:
            continue
        try:
            given = _parse(raw)
            if leftovers is not None and role != BENCHMARK:
                leftovers.add(options.source, columns[file], given)
            comparison = adapt_one(name, columns[file], given, options)
            draft.source = comparison.source
            if role == BENCHMARK:  # only its prompt counts
                require(broken_by_prompt(comparison.prompt))
            else:
                validate(comparison, ties=plan.ties)
                if plan.rank_by is not None and comparison.ranks is None:
                    comparison = ranked_by(comparison, *plan.rank_by)
                    validate(comparison, ties=plan.ties)
            draft.comparison = comparison
        except RowRejected as exc:
            draft.reject(exc)
    return drafts


def _parse(raw: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise RowRejected(BadRow.UNPARSABLE, f"not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RowRejected(BadRow.WRONG_TYPE, "the row is not a JSON object")
    return value


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:RAW_LIMIT]
