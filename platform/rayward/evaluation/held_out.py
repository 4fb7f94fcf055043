"""What is evaluated: the validation rows of a prepared directory, or raw files of any format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from rayward.config.data import DataConfig
from rayward.config.sources import SourceConfig
from rayward.data.formats.table import adapt, choose_format, columns_of
from rayward.data.prepare.leftover import Leftovers, unused_columns
from rayward.data.prepared import PreparedData, UnusedColumn
from rayward.data.record import BadRow, Comparison, RowRejected, validate
from rayward.data.sources.find import SourceFile, find_files, report_passed_over
from rayward.data.sources.hub import HUB_PREFIX, download, parse_hub_name
from rayward.data.sources.read import read_file, sample_rows
from rayward.data.sources.rows import RawRow
from rayward.errors import DataError
from rayward.evaluation.records import Record

ROWS_PER_BLOCK = 256

INPUT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("prompt_key", pa.string()),
        pa.field("ranks", pa.list_(pa.float32())),
        pa.field("prompt_json", pa.string()),
        pa.field("completions_json", pa.string()),
        pa.field("inputs_json", pa.string()),
    ]
)
"""What goes through Ray Data: these columns of a prepared directory, or the same made of raw files.

The driver reads both: a held-out set is small.
"""


@dataclass(frozen=True)
class HeldOut:
    """What to score, and what cannot be: together every given row.

    Attributes:
        tables: blocks in INPUT_SCHEMA, small enough that several scorers share the work.
        rejected: position and record of the rows that are no valid comparison.
        num_rows: rows given, both kinds together.
        unused: columns of raw files that nothing reads.
    """

    tables: tuple[pa.Table, ...]
    rejected: dict[int, Record]
    num_rows: int
    unused: tuple[UnusedColumn, ...] = ()


def read_prepared(directory: str) -> HeldOut:
    """The validation shards of a prepared directory.

    Raises:
        DataError: it is not prepared, it holds no validation rows, or a shard cannot be read.
    """
    prepared = PreparedData.load(directory)
    num_rows = prepared.manifest.num_validation
    if not num_rows:
        raise DataError(
            f"{directory} holds no validation rows", remedy="prepare with data.validation_fraction above 0, or evaluate raw files with data"
        )
    tables = tuple(prepared.tables("validation", INPUT_SCHEMA.names, max_rows=ROWS_PER_BLOCK))
    return HeldOut(tables=tables, rejected={}, num_rows=num_rows)


def read_raw(locations: Sequence[str], config: DataConfig, *, download_to: str) -> HeldOut:
    """Raw files of any format as blocks of comparisons; rows that are none are kept as records with the reason.

    Args:
        locations: files that are read as they are; not looked at where `config.sources` names them with a mapping.
        config: formats, columns and mappings.
        download_to: where hub data sets are stored.

    Raises:
        DataError: a location does not exist or is damaged.
        DataFormatError: the format of a file cannot be decided.
    """
    rejected: dict[int, Record] = {}
    rows: list[dict[str, Any]] = []
    position = 0
    leftovers = Leftovers()
    by_source, settings, taken = Counter[str](), dict[str, Mapping[str, str]](), Counter[tuple[str, ...]]()
    for file, mapping in _files(config.sources or (SourceConfig(path=tuple(locations), role="validation"),), download_to):
        sample, _ = sample_rows(file)
        # Without one readable row there is no format to choose, and every row is rejected for its own reason.
        chosen = choose_format(sample, config, where=file.uri, source=file.source, mapping=mapping) if sample else None
        columns = None if chosen is None else columns_of(*chosen)
        source = file.source if chosen is None else chosen[1].source
        settings[source] = (columns and columns.settings) or {}
        for raw in read_file(file) if mapping.limit is None else islice(read_file(file), mapping.limit - taken[mapping.path]):
            taken[mapping.path] += 1
            by_source[source] += 1
            try:
                row = _parsed(raw)
                if chosen is None or columns is None:
                    raise RowRejected(BadRow.UNPARSABLE, "the row is not a JSON object")
                leftovers.add(source, columns, row)
                comparison = adapt(chosen[0], columns, row, chosen[1])
                validate(comparison, ties="keep")
                rows.append(_input_row(position, comparison))
            except RowRejected as exc:
                rejected[position] = _rejected(file, raw, exc)
            position += 1
    if position == 0:
        raise DataError(f"{', '.join(locations)}: the files hold no rows", remedy="check the paths")
    starts = range(0, len(rows), ROWS_PER_BLOCK)
    tables = tuple(pa.Table.from_pylist(rows[start : start + ROWS_PER_BLOCK], INPUT_SCHEMA) for start in starts)
    unused = unused_columns(json.loads(leftovers.dump() or "{}"), by_source, settings)
    return HeldOut(tables=tables, rejected=rejected, num_rows=position, unused=unused)


def _files(sources: Sequence[SourceConfig], download_to: str) -> Iterator[tuple[SourceFile, SourceConfig]]:
    for source in sources:
        local = [location for location in source.path if not location.startswith(HUB_PREFIX)]
        for location in source.path:
            if location.startswith(HUB_PREFIX):
                for file in download(parse_hub_name(location, "validation"), download_to, "validation"):
                    yield file, source
        if local:
            found = find_files(local, "validation")
            report_passed_over(found.passed_over)
            yield from ((file, source) for file in found.files)


def _parsed(raw: RawRow) -> dict[str, Any]:
    if raw.reason is not None:
        raise RowRejected(raw.reason, raw.detail)
    try:
        value = json.loads(raw.raw)
    except (ValueError, RecursionError) as exc:
        raise RowRejected(BadRow.UNPARSABLE, f"the row is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RowRejected(BadRow.UNPARSABLE, "the row is not a JSON object")
    return value


def _input_row(position: int, comparison: Comparison) -> dict[str, Any]:
    return {
        "row": position,
        "id": comparison.id,
        "source": comparison.source,
        "prompt_key": comparison.prompt_key(),
        "ranks": comparison.ranks,
        "prompt_json": json.dumps(comparison.prompt, ensure_ascii=False),
        "completions_json": json.dumps(comparison.completions, ensure_ascii=False),
        "inputs_json": comparison.inputs.to_json(),
    }


def _rejected(file: SourceFile, raw: RawRow, exc: RowRejected) -> Record:
    return Record(
        id=f"{file.source}:{raw.number}",
        source=file.source,
        prompt_key="",
        ranks=None,
        lengths=(),
        rewards=None,
        error_code=exc.reason.value,
        error=exc.detail,
    )
