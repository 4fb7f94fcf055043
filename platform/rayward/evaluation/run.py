"""The evaluation job: held-out comparisons -> scores (Ray Data, with the scorer that serving uses) -> numbers and report.

Every given row comes back as one `Record`, scored or with the reason why not; a row that is lost on the way is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.config.placement import Placement
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.contract.conversation import text_of
from rayward.data.prepared import told_unused
from rayward.errors import ConfigError, DataError, ModelLoadError, ScoringError
from rayward.evaluation.held_out import HeldOut, read_prepared, read_raw
from rayward.evaluation.plots import write_plots
from rayward.evaluation.records import Evaluation, Record
from rayward.evaluation.report import write_report
from rayward.evaluation.suites.base import Suite
from rayward.evaluation.summary import summarise
from rayward.wire.items import Asked

UNKNOWN_VERSION = "unknown"
"""Of a model that scored no row."""
SCORES_FILE, METRICS_FILE, REPORT_FILE, PLOT_FOLDER = "scores.jsonl", "metrics.json", "report.html", "plots"


def evaluate(
    *,
    model: str,
    output: str,
    data: Sequence[str] | None = None,
    prepared: str | None = None,
    data_config: DataConfig | None = None,
    asked: Asked = Asked(),
    placement: Placement = Placement(),
    benchmark: Suite | None = None,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Score held-out comparisons and write `scores.jsonl`, `metrics.json`, `report.html` and `plots/*.png`.

    Args:
        model: directory of an export, or of any Hugging Face sequence-classification reward model.
        output: local directory for the results; created, older results in it are replaced.
        data: raw files, globs, directories, URIs or `hf:` names, in any format that `prepare` reads.
        prepared: a prepared directory, whose validation shards are used; exactly one of the two is given.
        data_config: format and column names for `data`.
        asked: of the model, besides the texts; figures are of raw rewards.
        placement: where the scorers run, and how many.
        benchmark: add the figures of a published benchmark (`suites.table.choose`), whose subset is each row's `source`.
        bootstrap_samples: resamples of prompts behind each interval.
        seed: of the resampling.

    Raises:
        ConfigError: not exactly one of `data` and `prepared` is given, or `output` is not local.
        DataError: the data cannot be read, holds no scored pair, or is not that of the benchmark.
        ModelLoadError, ContractError: the model cannot be loaded or is not the one of its contract.
        ScoringError: rows were lost on the way.
    """
    if bool(data) == bool(prepared):
        raise ConfigError(
            f"data is {data!r} and prepared is {prepared!r}; the rule is exactly one of them",
            remedy="give raw files with data, or a prepared directory with prepared",
        )
    directory = _local_directory(output)
    _require_model(model)
    raw_config = data_config or parse_config({}, DataConfig)
    held_out = read_prepared(prepared) if prepared else read_raw(data or (), raw_config, download_to=str(directory / "downloads"))
    if benchmark is not None:
        benchmark.check((row["id"], row["source"], row["ranks"]) for row in _judged(held_out))
    scored: dict[int, Record] = {}
    version = UNKNOWN_VERSION
    if held_out.tables:
        from rayward.scoring.batch import score_blocks

        scored, version = collect(score_blocks(held_out.tables, model=str(Path(model).resolve()), asked=asked, placement=placement))
    records = merge(held_out, scored)
    write_scores(records, directory / SCORES_FILE)
    where = (prepared,) if prepared else tuple(data or ())
    evaluation = summarise(records, model=model, model_version=version, data=where, bootstrap_samples=bootstrap_samples, seed=seed)
    if held_out.unused:
        evaluation = evaluation.model_copy(update={"unused_columns": tuple(told_unused(held_out.unused))})
    if benchmark is not None:
        evaluation = evaluation.model_copy(update={"benchmark": benchmark.aggregate(records)})
    write_results(evaluation, directory)
    return evaluation


def _local_directory(output: str) -> Path:
    if "://" in output:
        raise ConfigError(f"output {output!r} is a URI; reports are written to a local directory", remedy="give a local path")
    Path(output).mkdir(parents=True, exist_ok=True)
    return Path(output)


def write_results(evaluation: Evaluation, directory: Path) -> tuple[Path, ...]:
    """Write `metrics.json`, the plots and `report.html`; returns the plots."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / METRICS_FILE).write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
    plots = write_plots(evaluation, directory / PLOT_FOLDER)
    write_report(evaluation, directory / REPORT_FILE, plots)
    return plots


def write_scores(records: Iterable[Record], path: Path) -> None:
    """Write one JSON line per record."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(record.model_dump_json() + "\n")


def read_scores(path: Path) -> list[Record]:
    """Read what `write_scores` wrote; `summarise` makes every table of it again.

    Raises:
        DataError: the file cannot be read or a line is not a record.
    """
    records = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    records.append(Record.model_validate_json(line))
                except ValidationError as exc:
                    raise DataError(f"{path}, line {number}, is not a scored comparison: {exc}", remedy="evaluate again") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror})", remedy="point at scores.jsonl of an evaluation") from exc
    return records


def merge(held_out: HeldOut, scored: dict[int, Record]) -> list[Record]:
    """All records in the order of the given rows.

    Raises:
        ScoringError: not every row came back, or one came back that was not sent.
    """
    positions = sorted([*scored, *held_out.rejected])
    if len(positions) != held_out.num_rows:
        raise ScoringError(
            f"{held_out.num_rows} rows were given, {len(scored)} came back from scoring and {len(held_out.rejected)} were rejected; "
            "the rule is that the counts add up",
            remedy="the prepared directory changed or lost a shard: prepare again",
        )
    return [scored[position] if position in scored else held_out.rejected[position] for position in positions]


def to_record(row: dict[str, Any]) -> Record:
    """One scored row of the dataset as a record: the texts go, their lengths stay."""
    error = row["error"] or {"code": None, "message": None}
    return Record(
        id=row["id"],
        source=row["source"],
        prompt_key=row["prompt_key"],
        ranks=None if row["ranks"] is None else tuple(row["ranks"]),
        lengths=tuple(len(text_of(completion)) for completion in json.loads(row["completions_json"])),
        rewards=None if row["rewards"] is None else tuple(row["rewards"]),
        error_code=error["code"],
        error=error["message"],
    )


def _require_model(model: str) -> None:
    # Before the data is read: what is wrong with the name or the contract is said at once.
    directory = Path(model)
    if not directory.is_dir():
        raise ModelLoadError(f"{model} is not a directory", remedy="point at an exported or downloaded model")
    if (directory / CONTRACT_FILE).is_file():
        Contract.load(directory)


def _judged(held_out: HeldOut) -> Iterator[dict[str, Any]]:
    for table in held_out.tables:
        yield from table.select(["id", "source", "ranks"]).to_pylist()


def collect(blocks: Iterable[pa.Table]) -> tuple[dict[int, Record], str]:
    """The scored rows by position, and the version of the model that scored them.

    Raises:
        ScoringError: a row came back twice, or the model was replaced meanwhile: every actor loads it for itself, and may load it again.
    """
    records: dict[int, Record] = {}
    versions: set[str] = set()
    for block in blocks:
        for row in block.to_pylist():
            position = row["row"]
            if position in records:
                raise ScoringError(f"row {position} was scored twice", remedy="the shards repeat rows: prepare again")
            records[position] = to_record(row)
            versions.add(row["version"])
    if len(versions) > 1:
        raise ScoringError(
            f"the rows were scored by the versions {', '.join(sorted(versions))} of the model; an evaluation is of one",
            remedy="evaluate again, and write another model into a directory of its own",
        )
    return records, versions.pop() if versions else UNKNOWN_VERSION
