"""What the tasks and actors of a scoring job do: read parts of files, score them, commit them. No Ray."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayward import storage
from rayward.data.record import BadRow
from rayward.data.sources.read import ReadUnit, read_unit
from rayward.data.sources.rows import RawRow
from rayward.errors import ConfigError, DataError, ScoringError
from rayward.scoring.lines import together
from rayward.scoring.moments import Moments
from rayward.scoring.parts import END, EXAMPLE_CHARS, End, OutputFormat, Part, commit, part_name, publish
from rayward.scoring.rows import FileRow, RowRules, line_of, read_row, score_chunks, table_of
from rayward.wire.items import ItemResult
from rayward.wire.lines import Given

if TYPE_CHECKING:
    from rayward.scoring.scored_model import ScoredModel


ROWS_PER_PART = 2048
"""Rows of one result file; what is lost when a scorer dies."""

PART_BYTES = 32 * 1024 * 1024
"""A part of longer rows has fewer."""

SUFFIXES: Mapping[str, OutputFormat] = {".jsonl": "jsonl", ".parquet": "parquet"}
"""Ends of an output that is one file."""

_TASK = pa.schema(
    [
        ("unit", pa.string()), ("file", pa.string()), ("part", pa.int32()), ("parts", pa.int32()), ("rows", pa.int64()),
        ("damage", pa.string()),
        ("numbers", pa.list_(pa.int64())), ("raws", pa.large_list(pa.large_string())),
        ("reasons", pa.list_(pa.string())), ("details", pa.list_(pa.string())),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is scored, how, and into what.

    Attributes:
        place: directory of the parts: absolute local path that all nodes share, or URI.
        target: the one file that the parts become; None: they stay.
        rules: how rows become items.
        output_format: of the parts.
        rows_per_part: rows of one.
    """

    place: str
    target: str | None
    rules: RowRules
    output_format: OutputFormat
    rows_per_part: int = ROWS_PER_PART

    @classmethod
    def of(cls, output: str, rules: RowRules, *, output_format: OutputFormat | None = None, rows_per_part: int = ROWS_PER_PART) -> Job:
        """The job for an output as it is given: a directory, or a file that ends with .jsonl or .parquet.

        Raises:
            ConfigError: the file's end and the format contradict each other.
        """
        output = storage.absolute(output)
        by_name = next((form for suffix, form in SUFFIXES.items() if storage.split_options(output)[0].endswith(suffix)), None)
        if by_name is None:
            return cls(output, None, rules, output_format or "parquet", rows_per_part)
        if output_format not in (None, by_name):
            raise ConfigError(f"--output is {output} and --output-format {output_format}", remedy="leave one of them out")
        place, options = storage.split_options(output)
        folder, _, name = place.rpartition("/")
        return cls(f"{folder}/.{name}.parts{options}", output, rules, by_name, rows_per_part)


# ---- in a read task ---------------------------------------------------------------------------------------------


def read_parts(source: tuple[str, ReadUnit, frozenset[int]], *, rows_per_part: int) -> Iterator[pa.Table]:
    """The parts of a unit that are not committed, a table of one row each; then one that says how many there are, or what is damaged.

    Where a part begins and ends is a matter of the file alone.
    """
    name, unit, done = source
    part = rows = size = 0
    waiting: list[RawRow] = []

    def task(**values: Any) -> pa.Table:
        return pa.Table.from_pylist([{"unit": name, "file": unit.file.uri, **values}], schema=_TASK)

    def flushed() -> Iterator[pa.Table]:
        if waiting and part not in done:
            yield task(
                part=part,
                numbers=[raw.number for raw in waiting],
                raws=[raw.raw for raw in waiting],
                reasons=[None if raw.reason is None else raw.reason.value for raw in waiting],
                details=[raw.detail for raw in waiting],
            )

    try:
        for raw in read_unit(unit):
            waiting.append(raw)
            rows, size = rows + 1, size + len(raw.raw)
            if len(waiting) == rows_per_part or size >= PART_BYTES:
                yield from flushed()
                part, size, waiting = part + 1, 0, []
    except DataError as exc:
        yield task(damage=exc.problem)
        return
    yield from flushed()
    yield task(parts=part + bool(waiting), rows=rows)


# ---- in an actor ------------------------------------------------------------------------------------------------

SUMMARY = pa.schema([("name", pa.string()), ("index", pa.int32()), ("kind", pa.string()), ("record", pa.string())])


def score_parts(model: ScoredModel, table: pa.Table, *, job: Job, versions: frozenset[str]) -> pa.Table:
    """Score parts and commit them.

    Args:
        versions: of the model that scored what is committed.

    Returns:
        For each row of the table the unit, the part, `part`, `end` or `damage`, and its record.

    Raises:
        ScoringError: the model is another one than before.
    """
    if versions - {model.version}:
        raise ScoringError(
            f"{job.place} holds scores of version {', '.join(sorted(versions))} of the model, which is {model.version} now",
            remedy="write to another directory, and another model into a directory of its own",
        )
    found = []
    for row in table.to_pylist():
        unit, file = row["unit"], row["file"]
        if row["damage"] is not None:
            found.append({"name": unit, "index": -1, "kind": "damage", "record": row["damage"]})
            continue
        if row["parts"] is not None:
            end = End(parts=row["parts"], rows=row["rows"])
            commit(job.place, unit, END, end)
            found.append({"name": unit, "index": -1, "kind": "end", "record": end.model_dump_json()})
            continue
        part = _score_part(model, _raws(row), job, unit, file, row["part"])
        found.append({"name": unit, "index": row["part"], "kind": "part", "record": part.model_dump_json()})
    return pa.Table.from_pylist(found, schema=SUMMARY)


def _raws(row: Mapping[str, Any]) -> list[RawRow]:
    columns = zip(row["numbers"], row["raws"], row["reasons"], row["details"], strict=True)
    return [RawRow(number, raw, None if reason is None else BadRow(reason), detail) for number, raw, reason, detail in columns]


def _score_part(model: ScoredModel, raws: Sequence[RawRow], job: Job, unit: str, file: str, index: int) -> Part:
    started, cpu = time.time(), time.process_time()
    rows: list[FileRow] = []
    results: list[ItemResult] = []

    def read() -> Iterator[list[Given]]:
        for chunk in together(raws, lambda raw: len(raw.raw)):
            found = [read_row(raw, file, job.rules) for raw in chunk]
            rows.extend(found)
            yield [row.given for row in found]

    for scored in score_chunks(model, read()):
        results += scored
    errors: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row, result in zip(rows, results, strict=True):
        if result.error is not None:
            errors[result.error.code] += 1
            text = f"{file} row {row.number}: {result.error.message}"
            examples.setdefault(result.error.code, text[:EXAMPLE_CHARS].encode("utf-8", "backslashreplace").decode())
    name = part_name(unit, file, index, job.output_format)
    publish(storage.join(job.place, name), _content(rows, results, file, model, job))
    part = Part(
        file=name,
        rows=len(rows),
        errors=errors,
        examples=examples,
        unused=Counter(column for row in rows for column in row.unused),
        rewards=Moments.of(reward for result in results for reward in result.rewards or ()),
        version=model.version,
        started=started,
        finished=time.time(),
        cpu_seconds=time.process_time() - cpu,
    )
    commit(job.place, unit, f"{index:05d}.json", part)
    return part


def _content(rows: Sequence[FileRow], results: Sequence[ItemResult], file: str, model: ScoredModel, job: Job) -> bytes:
    if job.output_format == "jsonl":
        return b"".join(line_of(row, result, file, model) for row, result in zip(rows, results, strict=True))
    sink = io.BytesIO()
    pq.write_table(table_of(rows, results, file, model, keep=job.rules.keep), sink)
    return sink.getvalue()
