"""What `prepare` decides before Ray starts: which files, which formats, which tokenizer, and the fingerprint of it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rayward import storage
from rayward.config.run import Config
from rayward.config.sources import SourceConfig
from rayward.contract.contract import Contract
from rayward.contract.tokenizer import load_tokenizer, tokenizer_fingerprint
from rayward.data.formats.hook import adapter_fingerprint
from rayward.data.formats.table import SourceOptions, choose_format
from rayward.data.record import BadRow
from rayward.data.sources.find import PassedOver, SourceFile, find_files, report_passed_over, without
from rayward.data.sources.fingerprint import content_hashes
from rayward.data.sources.hub import HUB_PREFIX, download, parse_hub_name
from rayward.data.sources.kinds import Role
from rayward.data.sources.read import ReadUnit, plan_units, read_file, sample_rows
from rayward.errors import DataError, DataFormatError
from rayward.schema import digest, identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PREPARATION = 4
"""Raised when the same files and settings would give other rows, so that nobody reads rows of the old rules; not the manifest's version."""


ROLES: tuple[Role, ...] = ("train", "validation", "contamination")


@dataclass(frozen=True)
class Inputs:
    """Everything that the prepared data is a function of.

    Attributes:
        files: in sorted order, train before validation before benchmarks.
        ignored: files of directories that were passed over, and why.
        contract, tokenizer: what text is encoded with.
        fingerprint: hash of the files' content, the rules, the seed and the tokenizer.
        sources: by file, the source that names it.
    """

    files: list[SourceFile]
    ignored: list[PassedOver]
    contract: Contract
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    sources: Mapping[str, SourceConfig]


def storage_location(config: Config) -> str:
    """`run.storage_path` as an absolute path or URI, without a slash at the end."""
    return storage.join(storage.absolute(config.run.storage_path))


def inspect_inputs(config: Config) -> Inputs:
    """Find the files, load the tokenizer, compute the fingerprint.

    Raises:
        DataError: a location does not exist, holds no data file, or is named for both roles.
        ContractError: the tokenizer cannot be loaded or used.
    """
    if not any(source.role == "train" for source in config.data.all_sources):
        raise DataError("data.train is empty", remedy="set data.train (or data.sources) to files, directories, URIs or hf:owner/name")
    files: list[SourceFile] = []
    ignored: list[PassedOver] = []
    sources: dict[str, SourceConfig] = {}
    for source in _grouped(config):
        found, passed_over = _files_of(source, config)
        ignored += passed_over
        for file in found:
            if file.uri in sources:
                roles = sorted({source.role, sources[file.uri].role}, key=ROLES.index)
                named = f"in data.{roles[0]} and in data.{roles[1]}" if len(roles) > 1 else "named by two of data.sources"
                raise DataError(f"{file.uri} is {named}", remedy="name each file in one of them")
            sources[file.uri] = source
        files += found
    files.sort(key=lambda file: ROLES.index(file.role))
    ignored = without(ignored, files)
    report_passed_over(ignored)
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.revision)
    contract = Contract.from_tokenizer(
        tokenizer,
        max_tokens=config.model.max_tokens,
        template_kwargs=config.model.template_kwargs,
        critique_lead_in=config.data.critique_lead_in,
        templated_text=config.model.templated_text,
        unshown_text=config.model.unshown_text,
    )
    fingerprint = _fingerprint(config, files, contract, tokenizer, sources)
    return Inputs(files, ignored, contract, tokenizer, fingerprint, sources)


def _grouped(config: Config) -> list[SourceConfig]:
    # The short form is one source a role, so that a file which two of its globs match counts once.
    named = (config.data.train, config.data.validation, config.data.contamination)
    short = [SourceConfig(path=paths, role=role) for role, paths in zip(ROLES, named, strict=True) if paths]
    return [*short, *config.data.sources]


def _files_of(source: SourceConfig, config: Config) -> tuple[list[SourceFile], list[PassedOver]]:
    found, passed_over = find_files(
        [name for name in source.path if not name.startswith(HUB_PREFIX)], source.role, every_split=source.role == "contamination"
    )
    hubs = [parse_hub_name(name, source.role) for name in source.path if name.startswith(HUB_PREFIX)]
    downloads = storage.join(storage_location(config), "downloads")
    return found + [file for hub in hubs for file in download(hub, downloads, source.role)], passed_over


def _fingerprint(
    config: Config,
    files: list[SourceFile],
    contract: Contract,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, SourceConfig] = MappingProxyType({}),
) -> str:
    # Content and not place: a job submitted twice unpacks the same files into two directories.
    hashes = content_hashes(files)
    rules_of = {file.uri: _rules_of(sources[file.uri]) for file in files}
    contents = sorted([file.role, file.source, content, *rules_of[file.uri]] for file, content in zip(files, hashes, strict=True))
    rules = [identity(config.data, exclude={"train", "validation", "contamination", "sources", "max_bad_fraction"})]
    if config.data.adapter is not None:
        rules.append(adapter_fingerprint(config.data.adapter))
    return digest([PREPARATION, contents, *rules, config.run.seed, contract.fingerprint(), tokenizer_fingerprint(tokenizer)])


def _rules_of(source: SourceConfig) -> list[str]:
    if source == SourceConfig(path=source.path, role=source.role):
        return []
    rules = [identity(source, exclude={"path", "role"})]
    return rules if source.adapter is None else [*rules, adapter_fingerprint(source.adapter)]


def plan_reads(
    files: list[SourceFile], config: Config, sources: Mapping[str, SourceConfig]
) -> tuple[dict[str, tuple[str, SourceOptions]], list[ReadUnit]]:
    """Format of every file by its URI, and the units to read; empty files are left out.

    Raises:
        DataFormatError: the format of a file cannot be decided.
        DataError: a file is damaged, or none holds a usable row.
    """
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(sample_rows, files))
        units = [unit for units in pool.map(plan_units, files) for unit in units]
    formats: dict[str, tuple[str, SourceOptions]] = {}
    undecided: list[tuple[SourceFile, int]] = []
    for file, (rows, seen) in zip(files, samples, strict=True):
        if rows:
            mapping = sources[file.uri]
            formats[file.uri] = _format_of(file, rows, config, mapping)
        elif seen:
            undecided.append((file, seen))
    for file, seen in undecided:
        if not formats:
            raise DataError(
                f"{file.uri}: no usable row; none of the first {seen} rows is a JSON object ({BadRow.UNPARSABLE}: {seen})",
                remedy="use JSON lines (one object per line), a JSON list of objects, CSV with a header, Parquet or Arrow",
            )
        # Any format will do for rows that are no objects; read, they are quarantined and counted.
        name, options = next(iter(formats.values()))
        formats[file.uri] = name, replace(options, source=file.source)
    if not any(file.role == "train" and file.uri in formats for file in files):
        raise DataError(f"{_names(files, 'train')}: no usable row, the data is empty", remedy="check data.train")
    last = _last_rows(files, sources)
    kept = [unit for unit in units if unit.file.uri in formats]
    return formats, [replace(unit, last_number=last[unit.file.uri]) if unit.file.uri in last else unit for unit in kept]


def _last_rows(files: Sequence[SourceFile], sources: Mapping[str, SourceConfig]) -> dict[str, int]:
    """Number of the last row that is used, by file, for sources with a limit; 0: none."""
    left: dict[str, int] = {}
    last: dict[str, int] = {}
    for file in sorted(files, key=lambda file: file.uri):
        source = sources[file.uri]
        if source.limit is None:
            continue
        key = digest(source.model_dump(mode="json"))
        numbers = (raw.number for raw in read_file(file))
        taken = list(islice(numbers, left.setdefault(key, source.limit)))
        left[key] -= len(taken)
        last[file.uri] = taken[-1] if taken else 0
    return last


def _format_of(file: SourceFile, rows: list[dict[str, Any]], config: Config, mapping: SourceConfig) -> tuple[str, SourceOptions]:
    if file.role == "contamination" and mapping.plain and config.data.format != "auto":
        # A benchmark need not have the format of the data.
        try:
            detected = config.data.model_copy(update={"format": "auto"})
            return choose_format(rows, detected, where=file.uri, source=file.source, mapping=mapping)
        except DataFormatError:
            pass
    return choose_format(rows, config.data, where=file.uri, source=file.source, mapping=mapping)


def _names(files: list[SourceFile], role: Role) -> str:
    names = [file.uri for file in files if file.role == role]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
