"""The row-level steps of `prepare`, as functions from Arrow table to Arrow table. No Ray: `prepare` maps them over blocks.

Every input row stays in the stream to the end: a step that cannot use a row fills `reason` and `detail` and passes it on.
Text travels as ASCII-escaped JSON, because Arrow strings cannot hold the lone surrogates that quarantine has to report.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rayward.data.comparison import (
    PREPARED_SCHEMA,
    BadRow,
    Comparison,
    RowRejected,
    digest,
    ranked_by,
    validate,
)
from rayward.data.files import BATCH_ROWS, RawRow, ReadUnit, read_unit
from rayward.data.grouping import fold
from rayward.data.records import dump_record, joined, load_record
from rayward.data.sources import FORMATS, SourceOptions
from rayward.errors import DataError
from rayward.reading import DEFAULT_SEPARATOR

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


@dataclass(frozen=True, slots=True)
class Policy:
    """Who goes where.

    Attributes:
        seed: seeds the split and the order.
        validation_fraction: share of prompts of the train sources that is held out.
        too_long: policy for conversations that lose turns.
        ties: policy for completions of equal rank.
        merge_prompts: unranked rows of one prompt become one comparison.
        rank_by: column and name of the attribute that ranks what is unranked.
        group_tokens: ranked rows of one prompt join into groups of at most so many tokens; None: they stay rows.
        step_separator: text between two steps of a completion.
    """

    seed: int
    validation_fraction: float
    too_long: Literal["truncate", "quarantine"]
    ties: Literal["quarantine", "keep"] = "quarantine"
    merge_prompts: bool = False
    rank_by: tuple[int, str] | None = None
    group_tokens: int | None = None
    step_separator: str = DEFAULT_SEPARATOR


def read(unit: ReadUnit) -> Iterator[pa.Table]:
    """Rows of one unit in tables of READ_SCHEMA, then one line with their number; a damaged file becomes a `damaged` line."""
    total = 0
    batch: list[RawRow] = []
    damage: str | None = None
    try:
        for raw in read_unit(unit):
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
        ],
        schema=READ_SCHEMA,
    )


def adapt(table: pa.Table, plan: Adaptation) -> pa.Table:
    """Parse, adapt and validate rows; READ_SCHEMA -> ADAPTED_SCHEMA."""
    rows = table.to_pylist()
    for row in rows:
        name, options = plan.formats[row["file"]]
        row["source"] = options.source
        if row["kind"] == "row" and row["reason"] is None:
            try:
                comparison = FORMATS[name].adapt(_parse(row["raw"]), options)
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


def judge(table: pa.Table, policy: Policy) -> pa.Table:
    """Split by prompt; mark duplicates, contradictions and train rows whose prompt stands in validation.

    `table` holds whole buckets: all rows of a prompt. Of equal rows the one with the smallest record stays, so that the result does not
    depend on files or their order; only between rows equal to the letter the first of the first file stays.
    """
    names = ("role", "prompt_key", "content_key", "judgement_key", "reason", "detail", "file", "number")
    role, prompt, content, judgement, reasons, details, file, number = (table.column(name).to_pylist() for name in names)
    records = table.column("record")
    in_validation: dict[str, int] = {}
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, key in enumerate(content):
        if key is not None and reasons[index] is None:
            groups[role[index], key].append(index)
            if role[index] == "validation":
                in_validation[prompt[index]] = index
    for (where, _), members in groups.items():
        if where == "train" and prompt[members[0]] in in_validation:
            other = in_validation[prompt[members[0]]]
            for index in members:
                reasons[index], details[index] = BadRow.IN_VALIDATION, f"the prompt is also that of row {number[other]} of {file[other]}"
        elif len({judgement[index] for index in members}) > 1:
            for index in members:
                other = next(i for i in members if judgement[i] != judgement[index])
                reasons[index] = BadRow.CONTRADICTION
                details[index] = f"row {number[other]} of {file[other]} judges the same completions otherwise"
        elif len(members) > 1:
            kept, *copies = sorted(members, key=lambda i: (records[i].as_py(), file[i], number[i]))
            for index in copies:
                reasons[index], details[index] = BadRow.DUPLICATE, f"the same as row {number[kept]} of {file[kept]}"
    splits: list[str | None] = [None] * table.num_rows
    for index, key in enumerate(content):
        if key is not None and reasons[index] is None:
            splits[index] = "validation" if role[index] == "validation" or _held_out(prompt[index], policy) else "train"
    kinds, texts = table.column("kind").to_pylist(), records.to_pylist()
    if policy.merge_prompts or policy.rank_by is not None:
        _join_unranked(_Rows(kinds, prompt, texts, splits, reasons, details), policy)
    changed = {"kind": kinds, "record": texts, "reason": reasons, "detail": details, "split": splits}
    for name, values in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    sides = {side: {key for key, split in zip(prompt, splits, strict=True) if split == side} for side in ("train", "validation")}
    overlap = {"kind": "overlap", "number": len(sides["train"] & sides["validation"]), "raw": ""}
    table = pa.concat_tables([table, pa.Table.from_pylist([overlap], schema=ADAPTED_SCHEMA)])
    return table if policy.group_tokens is None else fold(table)


@dataclass(frozen=True, slots=True)
class _Rows:
    # Columns of a bucket, changed in place.
    kinds: list[str]
    prompts: list[str | None]
    records: list[str]
    splits: list[str | None]
    reasons: list[str | None]
    details: list[str | None]


def _join_unranked(rows: _Rows, policy: Policy) -> None:
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    unranked: dict[int, Comparison] = {}
    for index, split in enumerate(rows.splits):
        if split is None:
            continue
        comparison = load_record(rows.records[index])
        if comparison.ranks is None:
            unranked[index] = comparison
            groups[split, rows.prompts[index] if policy.merge_prompts else f"row {index}"].append(index)  # type: ignore[index]
    for members in groups.values():
        kept, *others = sorted(members, key=lambda index: rows.records[index])
        comparison = joined([unranked[index] for index in (kept, *others)])
        try:
            if policy.rank_by is not None:
                comparison = ranked_by(comparison, *policy.rank_by)
            validate(comparison, ties=policy.ties)
        except RowRejected as exc:
            for index in members:
                rows.splits[index], rows.reasons[index], rows.details[index] = None, exc.reason.value, printable(exc.detail)
            continue
        rows.records[kept] = dump_record(comparison)
        for index in others:
            rows.kinds[index], rows.splits[index] = "merged", None


def _held_out(prompt_key: str, policy: Policy) -> bool:
    return int(digest([policy.seed, "split", prompt_key])[:16], 16) < policy.validation_fraction * 2.0**64
