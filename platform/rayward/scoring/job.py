"""The scoring job: files of any size through any number of scorers, into parts that are never scored twice.

    units of files ──read tasks──> parts (rows as they stand in the file) ──actors──> result files, each with a record ──> counts

The driver holds the names of units and parts and their counts. Whatever dies, the same call goes on with the parts that are missing.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayward import storage
from rayward.config.placement import Placement
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.data.record import BadRow
from rayward.data.sources.find import SourceFile
from rayward.data.sources.read import RawRow, ReadUnit, read_unit
from rayward.errors import ConfigError, DataError, ModelLoadError, ScoringError
from rayward.model.weights_identity import weights_identity
from rayward.schema import digest, file_sha256, identity
from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.scoring.lines import together
from rayward.scoring.moments import Moments
from rayward.scoring.parts import (
    END,
    EXAMPLE_CHARS,
    JOB_FILE,
    Done,
    End,
    JobFacts,
    OutputFormat,
    Part,
    Progress,
    clean,
    commit,
    finish,
    name_units,
    open_job,
    part_name,
    publish,
    read_done,
    read_progress,
)
from rayward.scoring.rows import FileRow, RowRules, line_of, read_row, score_given, table_of
from rayward.wire.items import ItemResult

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


def _nobody(_: Progress) -> None:
    return


def run_job(
    model: str,
    files: Sequence[SourceFile],
    job: Job,
    *,
    placement: Placement = Placement(),
    notify: Callable[[Progress], object] = lambda _: None,
) -> Done:
    """Score every row of the files that is not scored yet.

    Args:
        model: directory of whatever scores; the same path on every node.
        notify: called after every part.

    Raises:
        ConfigError: the output holds another job, or something else.
        DataError: a file is damaged (whatever is not, is scored before this is said), or there is no row.
        ModelLoadError, ContractError: the model cannot be loaded.
        ScoringError: an actor died, rows were lost, or the model was replaced meanwhile.
    """
    units = name_units(files)
    if not units:
        raise DataError("the files hold no rows", remedy="check the paths")
    done = _begin(model, job, units)
    if done is not None:
        return done
    progress = read_progress(job.place, units)
    missing = [name for name in units if not progress.is_whole(name)]
    if missing:
        damaged = _score_units(model, job, missing, units, progress, placement, notify)
        if damaged:
            raise DataError("\n  ".join(damaged), remedy="restore the files or leave them out; the same command goes on")
    return _finished(job, progress, units)


def _begin(model: str, job: Job, units: Mapping[str, ReadUnit]) -> Done | None:
    # What there is to return if all is done.
    target, place = job.target, job.place
    if target is not None and _exists(target) and not _exists(storage.join(place, JOB_FILE)):
        raise ConfigError(f"{target} exists, and not by this job", remedy="write to another file, or delete this one")
    facts = _facts(model, job)
    open_job(place, facts)
    done = read_done(place)
    if done is None:
        return None
    if target is not None and not _exists(target):
        # The parts went when they were joined, and what they were joined to is gone.
        storage.delete_dir(*storage.resolve(place))
        open_job(place, facts)
        return None
    if done.units == digest(list(units)):
        clean(place, done)
        return done
    if target is not None:
        raise ConfigError(f"{target} holds the scores of other inputs", remedy="write to another file, or delete this one")
    return None


def _score_units(
    model: str,
    job: Job,
    missing: Sequence[str],
    units: Mapping[str, ReadUnit],
    progress: Progress,
    placement: Placement,
    notify: Callable[[Progress], object],
) -> list[str]:
    # Adds to the progress; returns what is damaged.
    from rayward.scoring.batch import pool, reading

    damaged: list[str] = []
    sources = [(name, units[name], frozenset(progress.parts.get(name, ()))) for name in missing]
    work = partial(score_parts, job=job, versions=frozenset(progress.versions))
    blocks = reading(sources, partial(read_parts, rows_per_part=job.rows_per_part), scorers=placement.actors)
    for block in pool(blocks, work, model=str(Path(model).resolve()), placement=placement, rows_per_call=1):
        for name, index, kind, record in zip(*(block[column].to_pylist() for column in _SUMMARY.names), strict=True):
            if kind == "damage":
                damaged.append(record)
            elif kind == "end":
                progress.ends[name] = End.model_validate_json(record)
            else:
                progress.add(name, index, Part.model_validate_json(record))
                notify(progress)
    return damaged


def _finished(job: Job, progress: Progress, units: Mapping[str, ReadUnit]) -> Done:
    lost = [unit.file.uri for name, unit in units.items() if not progress.is_whole(name)]
    if lost:
        raise ScoringError(
            f"rows of {len(lost)} parts of the input were lost, of {lost[0]} for example", remedy="run the same command again"
        )
    if len(progress.versions) > 1:
        raise ScoringError(
            f"the rows were scored by the versions {', '.join(sorted(progress.versions))} of the model; scores are of one",
            remedy="write to another directory, and another model into a directory of its own",
        )
    if not progress.rows:
        raise DataError("the files hold no rows", remedy="check the paths")
    if job.target is not None:
        join(job, progress.names(units))
    return finish(job.place, progress, units, joined=job.target is not None)


def _exists(location: str) -> bool:
    return storage.exists(*storage.resolve(location))


def _facts(model: str, job: Job) -> JobFacts:
    rules = job.rules
    asked = ", ".join(f"{name} {value}" for name, value in rules.asked.given().items())
    return JobFacts(
        model=model_identity(Path(model)),
        output_format=job.output_format,
        rows_per_part=job.rows_per_part,
        keep_columns=rules.keep,
        options=digest([identity(rules.asked), identity(rules.limits), sorted(rules.ignore), rules.reading]),
        described=f"{Path(model).name}, {job.rows_per_part} rows a part, {asked or 'nothing asked'}",
    )


def model_identity(directory: Path) -> str:
    """What tells a model from any other one, without loading it.

    Raises:
        ModelLoadError, ContractError: there is none, or it cannot be read.
    """
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory", remedy="point at an exported or downloaded model")
    kind = rule_kind(directory)
    if kind is not None:
        rule = kind.load(directory)
        names = rule.members if isinstance(rule, EnsembleRule) else (rule.policy, rule.reference) if isinstance(rule, ImplicitRule) else ()
        return digest([identity(rule), *(model_identity(directory / name) for name in names)])
    if (directory / CONTRACT_FILE).is_file():
        contract = Contract.load(directory)
        return digest([contract.model_version(), None if contract.normaliser is None else identity(contract.normaliser)])
    try:
        return digest([weights_identity(directory), *(file_sha256(path) for path in sorted(directory.glob("*.json")))])
    except OSError as exc:
        raise ModelLoadError(f"{directory} cannot be read ({exc})", remedy="check the access rights") from exc


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

_SUMMARY = pa.schema([("name", pa.string()), ("index", pa.int32()), ("kind", pa.string()), ("record", pa.string())])


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
    return pa.Table.from_pylist(found, schema=_SUMMARY)


def _raws(row: Mapping[str, Any]) -> list[RawRow]:
    columns = zip(row["numbers"], row["raws"], row["reasons"], row["details"], strict=True)
    return [RawRow(number, raw, None if reason is None else BadRow(reason), detail) for number, raw, reason, detail in columns]


def _score_part(model: ScoredModel, raws: Sequence[RawRow], job: Job, unit: str, file: str, index: int) -> Part:
    started = time.time()
    rows: list[FileRow] = []
    results: list[ItemResult] = []
    for chunk in together(raws, lambda raw: len(raw.raw)):
        read = [read_row(raw, file, job.rules) for raw in chunk]
        results += score_given(model, [row.given for row in read])
        rows += read
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
    )
    commit(job.place, unit, f"{index:05d}.json", part)
    return part


def _content(rows: Sequence[FileRow], results: Sequence[ItemResult], file: str, model: ScoredModel, job: Job) -> bytes:
    if job.output_format == "jsonl":
        return b"".join(line_of(row, result, file, model) for row, result in zip(rows, results, strict=True))
    sink = io.BytesIO()
    pq.write_table(table_of(rows, results, file, model, keep=job.rules.keep), sink)
    return sink.getvalue()


# ---- at the end -------------------------------------------------------------------------------------------------


def join(job: Job, names: Sequence[str]) -> None:
    """Make one file of parts, in order, a part in memory at a time; it is there whole or not at all."""
    assert job.target is not None
    filesystem, path = storage.resolve(job.target)
    _, root = storage.resolve(job.place)
    partial_path = f"{root}/.joined"
    with filesystem.open_output_stream(partial_path, compression=None) as stream:
        writer = None
        for name in names:
            with filesystem.open_input_file(f"{root}/{name}") as part:
                if job.output_format == "jsonl":
                    stream.write(part.read())
                    continue
                table = pq.read_table(part)
                writer = writer or pq.ParquetWriter(stream, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
    filesystem.move(partial_path, path)
