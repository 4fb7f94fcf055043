"""`rayward score`: items in, rewards or errors out, in the order of the items.

"-"      JSON lines from standard input, answered as they come
files    any that `prepare` reads; without an output their rows go through this process, with one through a job on Ray (`score_job`)
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rayward import storage
from rayward.cluster import connect, lasting
from rayward.config.placement import Placement
from rayward.config.scoring import ScoringConfig
from rayward.config.sources import SourceConfig
from rayward.data.formats.hook import adapter_fingerprint
from rayward.data.sources.hub import HUB_PREFIX
from rayward.errors import ConfigError, DataError
from rayward.schema import digest, identity
from rayward.scoring.lines import chunks, numbered, read_lines, ready_chunks, together
from rayward.wire.items import Asked, ItemError, ItemResult
from rayward.wire.lines import Given, parse_line
from rayward.workflows.console import console

if TYPE_CHECKING:
    from rayward.config.data import DataConfig
    from rayward.data.sources.find import SourceFile
    from rayward.scoring.parts import Done, OutputFormat, Progress
    from rayward.scoring.rows import FileRow, RowRules
    from rayward.scoring.scored_model import ScoredModel


NOTIFY_SECONDS = 10.0

_PATTERN = re.compile(r"[*?\[{]")

STREAM = "-"


@dataclass
class Counts:
    """What became of the rows, for the terminal.

    Attributes:
        rows: all of them.
        errors: those without rewards, by code.
        examples: of each code, where the first one stands and what is wrong with it.
        unused: rows by column that was not read and had a content.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, error: ItemError | None, where: str, unused: Iterable[str] = ()) -> None:
        """One row more."""
        self.rows += 1
        self.unused.update(unused)
        if error is not None:
            self.errors[error.code] += 1
            self.examples.setdefault(error.code, f"{where}: {error.message}")

    def report(self) -> str:
        """In words, a line or more."""
        failed = self.errors.total()
        by_code = ", ".join(f"{code} {count:,}" for code, count in self.errors.most_common())
        lines = [f"rows: {self.rows:,} = {self.rows - failed:,} scored + {failed:,} with an error" + (f" ({by_code})" if failed else "")]
        lines += [f"  {code}, for example {self.examples[code]}" for code, _ in self.errors.most_common() if code in self.examples]
        if self.unused:
            columns = ", ".join(f"{name[:80]!r} ({count / self.rows:.0%} of the rows)" for name, count in self.unused.most_common(20))
            lines.append(f"not used: {columns}")
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def score_lines(
    model: str, lines: Iterable[str | bytes], *, asked: Asked = Asked(), placement: Placement = Placement()
) -> Iterator[dict[str, Any]]:
    """Score JSON lines with the scorer that serving uses; a line that is no valid item gets an error of its own."""
    from rayward.scoring.load import load_scored_model

    scorer = load_scored_model(model, placement)
    for scored in scored_lines(scorer, chunks(numbered(lines)), asked):
        yield from (_values(scorer, line) for line in scored)


def score_stream(
    model: str, stream: IO[bytes], write: Callable[[bytes], object], *, asked: Asked = Asked(), placement: Placement = Placement()
) -> Counts:
    """Score JSON lines as they come: all that wait are scored together, and nobody waits for more.

    Args:
        write: takes result lines, several at once.

    Raises: as the loading of the model; DataError: the stream cannot be read.
    """
    from rayward.scoring.load import load_scored_model
    from rayward.scoring.rows import dump_line

    scorer = load_scored_model(model, placement)
    counts = Counts()
    lines = numbered(read_lines(stream, ScoringConfig().max_body_bytes))
    for scored in scored_lines(scorer, ready_chunks(lines), asked):
        write(b"".join(dump_line(_values(scorer, line)) for line in scored))
        for line in scored:
            counts.add(line.result.error, f"line {line.number}")
    return counts


@dataclass(frozen=True, slots=True)
class ScoredLine:
    """A line, by its number from 1, and what became of it."""

    number: int
    given: Given
    result: ItemResult


def scored_lines(scorer: ScoredModel, waiting: Iterable[list[tuple[int, bytes]]], asked: Asked = Asked()) -> Iterator[list[ScoredLine]]:
    """Numbered lines in chunks, each chunk through the model together."""
    from rayward.scoring.rows import score_given

    limits = ScoringConfig().limits
    for chunk in waiting:
        given = [parse_line(line, limits, asked) for _, line in chunk]
        results = score_given(scorer, given)
        yield [ScoredLine(number, entry, result) for (number, _), entry, result in zip(chunk, given, results, strict=True)]


def _values(scorer: ScoredModel, line: ScoredLine) -> dict[str, Any]:
    from rayward.scoring.rows import result_values

    return {**line.given.echo, **result_values(line.result, scorer.facts.outputs)}


@dataclass(frozen=True)
class ScoreOptions:
    """What `rayward score` was given besides the model, what is asked of it and where it runs.

    Attributes:
        items: locations of files, or `-` alone.
        output: directory for parts, or one file that ends with .jsonl or .parquet; None: standard output.
        output_format: of a directory's parts; None: Parquet.
        keep_columns: the columns of the input stand beside the results.
        ignore: columns that are passed over although they could change the text.
        rows_per_part: of one result file; None: as many as is usual.
        data_config: how rows become comparisons whose completions are scored; None: they are items themselves.
    """

    items: tuple[str, ...] = (STREAM,)
    output: str | None = None
    output_format: str | None = None
    keep_columns: bool = False
    ignore: tuple[str, ...] = ()
    rows_per_part: int | None = None
    data_config: DataConfig | None = None


@dataclass(frozen=True)
class Inputs:
    """Files to score, and how their rows are read."""

    files: tuple[SourceFile, ...]
    rules: RowRules


def find_inputs(options: ScoreOptions, *, asked: Asked = Asked(), download_to: str) -> Inputs:
    """The files that the options name.

    Args:
        download_to: where a data set of the hub is kept.

    Raises:
        DataError: a location does not exist, or is damaged.
        DataFormatError: the format of a file cannot be decided.
    """
    from rayward.data.formats.table import choose_format
    from rayward.data.sources.read import sample_rows
    from rayward.scoring.rows import Adapter, FormatAdapter, RowRules

    config = options.data_config
    sources = (SourceConfig(path=options.items),) if config is None or not config.sources else config.sources
    for source in sources:
        if source.limit is not None:
            raise ConfigError(f"limit is {source.limit}; every row is scored", remedy="leave it out, or give a smaller file")
        _check_paths(source.path)
    found = [(file, source) for source in sources for file in _files(source.path, download_to)]
    adapters: dict[str, Adapter] = {}
    for file, source in found if config is not None else ():
        assert config is not None
        sample, _ = sample_rows(file)
        # Without one readable row there is no format to choose, and every row has an error of its own.
        if sample:
            chosen = choose_format(sample, config, where=file.uri, source=file.source, mapping=source)
            adapters[file.uri] = FormatAdapter(*chosen)
    reading = "" if config is None else digest([identity(config, exclude={"sources"}), *map(_reading, sources)])
    rules = RowRules(asked, ScoringConfig().limits, adapters, reading, options.ignore, options.keep_columns)
    return Inputs(tuple(file for file, _ in found), rules)


def _files(locations: Sequence[str], download_to: str) -> Iterator[SourceFile]:
    from rayward.data.sources.find import find_files, report_passed_over
    from rayward.data.sources.hub import download, parse_hub_name

    local = [location for location in locations if not location.startswith(HUB_PREFIX)]
    for location in locations:
        if location.startswith(HUB_PREFIX):
            yield from download(parse_hub_name(location, "train"), download_to, "train")
    if local:
        found = find_files(local, "validation", every_split=True)
        report_passed_over(found.passed_over)
        yield from found.files


def _reading(source: SourceConfig) -> str:
    # Of a user's own function, what it does counts.
    own = () if source.adapter is None else (adapter_fingerprint(source.adapter),)
    return digest([identity(source, exclude={"path"}), *own])


def _check_paths(locations: Sequence[str]) -> None:
    for location in locations:
        if "://" not in location and not location.startswith(HUB_PREFIX) and not _PATTERN.search(location):
            path = Path(location).expanduser()
            if not path.exists():
                raise DataError(f"{location} cannot be read (no such file or directory)", remedy="check the path")


def score_files(model: str, inputs: Inputs, write: Callable[[bytes], object], *, placement: Placement = Placement()) -> Counts:
    """Score the rows of files in this process, one after the other.

    Args:
        write: takes result lines, several at once.

    Raises: as the loading of the model; DataError: a file is damaged, or there is no row; what was scored before is written.
    """
    from rayward.scoring.load import load_scored_model
    from rayward.scoring.rows import line_of

    scorer = load_scored_model(model, placement)
    counts = Counts()
    for file, (rows, results) in scored_files(scorer, inputs):
        write(b"".join(line_of(row, result, file.uri, scorer) for row, result in zip(rows, results, strict=True)))
        for row, result in zip(rows, results, strict=True):
            counts.add(result.error, f"{file.uri} row {row.number}", row.unused)
    if not counts.rows:
        raise DataError("the files hold no rows", remedy="check the paths")
    return counts


def scored_files(scorer: ScoredModel, inputs: Inputs) -> Iterator[tuple[SourceFile, tuple[list[FileRow], list[ItemResult]]]]:
    """The rows of files with their results, many at once.

    Raises:
        DataError: a file is damaged; most of the rows before have come.
    """
    from rayward.data.sources.read import read_file
    from rayward.scoring.rows import read_row, score_chunks

    for file in inputs.files:
        waiting: deque[list[FileRow]] = deque()

        def read(file: SourceFile = file, waiting: deque[list[FileRow]] = waiting) -> Iterator[list[Given]]:
            for chunk in together(read_file(file), lambda raw: len(raw.raw)):
                waiting.append([read_row(raw, file.uri, inputs.rules) for raw in chunk])
                yield [row.given for row in waiting[-1]]

        for results in score_chunks(scorer, read()):
            yield file, (waiting.popleft(), results)


def score_pipeline(model: str, options: ScoreOptions, *, asked: Asked = Asked(), placement: Placement = Placement()) -> Counts:
    """Score what the options name: results to standard output or to the output, counts to the terminal.

    Raises:
        ConfigError: the options contradict each other, or the output holds something else.
        DataError: the input is not there, is damaged, or holds no row.
        ModelLoadError, ContractError: the model cannot be loaded.
        ScoringError: an actor died, rows were lost, or the model was replaced meanwhile.
    """
    check(options, placement)
    if options.items == (STREAM,):
        counts = score_stream(model, sys.stdin.buffer, _write, asked=asked, placement=placement)
        if counts.errors:
            print(counts.report(), file=sys.stderr)
        return counts
    output = None if options.output is None else lasting(options.output)
    if output is None:
        with tempfile.TemporaryDirectory(prefix="rayward-") as scratch:
            inputs = find_inputs(options, asked=asked, download_to=scratch)
            counts = score_files(model, inputs, _write, placement=placement)
        print(counts.report(), file=sys.stderr)
        return counts
    inputs = find_inputs(options, asked=asked, download_to=f"{storage.absolute(output)}.downloads")
    done = run_scores(model, inputs, output, options, placement=placement)
    counts = Counts(done.rows, Counter(done.errors), dict(done.examples), Counter(done.unused))
    console.print(counts.report(), markup=False, highlight=False, soft_wrap=True)
    rewards, speed = done.rewards, done.rows / max(done.seconds, 1e-9)
    console.print(
        f"rewards: {rewards.count:,}, mean {rewards.mean:.6g}, standard deviation {rewards.deviation:.6g}; {speed:,.1f} rows/s\n"
        f"model version: {done.model_version}\nscores: {output}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return counts


def check(options: ScoreOptions, placement: Placement) -> None:
    """Raises ConfigError: the options contradict each other."""
    if STREAM in options.items and len(options.items) > 1:
        raise ConfigError(f"the items are {', '.join(options.items)}; the rule is - alone, or files", remedy="leave one of them out")
    if options.items == (STREAM,) and (options.output is not None or options.keep_columns or options.data_config or options.ignore):
        problem = "--output, --format, --data, --keep-columns and --ignore are for files, and the items are -"
        raise ConfigError(problem, remedy="give a file")
    if options.output is None and (placement.actors > 1 or placement.gpus_per_actor > 0 or options.output_format or options.rows_per_part):
        raise ConfigError(
            "--scorers, --gpus-per-scorer, --output-format and --rows-per-part are for --output, which is not given",
            remedy="add --output DIR",
        )
    if options.output_format not in (None, "jsonl", "parquet"):
        raise ConfigError(f"--output-format is {options.output_format!r}; the rule is parquet or jsonl", remedy="use one of these")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def run_scores(model: str, inputs: Inputs, output: str, options: ScoreOptions, *, placement: Placement = Placement()) -> Done:
    """Score the rows of files as a job on Ray; the same call goes on with what is missing. Says on the terminal how far it is.

    Raises: as `scoring.job.run_job`.
    """
    from rayward.scoring.job import run_job
    from rayward.scoring.part_work import ROWS_PER_PART, Job

    form = cast("OutputFormat | None", options.output_format)
    job = Job.of(output, inputs.rules, output_format=form, rows_per_part=options.rows_per_part or ROWS_PER_PART)
    connect()
    told = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told
        if (now := time.monotonic()) - told >= NOTIFY_SECONDS:
            told = now
            print(f"{progress.rows:,} rows, {progress.errors.total():,} of them with an error", file=sys.stderr)

    return run_job(model, inputs.files, job, placement=placement, notify=tell)
