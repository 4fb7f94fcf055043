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

from rayward.data.formats.table import SourceOptions, columns_of
from rayward.data.formats.table import adapt as adapt_one
from rayward.data.prepare.leftover import Leftovers
from rayward.data.prepared import PREPARED_SCHEMA
from rayward.data.record import BadRow, RowRejected, dump_record, validate
from rayward.data.sources.read import BATCH_ROWS, ReadUnit, read_unit
from rayward.data.sources.rows import RawRow
from rayward.errors import DataError
from rayward.schema import digest

RAW_LIMIT = 2000
"""Characters of a quarantined row that are kept."""

READ_SCHEMA = pa.schema(
    [
        # row | merged (its completions stand in another row) | total (number = rows of the unit) | damaged (detail = the fault of the
        # file) | overlap (number = prompts in both splits) | grouping (number = rows or groups of what detail says)
        pa.field("kind", pa.string()),
        pa.field("role", pa.string()),
        pa.field("file", pa.string()),
        pa.field("number", pa.int64()),
        pa.field("raw", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("leftover", pa.string()),  # on one row of a block: its columns that nothing reads, counted
    ]
)

ADAPTED_SCHEMA = pa.schema(
    [
        *READ_SCHEMA,
        pa.field("source", pa.string()),
        pa.field("record", pa.string()),
        pa.field("prompt_key", pa.string()),
        pa.field("content_key", pa.string()),
        pa.field("judgement_key", pa.string()),
        pa.field("bucket", pa.int64()),  # rows of one prompt share a bucket
        pa.field("split", pa.string()),  # train | validation; null for rows that are not used
        pa.field("members", pa.string()),  # of a folded group its rows, else null
    ]
)

ENCODED_SCHEMA = pa.schema(
    [
        *(pa.field(field.name, field.type) for field in PREPARED_SCHEMA if field.name != "row"),
        *READ_SCHEMA,
        pa.field("split", pa.string()),
        pa.field("order", pa.string()),  # the position in a split is the rank of this key
        pa.field("truncated", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How `adapt` reads rows.

    Attributes:
        formats: by file, the name of the format and the adapter's options.
        ties: policy for completions of equal rank.
        num_buckets: rows are grouped into so many buckets by prompt.
    """

    formats: Mapping[str, tuple[str, SourceOptions]]
    ties: Literal["quarantine", "keep"]
    num_buckets: int


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


def adapt(table: pa.Table, plan: Adaptation) -> pa.Table:
    """Parse, adapt and validate rows; READ_SCHEMA -> ADAPTED_SCHEMA."""
    rows = table.to_pylist()
    columns = {file: columns_of(*plan.formats[file]) for file in {row["file"] for row in rows}}
    leftovers = Leftovers()
    for row in rows:
        name, options = plan.formats[row["file"]]
        row["source"] = options.source
        if row["kind"] == "row" and row["reason"] is None:
            try:
                given = _parse(row["raw"])
                leftovers.add(options.source, columns[row["file"]], given)
                comparison = adapt_one(name, columns[row["file"]], given, options)
                row["source"] = comparison.source
                validate(comparison, ties=plan.ties)
            except RowRejected as exc:
                row["reason"], row["detail"] = exc.reason.value, printable(exc.detail)
            else:
                row["record"] = dump_record(comparison)
                row["prompt_key"] = comparison.prompt_key()
                row["content_key"] = comparison.content_key()
                row["judgement_key"] = comparison.judgement_key()
        # Rows that are already out are spread, so that a bad file does not overfill one bucket.
        key = row.get("prompt_key") or digest([row["file"], row["number"]])
        row["bucket"] = int(key[:15], 16) % plan.num_buckets
        row["raw"] = row["raw"][:RAW_LIMIT]
    if rows:
        rows[0]["leftover"] = leftovers.dump()
    return pa.Table.from_pylist(rows, schema=ADAPTED_SCHEMA)


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
