"""The prepare job: raw preference data in, tokenized shards in their final order out.

    read -> adapt, validate, encode -> keys: duplicates, contradictions, unseen prompts -> sort by a seeded hash of the id -> shards
                      └-> rows on disk ................................................. gathered ........................──^

The rows are written where they are encoded and read where they are needed; only their keys move through Ray. The result is a function
of the rows, the data section of the config, the seed and the tokenizer: neither the number of files nor of CPUs changes an id, a split or
a position. It is cached under the hash of all these.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import ray.data
from pyarrow import fs as pafs
from ray.data import DataContext

from rayward import storage
from rayward.cluster import connect
from rayward.config.run import Config
from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.data.formats.table import SourceOptions, columns_of
from rayward.data.prepare.inputs import Inputs, inspect_inputs, plan_reads, storage_location
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.leftover import unused_columns
from rayward.data.prepare.numbering import number_units
from rayward.data.prepare.numbers import bounds_of, described, has_outliers, quarantine_outliers
from rayward.data.prepare.repeats import repeats_of, train_rows_by_file
from rayward.data.prepare.report import Examples, build_report, most_frequent, read_examples, render_html
from rayward.data.prepare.rows import Adaptation
from rayward.data.prepare.stages import Plan, encoded, judged, overlap, sorted_keys, source_counts
from rayward.data.prepare.stats import SplitStats
from rayward.data.prepare.tally import Tally
from rayward.data.prepare.write import check_shared, open_workspace, publish, scratch, summaries, write_file, write_quarantine, write_split
from rayward.data.prepared import MANIFEST_FILE, Grouping, Manifest, NearDuplicate, PreparedData, ShardEntry, UnusedColumn
from rayward.data.record import BadRow
from rayward.data.sources.read import ReadUnit
from rayward.errors import DataError, TooManyBadRowsError
from rayward.objectives.base import LabelFacts

NOT_BAD = (BadRow.TIE, BadRow.DUPLICATE, BadRow.IN_VALIDATION, BadRow.CONTAMINATED)
"""Reasons that do not count towards `data.max_bad_fraction`: the rows are well-formed, there is only nothing to learn from them."""

SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
NUM_BLOCKS = 256
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 8 * 1024 * 1024, 48 * 1024 * 1024
"""A task encodes a block of input, and every shard gathers its rows from what every task wrote: so they are few, and not small."""


@dataclass(frozen=True)
class _Outcome:
    """What came out of the shards and the quarantine."""

    tally: Tally
    examples: dict[str, list[dict[str, Any]]]
    shards: dict[str, tuple[ShardEntry, ...]]
    stats: dict[str, SplitStats]
    quarantined_sources: dict[str, int]
    overlap: int
    unused: tuple[UnusedColumn, ...]
    numbers: dict[str, dict[str, float]]


def prepare(config: Config) -> PreparedData:
    """Turn the configured sources into a prepared directory, or return the one that exists.

    Args:
        config: `data`, `model` (tokenizer, max_tokens, template_kwargs) and `run` (seed, storage_path) are used.

    Returns:
        The committed directory `<storage_path>/prepared/<fingerprint>`.

    Raises:
        DataError: a path does not exist, a file is damaged, no row is usable, or the storage is not shared by all nodes.
        DataFormatError: the format of a file cannot be decided.
        TooManyBadRowsError: more than `data.max_bad_fraction` of the rows are bad; the quarantine and the report are written.
        ContractError: the tokenizer cannot be loaded or used.
    """
    inputs = inspect_inputs(config)
    directory = storage.join(storage_location(config), "prepared", inputs.fingerprint)
    existing = PreparedData.find(directory)
    if existing is not None:
        problem = _refusal(config, existing.manifest, directory)  # data.max_bad_fraction may have been lowered since
        if problem is not None:
            raise problem
        return existing
    formats, units = plan_reads(inputs.files, config, inputs.sources)
    connect()
    with open_workspace(directory) as workspace, _data_context(units):
        with scratch(workspace) as parts:
            outcome = _run(config, inputs, formats, number_units(units), workspace, parts)
        manifest = _manifest(inputs.fingerprint, config, outcome)
        _write_small_files(workspace, inputs, formats, outcome)
        problem = _refusal(config, manifest, directory, outcome.examples)
        if problem is None:
            check_shared(workspace, manifest)
            write_file(storage.join(workspace, MANIFEST_FILE), manifest.model_dump_json(indent=2).encode() + b"\n")
        publish(workspace, directory)
    if problem is not None:
        raise problem
    return PreparedData.load(directory)


@contextmanager
def _data_context(units: Sequence[ReadUnit]) -> Iterator[None]:
    size = sum(unit.size for unit in units)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = min(max(size // NUM_BLOCKS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    context.enable_progress_bars = sys.stderr.isatty()
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING if context.enable_progress_bars else logging.ERROR)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _run(
    config: Config, inputs: Inputs, formats: Mapping[str, tuple[str, SourceOptions]], units: list[ReadUnit], workspace: str, parts: str
) -> _Outcome:
    policy = _policy(config)
    files = [file.uri for file in inputs.files]
    # Ties are votes too: with them, what is tied is decided when they are counted.
    ties = config.data.ties if policy.votes is None else "keep"
    adaptation = Adaptation(formats, ties, None if policy.joins else policy.rank_by)
    plan = Plan(units, files, adaptation, policy, parts, [ray.put((inputs.contract, inputs.tokenizer))])
    keys = judged(encoded(plan), plan)
    tally = Tally.merged(summaries(keys, partial(Tally.of, files=files)))
    numbers = tally.numbers
    bounds = bounds_of(numbers, config.data.outlier_factor, rated=config.data.attribute_range is None)
    if has_outliers(numbers, bounds):
        keys = keys.map_batches(partial(quarantine_outliers, bounds=bounds), batch_size=None, batch_format="pyarrow").materialize()
        tally = Tally.merged(summaries(keys, partial(Tally.of, files=files)))
    if tally.damaged:
        raise DataError("\n  ".join(tally.damaged), remedy="restore the files or remove them from the configuration")
    used, quarantined = tally.splits.total(), tally.quarantined.total()
    counted = f"{tally.read} rows were read, {used} used, {tally.num_merged} merged into them and {quarantined} quarantined"
    assert tally.read == used + tally.num_merged + quarantined, counted
    examples = write_quarantine(keys, tally.quarantined, workspace, parts, files)
    repeats = _repeats(inputs, keys, files)
    ordered = sorted_keys(keys, used, repeats)
    num_used = Counter(tally.splits)
    if repeats:
        num_used["train"] = ordered.count() - num_used["validation"]
    sources = source_counts(keys, tally.read, tally.sources)
    trained = source_counts(ordered, ordered.count()) if repeats else sources
    shards: dict[str, tuple[ShardEntry, ...]] = {}
    stats: dict[str, SplitStats] = {}
    for place, split in enumerate(SPLITS):
        shards[split], found = write_split(ordered, split, num_used[split], config.data.rows_per_shard, workspace, parts)
        of_split = {source: counts[place] for source, counts in sorted(trained.items()) if counts[place]}
        stats[split] = found.model_copy(update={"sources": of_split})
    out = {source: counts[2] for source, counts in sources.items() if counts[2]}
    unused = _unused(tally, formats)
    described_numbers = described(numbers, bounds, config.data.attributes)
    return _Outcome(tally, examples, shards, stats, out, overlap(keys), unused, described_numbers)


def _unused(tally: Tally, formats: Mapping[str, tuple[str, SourceOptions]]) -> tuple[UnusedColumn, ...]:
    settings = {options.source: columns_of(name, options).settings or {} for name, options in formats.values()}
    rows: Counter[str] = Counter()
    for file, count in tally.files.items():
        rows[formats[file][1].source] += count
    return unused_columns(tally.columns, rows, settings)


def _repeats(inputs: Inputs, keys: ray.data.Dataset, files: Sequence[str]) -> dict[int, float]:
    rows: Counter[str] = Counter()
    if any(source.share is not None for source in inputs.sources.values()):
        for part in summaries(keys, lambda table: json.dumps(train_rows_by_file(table))):
            rows.update({files[int(number)]: count for number, count in json.loads(part).items()})
    return {files.index(file): times for file, times in repeats_of(inputs.sources, rows).items()}


def _policy(config: Config) -> Policy:
    rank_by = config.data.rank_by
    return Policy(
        config.run.seed,
        0.0 if config.data.holds_out else config.data.validation_fraction,
        config.data.too_long,
        config.data.ties,
        config.data.merge_prompts,
        None if rank_by is None else (config.data.attributes.index(rank_by), rank_by),
        group_tokens=config.group_tokens,
        step_separator=config.data.step_separator or DEFAULT_SEPARATOR,
        votes=None if config.data.votes == "quarantine" else config.data.votes,
        split_by=config.data.split_by,
    )


def _manifest(fingerprint: str, config: Config, outcome: _Outcome) -> Manifest:
    train, validation = outcome.stats["train"], outcome.stats["validation"]
    both = SplitStats.merged([train, validation])
    return Manifest(
        fingerprint=fingerprint,
        num_input_rows=outcome.tally.read,
        num_train=train.num_rows,
        num_validation=outcome.tally.splits["validation"],
        num_merged=outcome.tally.num_merged,
        num_repeated=train.num_rows - outcome.tally.splits["train"],
        unused_columns=outcome.unused,
        grouping=Grouping(**outcome.tally.grouping),
        num_quarantined=dict(sorted(outcome.tally.quarantined.items())),
        train_shards=outcome.shards["train"],
        validation_shards=outcome.shards["validation"],
        longest_comparison_tokens=both.longest_comparison,
        longest_conversation_tokens=both.longest_conversation,
        total_train_tokens=train.tokens,
        total_train_tokens_unshared=train.tokens_unshared,
        length_histogram=train.lengths,
        max_completions=both.max_completions,
        labels=LabelFacts(
            attributes=config.data.attributes,
            num_unranked=both.missing.get("ranks", 0),
            num_unrated=both.num_unrated,
            num_without_strength=both.missing.get("strength", 0),
            num_without_steps=both.missing.get("step_labels", 0),
            num_with_shares=both.num_with_shares,
            missing=both.missing,
            weakest=both.weakest,
            strongest=both.strongest,
        ),
        sources=train.sources,
        near_duplicates=outcome.tally.near_duplicates,
        near_duplicate_examples=tuple(NearDuplicate(file=f, row=r, like=like) for f, r, like in outcome.tally.near_examples),
        contamination=_contamination(outcome.tally),
    )


def _contamination(tally: Tally) -> dict[str, int]:
    """Rows by benchmark that they stand in, also by those that none stands in."""
    return {file: tally.contaminated[file] for file in sorted({*tally.benchmark, *tally.contaminated})}


def _refusal(config: Config, manifest: Manifest, directory: str, examples: Examples | None = None) -> DataError | None:
    """The error that the counts call for, if any; without examples they are those of the report."""
    counts = ", ".join(f"{reason}: {count}" for reason, count in manifest.num_quarantined.items())

    def told(passed_over: Sequence[str]) -> str:
        return most_frequent(manifest.num_quarantined, read_examples(directory) if examples is None else examples, passed_over)

    where = f"the rows and reasons are in {directory}/quarantine, the report is {directory}/report.html"
    if manifest.num_train == 0:
        return DataError(
            f"{', '.join(config.data.train_paths)}: no usable train row among {manifest.num_input_rows} "
            f"({counts or 'all rows are held out'})" + told(()),
            remedy=where,
        )
    bad = sum(count for reason, count in manifest.num_quarantined.items() if reason not in NOT_BAD)
    if bad > config.data.max_bad_fraction * manifest.num_input_rows:
        return TooManyBadRowsError(
            f"{bad} of {manifest.num_input_rows} rows are bad ({bad / manifest.num_input_rows:.1%}), data.max_bad_fraction is "
            f"{config.data.max_bad_fraction:.1%}; by reason: {counts}" + told(NOT_BAD),
            remedy=f"{where}; correct the data, or raise data.max_bad_fraction",
        )
    return None


def _write_small_files(workspace: str, inputs: Inputs, formats: Mapping[str, tuple[str, SourceOptions]], outcome: _Outcome) -> None:
    report = build_report(
        fingerprint=inputs.fingerprint,
        num_input_rows=outcome.tally.read,
        quarantined=outcome.tally.quarantined,
        quarantined_by_source=outcome.quarantined_sources,
        examples=outcome.examples,
        train=outcome.stats["train"],
        validation=outcome.stats["validation"],
        files=[file.uri for file in inputs.files],
        ignored_files=[str(other) for other in inputs.ignored],
        formats=Counter(name for name, _ in formats.values()),
        overlap=outcome.overlap,
        near_duplicates=outcome.tally.near_duplicates,
        near_examples=outcome.tally.near_examples,
        contamination=_contamination(outcome.tally),
        unread=outcome.tally.unread,
        num_merged=outcome.tally.num_merged,
        grouping=Grouping(**outcome.tally.grouping),
        numbers=outcome.numbers,
        unused=outcome.unused,
    )
    with tempfile.TemporaryDirectory() as scratch:
        inputs.tokenizer.save_pretrained(f"{scratch}/tokenizer")
        inputs.contract.save(Path(scratch))
        Path(scratch, "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Path(scratch, "report.html").write_text(render_html(report), encoding="utf-8")
        filesystem, path = storage.resolve(workspace)
        pafs.copy_files(scratch, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
