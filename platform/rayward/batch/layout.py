"""Comparisons -> micro-batches: shared prefixes once, no padding, the same number of micro-batches for every rank.

A comparison becomes one segment: its prefix tokens once, then each completion as a branch whose positions continue from
the end of the prefix. A micro-batch is one row of whole segments, so nothing is padded. Models that cannot share a
prefix get one padded row per completion instead (`layout="padded"`). Pure numpy; no torch.

Shapes: T tokens in the row, N completions in the micro-batch, S branches + prefixes ("spans") in the segment table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rayward.batch.comparison import EncodedComparison, Float32, Int32, Labels
from rayward.contract.reading import Place

Layout = Literal["packed", "padded"]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch as arrays; `comparisons` may be empty (a rank without work in this micro-batch).

    Attributes:
        input_ids, position_ids: int64 [R, T]; R is 1 in the packed layout, N in the padded one.
        segments: int64 [S, 4], packed layout only: (prefix start, prefix length, branch start, branch length) per
            branch. Spans are half-open columns of the row; every token belongs to a prefix or to one branch.
        attention_mask: int64 [R, T], padded layout only: 1 for real tokens, which stand at the left.
        end_row, end_column: int64 [N], the last token of each completion, comparison by comparison.
        read_row, read_column: int64 [R], where the head is read, completion by completion; the ends, unless the head is read elsewhere.
        num_reads: int64 [N], readings of each completion; they add up to R.
        gate_column: int64 [N], where a gated head reads the prompt (in the rows of `end_row`); None unless every comparison says it.
    """

    comparisons: tuple[EncodedComparison, ...]
    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64] | None
    attention_mask: npt.NDArray[np.int64] | None
    end_row: npt.NDArray[np.int64]
    end_column: npt.NDArray[np.int64]
    read_row: npt.NDArray[np.int64]
    read_column: npt.NDArray[np.int64]
    num_reads: npt.NDArray[np.int64]
    gate_column: npt.NDArray[np.int64] | None = None

    @property
    def labels(self) -> list[Labels]:
        """Labels of the comparisons, with the number of outputs that their completions have."""
        if len(self.read_row) == len(self.end_row):
            return [comparison.labels for comparison in self.comparisons]
        stops = np.cumsum([comparison.num_completions for comparison in self.comparisons])
        counts = np.split(self.num_reads, stops[:-1])
        return [replace(c.labels, num_reads=tuple(n.tolist())) for c, n in zip(self.comparisons, counts, strict=True)]

    def columns(self, completion: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Columns of positions in a completion's conversation, in the row `end_row[completion]`."""
        if self.segments is None:
            return positions
        return _packed_columns(positions, self.segments[completion])

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        return int(self.input_ids.size)

    @property
    def num_real_tokens(self) -> int:
        if not self.comparisons:
            return 0
        return self.num_computed_tokens if self.attention_mask is None else int(self.attention_mask.sum())


def pack(comparisons: Sequence[EncodedComparison], *, layout: Layout = "packed", pad_token_id: int = 0, read: Place = "end") -> PackedBatch:
    """Lay comparisons out as one micro-batch, in the order given, to be read at their ends, steps or tokens."""
    if not comparisons:
        return _empty_batch(layout, pad_token_id)
    batch = _pack_shared(comparisons) if layout == "packed" else _pack_padded(comparisons, pad_token_id)
    if read == "end":
        return batch
    positions = [places for comparison in comparisons for places in comparison.read_positions(read)]
    num_reads = np.array([len(places) for places in positions], dtype=np.int64)
    return replace(
        batch,
        read_row=np.repeat(batch.end_row, num_reads),
        read_column=np.concatenate([batch.columns(index, places) for index, places in enumerate(positions)]),
        num_reads=num_reads,
    )


def _empty_batch(layout: Layout, pad_token_id: int) -> PackedBatch:
    # One dummy token: ZeRO-3 gathers in lock step, so a rank without work must still run the layers.
    one = np.full((1, 1), pad_token_id, dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    return PackedBatch(
        comparisons=(),
        input_ids=one,
        position_ids=np.zeros((1, 1), dtype=np.int64),
        segments=np.array([[0, 0, 0, 1]], dtype=np.int64) if layout == "packed" else None,
        attention_mask=np.ones((1, 1), dtype=np.int64) if layout == "padded" else None,
        end_row=none,
        end_column=none,
        read_row=none,
        read_column=none,
        num_reads=none,
    )


def _pack_shared(comparisons: Sequence[EncodedComparison]) -> PackedBatch:
    ids: list[Int32] = []
    positions: list[npt.NDArray[np.int64]] = []
    segments: list[tuple[int, int, int, int]] = []
    cursor = 0
    for comparison in comparisons:
        start, prefix_length = cursor, len(comparison.prefix_ids)
        ids.append(comparison.prefix_ids)
        positions.append(np.arange(prefix_length, dtype=np.int64))
        cursor += prefix_length
        for branch in comparison.branch_ids:
            ids.append(branch)
            positions.append(np.arange(prefix_length, prefix_length + len(branch), dtype=np.int64))
            segments.append((start, prefix_length, cursor, len(branch)))
            cursor += len(branch)
    table = np.array(segments, dtype=np.int64)
    end_row, end_column = np.zeros(len(segments), dtype=np.int64), table[:, 2] + table[:, 3] - 1
    return PackedBatch(
        comparisons=tuple(comparisons),
        input_ids=np.concatenate(ids).astype(np.int64)[None],
        position_ids=np.concatenate(positions)[None],
        segments=table,
        attention_mask=None,
        end_row=end_row,
        end_column=end_column,
        read_row=end_row,
        read_column=end_column,
        num_reads=np.ones_like(end_row),
        gate_column=_gate_columns(comparisons, table),
    )


def _gate_columns(comparisons: Sequence[EncodedComparison], segments: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
    # A position in the conversation is a column of the prefix or of the branch (packed), or itself (padded).
    if any(c.gate_positions is None for c in comparisons):
        return None
    positions = np.array([p for c in comparisons for p in c.gate_positions or ()], dtype=np.int64)
    if segments is None:
        return positions
    return _packed_columns(positions, segments.T)


def _packed_columns(positions: npt.NDArray[np.int64], segment: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # Of positions in one conversation by its row of `segments`, or of one position for each row of the table by its columns.
    start, prefix, branch, _ = segment
    columns: npt.NDArray[np.int64] = np.where(positions < prefix, start + positions, branch + positions - prefix)
    return columns


def _pack_padded(comparisons: Sequence[EncodedComparison], pad_token_id: int) -> PackedBatch:
    rows = [np.concatenate([c.prefix_ids, branch]) for c in comparisons for branch in c.branch_ids]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max())
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
    columns = np.arange(width, dtype=np.int64)
    end_row, end_column = np.arange(len(rows), dtype=np.int64), lengths - 1
    return PackedBatch(
        comparisons=tuple(comparisons),
        input_ids=input_ids,
        position_ids=np.broadcast_to(columns, input_ids.shape).copy(),
        segments=None,
        attention_mask=(columns[None] < lengths[:, None]).astype(np.int64),
        end_row=end_row,
        end_column=end_column,
        read_row=end_row,
        read_column=end_column,
        num_reads=np.ones_like(end_row),
        gate_column=_gate_columns(comparisons, None),
    )


@dataclass(frozen=True, slots=True)
class LanguageLossTokens:
    """Tokens of a micro-batch that a language-model loss teaches; every array has M entries.

    Attributes:
        row: int64; column: int64, of the token; before: int64, the column whose hidden state predicts it.
        completion: int64, index in the micro-batch.
        weight: float32, weight of its comparison.
    """

    row: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    completion: npt.NDArray[np.int64]
    weight: Float32


def language_loss_tokens(batch: PackedBatch, which: Literal["best", "all"]) -> LanguageLossTokens:
    """The text of the best completions (all, where a comparison has no ranks), or of all of them.

    Text begins at `text_starts`, or with the branch where that is not known. The first token of a conversation is never among them.
    """
    tables: list[npt.NDArray[np.int64]] = [np.zeros((4, 0), dtype=np.int64)]
    weights = [np.zeros(0, dtype=np.float32)]
    completion = -1
    for comparison in batch.comparisons:
        ranks, prefix = comparison.labels.ranks, len(comparison.prefix_ids)
        for index, branch in enumerate(comparison.branch_ids):
            completion += 1
            if which == "best" and ranks is not None and ranks[index] > ranks.min():
                continue
            start = prefix if comparison.text_starts is None else comparison.text_starts[index]
            positions = np.arange(max(start, 1), prefix + len(branch), dtype=np.int64)
            row = np.full_like(positions, batch.end_row[completion])
            before, column = batch.columns(completion, positions - 1), batch.columns(completion, positions)
            tables.append(np.stack([row, before, column, np.full_like(positions, completion)]))
            weights.append(np.full(len(positions), comparison.labels.weight, dtype=np.float32))
    row, before, column, owner = np.concatenate(tables, axis=1)
    return LanguageLossTokens(row, before, column, owner, np.concatenate(weights))
