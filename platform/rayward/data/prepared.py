"""What a prepared directory says about itself: `manifest.json`, and the sums that its shards are described by.

<directory>/manifest.json        written last: a directory without it is not prepared
            train/*.parquet, validation/*.parquet    rows of comparison.PREPARED_SCHEMA, `row` counts from 0 per split
            quarantine/<reason>*.jsonl               rows that were not used, one file or more per reason
            report.json, report.html                 for people
            tokenizer/, contract.json                what the token ids were made with
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs
from pydantic import BaseModel, ConfigDict

from rayward import storage
from rayward.errors import DataError
from rayward.objectives.base import LabelFacts
from rayward.schema import Frozen, Versioned

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 3
LENGTH_BIN = 32
"""Width of one histogram bin in tokens; a bin is named by its upper bound, inclusive."""


class SplitStats(BaseModel):
    """Sums over the rows of one split; sums of parts merge into the sums of the whole.

    Attributes:
        tokens: prefix once plus all branches; tokens_unshared counts the prefix once per completion.
        longest_comparison: tokens of the largest row; longest_conversation: prefix plus its longest branch.
        lengths, prompt_lengths, completion_lengths: histograms over `LENGTH_BIN` bins (rows, rows, completions).
        longer_wins, shorter_wins, equal_length: pairs with a winner, by which one has more tokens.
        tied_pairs: pairs of equal rank.
        truncated: rows in which at least one conversation lost its oldest turns.
        num_unranked, num_unrated, num_without_strength: rows without ranks, without a single rating, without a strength;
            num_without_steps: rows without labels of steps.
        weakest, strongest: range of the strengths, None without any.
    """

    model_config = ConfigDict(extra="forbid")
    num_rows: int = 0
    tokens: int = 0
    tokens_unshared: int = 0
    longest_comparison: int = 0
    longest_conversation: int = 0
    max_completions: int = 0
    num_unranked: int = 0
    num_unrated: int = 0
    num_without_strength: int = 0
    num_without_steps: int = 0
    weakest: float | None = None
    strongest: float | None = None
    lengths: dict[int, int] = {}
    prompt_lengths: dict[int, int] = {}
    completion_lengths: dict[int, int] = {}
    longer_wins: int = 0
    shorter_wins: int = 0
    equal_length: int = 0
    tied_pairs: int = 0
    truncated: int = 0
    sources: dict[str, int] = {}

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Sums over prepared rows; `table` has the columns of PREPARED_SCHEMA and `truncated`."""
        stats = cls()
        lengths, prompts, completions, sources = Counter[int](), Counter[int](), Counter[int](), Counter[str]()
        columns = [table.column(name).to_pylist() for name in ("ranks", "attributes", "strength", "step_labels", "source", "truncated")]
        prefixes = _sizes(table.column("prefix_ids"))
        flat = iter(_sizes(pc.list_flatten(table.column("branch_ids"))))
        branches = [[next(flat) for _ in range(count)] for count in _sizes(table.column("branch_ids"))]
        for prefix, branch, ranks, attributes, strength, steps, source, truncated in zip(prefixes, branches, *columns, strict=True):
            shared = prefix + sum(branch)
            stats.num_rows += 1
            stats.tokens += shared
            stats.tokens_unshared += prefix * len(branch) + sum(branch)
            stats.longest_comparison = max(stats.longest_comparison, shared)
            stats.longest_conversation = max(stats.longest_conversation, prefix + max(branch))
            stats.max_completions = max(stats.max_completions, len(branch))
            stats.num_unranked += ranks is None
            stats.num_unrated += attributes is None or all(math.isnan(rating) for row in attributes for rating in row)
            stats.num_without_strength += strength is None
            stats.num_without_steps += steps is None
            stats.weakest = _extreme(min, stats.weakest, strength)
            stats.strongest = _extreme(max, stats.strongest, strength)
            stats.truncated += bool(truncated)
            lengths[bin_of(shared)] += 1
            prompts[bin_of(prefix)] += 1
            completions.update(bin_of(length) for length in branch)
            sources[source] += 1
            if ranks is not None:
                stats._count_pairs(ranks, branch)
        stats.lengths, stats.prompt_lengths, stats.completion_lengths = dict(lengths), dict(prompts), dict(completions)
        stats.sources = dict(sources)
        return stats

    def _count_pairs(self, ranks: Sequence[float], lengths: Sequence[int]) -> None:
        for i in range(len(ranks)):
            for j in range(i):
                if ranks[i] == ranks[j]:
                    self.tied_pairs += 1
                elif lengths[i] == lengths[j]:
                    self.equal_length += 1
                elif (ranks[i] < ranks[j]) == (lengths[i] > lengths[j]):
                    self.longer_wins += 1
                else:
                    self.shorter_wins += 1

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """The sums of the whole; independent of the order of the parts."""
        total = cls()
        for part in parts:
            for name, value in part:
                mine = getattr(total, name)
                if isinstance(value, dict):
                    setattr(total, name, dict(Counter(mine) + Counter(value)))
                elif name in ("weakest", "strongest"):
                    setattr(total, name, _extreme(min if name == "weakest" else max, mine, value))
                elif name.startswith(("longest", "max")):
                    setattr(total, name, max(mine, value))
                else:
                    setattr(total, name, mine + value)
        for name, value in total:
            if isinstance(value, dict):
                setattr(total, name, dict(sorted(value.items())))
        return total


def bin_of(tokens: int) -> int:
    """Upper bound of the histogram bin, e.g. 1..32 -> 32, 33..64 -> 64; 0 -> 0."""
    return math.ceil(tokens / LENGTH_BIN) * LENGTH_BIN


def _extreme(choose: Callable[[float, float], float], mine: float | None, value: float | None) -> float | None:
    if mine is None or value is None:
        return value if mine is None else mine
    return choose(mine, value)


def _sizes(column: pa.ChunkedArray) -> list[int]:
    sizes: list[int] = pc.list_value_length(column).to_pylist()
    return sizes


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
        unfit: rows left because their group is larger than `data.group_tokens`, or one of its completions is quarantined.
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


class Manifest(Versioned):
    """Counts of a prepared directory. num_input_rows = num_train + num_validation + num_merged + sum(num_quarantined.values()).

    Attributes:
        num_quarantined: rows by reason (values of `BadRow`).
        longest_comparison_tokens: over both splits, prefix and all branches; sizes token budgets.
        longest_conversation_tokens: over both splits, prefix and the longest branch; at most the contract's `max_tokens`.
        total_train_tokens: prefix once and branches; total_train_tokens_unshared: the prefix once per completion.
        length_histogram: train rows by upper bound of tokens (see `LENGTH_BIN`).
        num_merged: rows whose completions stand in another row's comparison (`data.merge_prompts`, `data.group_pairs`).
        grouping: what `data.group_pairs` did, over both splits.
        labels: what is known about the labels, over both splits.
        sources: train rows by source.
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

    def shard_paths(self, split: Literal["train", "validation"]) -> list[str]:
        """Absolute paths or URIs of the shards in row order."""
        shards = self.manifest.train_shards if split == "train" else self.manifest.validation_shards
        return [f"{self.directory}/{shard.file}" for shard in shards]


PREPARED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # position in the prepared order, 0-based, without gaps
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt_key", pa.string(), nullable=False),
        pa.field("prefix_ids", pa.list_(pa.int32()), nullable=False),  # token ids shared by all completions, computed once
        pa.field("branch_ids", pa.list_(pa.list_(pa.int32())), nullable=False),  # K lists, each ends with the scored token
        pa.field("ranks", pa.list_(pa.float32())),
        pa.field("margin", pa.float32()),
        pa.field("strength", pa.float32()),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("attributes", pa.list_(pa.list_(pa.float32()))),
        pa.field("text_starts", pa.list_(pa.int32()), nullable=False),  # of each completion: where the language-model loss begins
        pa.field("step_ends", pa.list_(pa.list_(pa.int32()))),  # of each completion: last token of every step
        pa.field("step_labels", pa.list_(pa.list_(pa.float32()))),
        pa.field("prompt_json", pa.string(), nullable=False),  # the text form, for evaluation with any other model
        pa.field("completions_json", pa.string(), nullable=False),
        pa.field("critiques_json", pa.string()),
    ]
)
"""Schema of `train/*.parquet` and `validation/*.parquet` in a prepared directory."""
