"""Sums over the rows of a split, made where the rows are and merged on the driver."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from rayward.data.prepared import LABELS

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
        missing: by label column, rows in which the label is unknown; num_unrated: rows without a single rating;
            num_with_shares: rows with shares of votes.
        trimmed: rows in which the template cut white space around a completion; changed: rows of which it changed or left out more, which
            the contract accepts; change: one such change in words.
        weakest, strongest: range of the strengths, None without any.
    """

    model_config = ConfigDict(extra="forbid")
    num_rows: int = 0
    tokens: int = 0
    tokens_unshared: int = 0
    longest_comparison: int = 0
    longest_conversation: int = 0
    max_completions: int = 0
    missing: dict[str, int] = {}
    num_unrated: int = 0
    num_with_shares: int = 0
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
    trimmed: int = 0
    changed: int = 0
    change: str | None = None
    sources: dict[str, int] = {}

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Sums over prepared rows; `table` has the columns of PREPARED_SCHEMA and `truncated`."""
        expected = [label.column.name for label in LABELS if not label.rare]
        stats = cls(missing={name: count for name in expected if (count := table.column(name).null_count)})
        stats.num_with_shares = table.num_rows - table.column("vote_shares").null_count
        lengths, prompts, completions, sources = Counter[int](), Counter[int](), Counter[int](), Counter[str]()
        columns = [table.column(name).to_pylist() for name in ("ranks", "attributes", "strength", "source", "truncated")]
        stats.trimmed = pc.sum(table.column("trimmed")).as_py() or 0
        stats.changed = table.num_rows - table.column("changed").null_count
        stats.change = pc.min(table.column("changed")).as_py()
        prefixes = _sizes(table.column("prefix_ids"))
        flat = iter(_sizes(pc.list_flatten(table.column("branch_ids"))))
        branches = [[next(flat) for _ in range(count)] for count in _sizes(table.column("branch_ids"))]
        for prefix, branch, ranks, attributes, strength, source, truncated in zip(prefixes, branches, *columns, strict=True):
            shared = prefix + sum(branch)
            stats.num_rows += 1
            stats.tokens += shared
            stats.tokens_unshared += prefix * len(branch) + sum(branch)
            stats.longest_comparison = max(stats.longest_comparison, shared)
            stats.longest_conversation = max(stats.longest_conversation, prefix + max(branch))
            stats.max_completions = max(stats.max_completions, len(branch))
            stats.num_unrated += attributes is None or all(math.isnan(rating) for row in attributes for rating in row)
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
                elif name in ("weakest", "strongest", "change"):
                    setattr(total, name, _extreme(max if name == "strongest" else min, mine, value))
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


def _extreme(choose: Callable[[Any, Any], Any], mine: Any, value: Any) -> Any:
    if mine is None or value is None:
        return value if mine is None else mine
    return choose(mine, value)


def _sizes(column: pa.ChunkedArray) -> list[int]:
    sizes: list[int] = pc.list_value_length(column).to_pylist()
    return sizes
