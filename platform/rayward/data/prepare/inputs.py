"""What `prepare` decides before Ray starts: which files, which formats, which tokenizer, and the fingerprint of it all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayward import storage
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.tokenizer import load_tokenizer, tokenizer_fingerprint
from rayward.data.formats.table import SourceOptions, choose_format
from rayward.data.record import BadRow
from rayward.data.sources.find import Role, SourceFile, find_files
from rayward.data.sources.hub import HUB_PREFIX, download, parse_hub_name
from rayward.data.sources.read import ReadUnit, content_hash, plan_units, sample_rows
from rayward.errors import DataError, DataFormatError
from rayward.schema import digest, identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PREPARATION = 4
"""Raised when the same files and settings would give other rows, so that nobody reads rows of the old rules; not the manifest's version."""


@dataclass(frozen=True)
class Inputs:
    """Everything that the prepared data is a function of.

    Attributes:
        files: in sorted order, train before validation before benchmarks; ignored: files of directories passed over because of their suffix.
        contract, tokenizer: what text is encoded with.
        fingerprint: hash of the files' content, the rules, the seed and the tokenizer.
    """

    files: list[SourceFile]
    ignored: list[str]
    contract: Contract
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


def storage_location(config: Config) -> str:
    """`run.storage_path` as an absolute path or URI, without a slash at the end."""
    return storage.join(storage.absolute(config.run.storage_path))


def inspect_inputs(config: Config) -> Inputs:
    """Find the files, load the tokenizer, compute the fingerprint.

    Raises:
        DataError: a location does not exist, holds no data file, or is named for both roles.
        ContractError: the tokenizer cannot be loaded or used.
    """
    if not config.data.train:
        raise DataError("data.train is empty", remedy="set data.train to files, directories, URIs or hf:owner/name")
    files: list[SourceFile] = []
    ignored: list[str] = []
    roles: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("train", config.data.train),
        ("validation", config.data.validation),
        ("contamination", config.data.contamination),
    )
    for role, locations in roles:
        found, passed_over = find_files([name for name in locations if not name.startswith(HUB_PREFIX)], role)
        hubs = [parse_hub_name(name, role) for name in locations if name.startswith(HUB_PREFIX)]
        files += found + [download(hub, storage.join(storage_location(config), "downloads"), role) for hub in hubs]
        ignored += passed_over
    train = {file.uri for file in files if file.role == "train"}
    for file in files:
        if file.role != "train" and file.uri in train:
            raise DataError(f"{file.uri} is in data.train and in data.{file.role}", remedy="name each file in one of them")
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.revision)
    contract = Contract.from_tokenizer(
        tokenizer,
        max_tokens=config.model.max_tokens,
        template_kwargs=config.model.template_kwargs,
        critique_lead_in=config.data.critique_lead_in,
        templated_text=config.model.templated_text,
        unshown_text=config.model.unshown_text,
    )
    return Inputs(files, ignored, contract, tokenizer, _fingerprint(config, files, contract, tokenizer))


def _fingerprint(config: Config, files: list[SourceFile], contract: Contract, tokenizer: PreTrainedTokenizerBase) -> str:
    # Content and not place: a job submitted twice unpacks the same files into two directories.
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(content_hash, files))
    contents = sorted([file.role, file.source, content] for file, content in zip(files, hashes, strict=True))
    rules = identity(config.data, exclude={"train", "validation", "contamination", "max_bad_fraction"})
    return digest([PREPARATION, contents, rules, config.run.seed, contract.fingerprint(), tokenizer_fingerprint(tokenizer)])


def plan_reads(files: list[SourceFile], config: Config) -> tuple[dict[str, tuple[str, SourceOptions]], list[ReadUnit]]:
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
            formats[file.uri] = _format_of(file, rows, config)
        elif seen:
            undecided.append((file, seen))
    for file, seen in undecided:
        if not formats:
            raise DataError(
                f"{file.uri}: no usable row; none of the first {seen} rows is a JSON object ({BadRow.UNPARSABLE}: {seen})",
                remedy="use JSON lines (one object per line), a JSON list of objects, or Parquet",
            )
        # Any format will do for rows that are no objects; read, they are quarantined and counted.
        name, options = next(iter(formats.values()))
        formats[file.uri] = name, replace(options, source=file.source)
    if not any(file.role == "train" and file.uri in formats for file in files):
        raise DataError(f"{_names(files, 'train')}: no usable row, the data is empty", remedy="check data.train")
    return formats, [unit for unit in units if unit.file.uri in formats]


def _format_of(file: SourceFile, rows: list[dict[str, Any]], config: Config) -> tuple[str, SourceOptions]:
    if file.role == "contamination" and config.data.format != "auto":
        # A benchmark need not have the format of the data.
        try:
            return choose_format(rows, config.data.model_copy(update={"format": "auto"}), where=file.uri, source=file.source)
        except DataFormatError:
            pass
    return choose_format(rows, config.data, where=file.uri, source=file.source)


def _names(files: list[SourceFile], role: Role) -> str:
    names = [file.uri for file in files if file.role == role]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
