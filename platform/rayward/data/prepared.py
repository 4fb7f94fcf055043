"""A prepared directory: the manifest, the rows of its shards, and the one way to read them.

<directory>/manifest.json        written last: a directory without it is not prepared
            train/*.parquet, validation/*.parquet    rows of PREPARED_SCHEMA, `row` counts from 0 per split
            quarantine/<reason>*.jsonl               rows that were not used, one file or more per reason
            report.json, report.html                 for people
            tokenizer/, contract.json                what the token ids were made with
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import Field

from rayward import storage
from rayward.batch.comparison import EncodedComparison, Float32, Labels
from rayward.data.record import Comparison, dense_ranks
from rayward.errors import DataError
from rayward.objectives.base import LabelFacts
from rayward.schema import Frozen, Versioned

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 3


class ShardEntry(Frozen):
    """One Parquet file, relative to the prepared directory."""

    file: str
    num_rows: int


class Grouping(Frozen):
    """What `data.group_pairs` did with the ranked rows that share a completion with another one.

    Attributes:
        groups: comparisons made; joined: rows that they were made of.
        incomplete: rows left as they were, because their judgements do not order every two completions.
        contradictory: rows left because by their judgements a completion is better than itself.
        apart: rows left because they carry a margin, a strength or ratings, or have another source or weight than the rest.
        unfit: rows left because their group is larger than `data.group_tokens`.
    """

    groups: int = 0
    joined: int = 0
    incomplete: int = 0
    contradictory: int = 0
    apart: int = 0
    unfit: int = 0

    def left(self) -> str:
        """The rows that did not join, by reason, in words; empty without any."""
        reasons = ("incomplete", "contradictory", "apart", "unfit")
        return ", ".join(f"{reason} {getattr(self, reason):,}" for reason in reasons if getattr(self, reason))


class NearDuplicate(Frozen):
    """A row that differs from another one in case, spaces and punctuation only; both are used, in the same split.

    Attributes:
        file, row: where it stands.
        like: where the other one stands.
    """

    file: str
    row: int
    like: str


class UnusedColumn(Frozen):
    """A column of a source that no adapter reads.

    Attributes:
        type: of its values, in words; num_rows: rows where it says anything; share: the same, of the rows of the source.
        setting: what would have it read; None: only a mapping.
    """

    source: str
    column: str
    type: str
    num_rows: int
    share: float
    setting: str | None = None

    def __str__(self) -> str:
        """As the terminal says it."""
        setting = f"; {self.setting} would have it read" if self.setting else ""
        return f"{self.column} ({self.type}, {100 * self.share:.3g} % of rows{setting})"


class Manifest(Versioned):
    """Counts of a prepared directory.

    num_input_rows + num_repeated = num_train + num_validation + num_merged + sum(num_quarantined.values()).

    Attributes:
        num_quarantined: rows by reason (values of `BadRow`).
        longest_comparison_tokens: over both splits, prefix and all branches; sizes token budgets.
        longest_conversation_tokens: over both splits, prefix and the longest branch; at most the contract's `max_tokens`.
        total_train_tokens: prefix once and branches; total_train_tokens_unshared: the prefix once per completion.
        length_histogram: train rows by upper bound of tokens (see `stats.LENGTH_BIN`).
        num_merged: rows whose completions stand in another row's comparison (`data.merge_prompts`, `data.group_pairs`).
        grouping: what `data.group_pairs` did, over both splits.
        num_repeated: training rows beyond the first use of each (`repeat` and `share` of `data.sources`).
        unused_columns: columns that nothing reads, by source.
        labels: what is known about the labels, over both splits.
        sources: train rows by source; of very many the largest, and the others as one.
        near_duplicates: rows in use that differ from another one in case, spaces and punctuation only, and some of them.
        contamination: quarantined rows by file of `data.contamination`.
    """

    kind: ClassVar[str] = "manifest"
    remedy: ClassVar[str] = "delete the directory and prepare again"
    oldest: ClassVar[int] = 3
    version: int = MANIFEST_VERSION
    fingerprint: str
    num_input_rows: int
    num_train: int
    num_validation: int
    num_merged: int = 0
    num_repeated: int = 0
    unused_columns: tuple[UnusedColumn, ...] = ()
    grouping: Grouping = Grouping()
    num_quarantined: dict[str, int]
    train_shards: tuple[ShardEntry, ...]
    validation_shards: tuple[ShardEntry, ...]
    longest_comparison_tokens: int
    longest_conversation_tokens: int
    total_train_tokens: int
    total_train_tokens_unshared: int
    length_histogram: dict[int, int]
    max_completions: int
    labels: LabelFacts = LabelFacts()
    sources: dict[str, int]
    near_duplicates: int = 0
    near_duplicate_examples: tuple[NearDuplicate, ...] = ()
    contamination: dict[str, int] = Field(default_factory=dict)

    def told_unused(self, limit: int = 20) -> list[str]:
        """The unused columns as the terminal says them, a line for each source."""
        return told_unused(self.unused_columns, limit)


def told_unused(columns: Sequence[UnusedColumn], limit: int = 20) -> list[str]:
    """Columns that nothing reads as the terminal says them, a line for each source."""
    by_source: dict[str, list[UnusedColumn]] = {}
    for each in columns:
        by_source.setdefault(each.source, []).append(each)
    return [
        f"not used of {source}: {', '.join(map(str, listed[:limit]))}" + (f" and {len(listed) - limit} more" if listed[limit:] else "")
        for source, listed in by_source.items()
    ]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A committed prepared directory.

    Attributes:
        directory: absolute local path or URI.
        manifest: its counts.
    """

    directory: str
    manifest: Manifest

    @classmethod
    def load(cls, directory: str) -> Self:
        """Read the manifest.

        Raises:
            DataError: the directory is not prepared, its manifest is damaged, or of a version that is not read here.
        """
        prepared = cls.find(directory)
        if prepared is None:
            raise DataError(f"{directory} holds no {MANIFEST_FILE}", remedy="run `rayward prepare`, or point at a directory that it wrote")
        return prepared

    @classmethod
    def find(cls, directory: str) -> Self | None:
        """Like `load`, but None where nothing is committed.

        Raises:
            DataError: the manifest is damaged or of a version that is not read here.
        """
        filesystem, path = storage.resolve(directory)
        file = f"{path}/{MANIFEST_FILE}"
        if filesystem.get_file_info(file).type != pafs.FileType.File:
            return None
        with filesystem.open_input_stream(file) as stream:
            text = stream.read()
        manifest = Manifest.parse(text, where=f"{directory}/{MANIFEST_FILE}", error=DataError)
        return cls(directory if "://" in directory else path, manifest)

    def tables(self, split: Literal["train", "validation"], columns: Sequence[str], *, max_rows: int | None = None) -> Iterator[pa.Table]:
        """The rows of a split in order, shard by shard: the next one is read when it is asked for, by the caller itself.

        Read tasks of Ray Data would wait for ever on a cluster whose CPUs are all held by the actors that the rows are for.

        Args:
            columns: names in PREPARED_SCHEMA.
            max_rows: tables of at most so many rows; None: a table a shard.

        Raises:
            DataError: a shard is missing or damaged, or holds another number of rows than the manifest says.
        """
        shards = self.manifest.train_shards if split == "train" else self.manifest.validation_shards
        for shard in shards:
            table = self._read(shard, columns)
            step = max_rows or max(table.num_rows, 1)
            yield from (table.slice(start, step) for start in range(0, table.num_rows, step))

    def _read(self, shard: ShardEntry, columns: Sequence[str]) -> pa.Table:
        where = storage.join(self.directory, shard.file)
        filesystem, path = storage.resolve(where)
        remedy = "restore the file, or delete the directory and prepare again"
        try:
            with filesystem.open_input_file(path) as stream:
                file = pq.ParquetFile(stream)
                known = set(file.schema_arrow.names)
                table = with_columns(file.read([name for name in columns if name in known]), columns)
        except FileNotFoundError as exc:
            raise DataError(f"{where} is missing", remedy=remedy) from exc
        except (OSError, ValueError, pa.ArrowException) as exc:  # ValueError: a null where none may be
            raise DataError(f"{where} cannot be read ({exc})", remedy=remedy) from exc
        if table.num_rows != shard.num_rows:
            raise DataError(f"{where} holds {table.num_rows} rows; {MANIFEST_FILE} says {shard.num_rows}", remedy=remedy)
        return table


@dataclass(frozen=True, slots=True)
class Label:
    """One kind of label: a field of `Comparison`, a column of the prepared rows and a field of `Labels`, under one name.

    Attributes:
        column: null where the label is unknown.
        read: from the column's value to that of `Labels`; an unknown label has the default there.
        write: from the value of `Comparison` to the column's.
        rare: most data has none, so rows without it are not counted as missing.
    """

    column: pa.Field
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value
    rare: bool = False


def _floats(values: Sequence[float]) -> Float32:
    return np.array(values, dtype=np.float32)


def _rows_of_floats(values: Sequence[Sequence[float]]) -> tuple[Float32, ...]:
    return tuple(_floats(row) for row in values)


LABELS = (
    # Renumbered: fp32 would make ties of large ranks that differ by little.
    Label(pa.field("ranks", pa.list_(pa.float32())), _floats, dense_ranks),
    Label(pa.field("margin", pa.float32()), float),
    Label(pa.field("strength", pa.float32()), float),
    Label(pa.field("weight", pa.float32(), nullable=False), float),
    Label(pa.field("attributes", pa.list_(pa.list_(pa.float32()))), _floats),
    Label(pa.field("step_labels", pa.list_(pa.list_(pa.float32()))), _rows_of_floats),
    Label(pa.field("vote_shares", pa.list_(pa.float32())), _floats, rare=True),
)
LABEL_COLUMNS = tuple(label.column.name for label in LABELS)

PREPARED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # position in the prepared order, 0-based, without gaps
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt_key", pa.string(), nullable=False),
        pa.field("prefix_ids", pa.list_(pa.int32()), nullable=False),  # token ids shared by all completions, computed once
        pa.field("branch_ids", pa.list_(pa.list_(pa.int32())), nullable=False),  # K lists, each ends with the scored token
        pa.field("text_starts", pa.list_(pa.int32()), nullable=False),  # of each completion: where the language-model loss begins
        pa.field("step_ends", pa.list_(pa.list_(pa.int32()))),  # of each completion: last token of every step
        *(label.column for label in LABELS),
        pa.field("prompt_json", pa.string(), nullable=False),  # the text form, for evaluation with any other model
        pa.field("completions_json", pa.string(), nullable=False),
        pa.field("critiques_json", pa.string()),
        pa.field("inputs_json", pa.string()),  # tools and chat_template_kwargs, where a row has them
    ]
)
"""Schema of `train/*.parquet` and `validation/*.parquet` in a prepared directory."""


def with_columns(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """These columns in the types of PREPARED_SCHEMA; labels that were added after the rows were written are unknown.

    Raises:
        pyarrow.ArrowException: another column is absent, or has another type.
    """
    for name in columns:
        field = PREPARED_SCHEMA.field(name)
        if field.nullable and name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise pa.ArrowKeyError(f"there is no column {', '.join(absent)}")
    return table.select(list(columns)).cast(pa.schema([PREPARED_SCHEMA.field(name) for name in columns]))


COMPARISON_COLUMNS = ("id", "prefix_ids", "branch_ids", "text_starts", "step_ends", *LABEL_COLUMNS)
"""What `comparisons_from_table` reads."""


def label_columns(comparison: Comparison) -> dict[str, Any]:
    """The labels of a record as values of their columns."""
    values = {label.column.name: (label.write, getattr(comparison, label.column.name)) for label in LABELS}
    return {name: None if value is None else write(value) for name, (write, value) in values.items()}


def _labels_of(row: Mapping[str, Any]) -> Labels:
    return Labels(**{label.column.name: label.read(value) for label in LABELS if (value := row[label.column.name]) is not None})


def comparisons_from_table(table: pa.Table) -> list[EncodedComparison]:
    """Prepared rows (COMPARISON_COLUMNS) as encoded comparisons; their token ids are read-only views of the table."""
    ids = ("prefix_ids", "branch_ids")
    rows = table.select([name for name in COMPARISON_COLUMNS if name not in ids]).to_pylist()
    return [
        EncodedComparison(
            id=row["id"],
            prefix_ids=prefix.values.to_numpy(),
            branch_ids=tuple(branch.values.to_numpy() for branch in branches.values),
            labels=_labels_of(row),
            text_starts=tuple(row["text_starts"]),
            step_ends=None if row["step_ends"] is None else tuple(tuple(ends) for ends in row["step_ends"]),
        )
        for row, prefix, branches in zip(rows, *(table.column(name) for name in ids), strict=True)
    ]
