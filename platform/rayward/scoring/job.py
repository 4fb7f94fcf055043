"""The scoring job: files of any size through any number of scorers, into parts that are never scored twice.

    units of files ──read tasks──> parts (rows as they stand in the file) ──actors──> result files, each with a record ──> counts

The driver holds the names of units and parts and their counts. Whatever dies, the same call goes on with the parts that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from rayward import storage
from rayward.config.placement import Placement
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.data.sources.find import SourceFile
from rayward.data.sources.read import ReadUnit
from rayward.errors import ConfigError, DataError, ModelLoadError, ScoringError
from rayward.model.weights_identity import weights_identity
from rayward.schema import digest, file_sha256, identity
from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.scoring.part_work import SUMMARY, Job, read_parts, score_parts
from rayward.scoring.parts import (
    JOB_FILE,
    Done,
    End,
    JobFacts,
    Part,
    Progress,
    clean,
    files_in,
    finish,
    name_units,
    open_job,
    read_done,
    read_progress,
)


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
    from rayward.data.prepare.numbering import number_units
    from rayward.scoring.batch import pool, reading

    planned = dict(zip(units, number_units(list(units.values())), strict=True))
    damaged: list[str] = []
    sources = [(name, planned[name], frozenset(progress.parts.get(name, ()))) for name in missing]
    work = partial(score_parts, job=job, versions=frozenset(progress.versions))
    blocks = reading(sources, partial(read_parts, rows_per_part=job.rows_per_part), scorers=placement.actors)
    for block in pool(blocks, work, model=str(Path(model).resolve()), placement=placement, rows_per_call=1):
        for name, index, kind, record in zip(*(block[column].to_pylist() for column in SUMMARY.names), strict=True):
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
    elsewhere = set(progress.names(units)) - files_in(job.place)
    if elsewhere:
        raise DataError(
            f"{job.place} lacks {len(elsewhere)} files that scorers wrote, for example {min(elsewhere)}",
            remedy="write to storage that all nodes share",
        )
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
