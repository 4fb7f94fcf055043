"""Step shares: one rank's part of one optimizer step, as an Arrow row on the way and as micro-batches on arrival. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import Layout, PackedBatch, pack
from rayward.batch.planner import plan_step
from rayward.contract.reading import Place
from rayward.errors import StreamOrderError, marking

STREAM_COLUMNS = ["row", "id", "prefix_ids", "branch_ids", "ranks", "margin", "strength", "weight", "attributes"]


STREAM_COLUMNS += ["text_starts", "step_ends", "step_labels"]


_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

SHARE_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("world_size", pa.int32()),
        pa.field("num_microbatches", pa.int32()),
        pa.field("ids", pa.list_(pa.string())),  # per comparison, as the next six
        pa.field("microbatch", _INTS),
        pa.field("prefix_length", _INTS),
        pa.field("num_completions", _INTS),
        pa.field("margin", _FLOATS),
        pa.field("strength", _FLOATS),
        pa.field("weight", _FLOATS),
        pa.field("branch_length", _INTS),  # per completion, as the next
        pa.field("ranks", _FLOATS),
        pa.field("tokens", _INTS),  # prefix, branches; comparison by comparison
        pa.field("num_attributes", pa.int32()),
        pa.field("attributes", _FLOATS),  # [completions, num_attributes], flattened
        pa.field("text_starts", _INTS),  # per completion, as the next
        pa.field("num_steps", _INTS),  # 0 without labels of steps
        pa.field("step_ends", _INTS),  # per step, as the next
        pa.field("step_labels", _FLOATS),
    ]
)


@dataclass(frozen=True, slots=True)
class StepShare:
    """One rank's share of one optimizer step, packed into micro-batches."""

    step: int
    rank: int
    world_size: int
    microbatches: tuple[PackedBatch, ...]

    @property
    def comparison_ids(self) -> tuple[str, ...]:
        return tuple(c.id for batch in self.microbatches for c in batch.comparisons)


def comparisons_from_table(table: pa.Table) -> list[EncodedComparison]:
    """Rows of prepared shards as encoded comparisons."""
    result = []
    for row in table.select(STREAM_COLUMNS[1:]).to_pylist():
        result.append(
            EncodedComparison(
                id=row["id"],
                prefix_ids=np.array(row["prefix_ids"], dtype=np.int32),
                branch_ids=tuple(np.array(branch, dtype=np.int32) for branch in row["branch_ids"]),
                labels=Labels(
                    ranks=None if row["ranks"] is None else np.array(row["ranks"], dtype=np.float32),
                    margin=float("nan") if row["margin"] is None else row["margin"],
                    strength=float("nan") if row["strength"] is None else row["strength"],
                    weight=row["weight"],
                    attributes=None if row["attributes"] is None else np.array(row["attributes"], dtype=np.float32),
                    step_labels=None if row["step_labels"] is None else tuple(np.array(v, dtype=np.float32) for v in row["step_labels"]),
                ),
                text_starts=tuple(row["text_starts"]),
                step_ends=None if row["step_ends"] is None else tuple(tuple(ends) for ends in row["step_ends"]),
            )
        )
    return result


@marking
def plan_block(block: pa.Table, *, world_size: int, comparisons_per_step: int, tokens_per_microbatch: int, layout: Layout) -> pa.Table:
    """The rows of one optimizer step -> one row per rank.

    Raises:
        StreamOrderError: the block does not hold exactly the rows of one step.
    """
    rows = block["row"].to_numpy()
    step = int(rows[0]) // comparisons_per_step
    expected = np.arange(step * comparisons_per_step, step * comparisons_per_step + len(rows))
    if len(rows) > comparisons_per_step or not np.array_equal(rows, expected):
        raise StreamOrderError(
            f"a block holds rows {rows[0]}..{rows[-1]} ({len(rows)} rows) instead of the rows of step {step}",
            remedy="this is a bug in the stream or an unsupported Ray version; the run stops rather than train on other data",
        )
    comparisons = comparisons_from_table(block)
    plan = plan_step(comparisons, world_size=world_size, tokens_per_microbatch=tokens_per_microbatch, layout=layout)
    shares = [_share_row(comparisons, microbatches, step=step, rank=rank, world_size=world_size) for rank, microbatches in enumerate(plan)]
    return pa.Table.from_pylist(shares, schema=SHARE_SCHEMA)


def _share_row(
    comparisons: Sequence[EncodedComparison], microbatches: list[list[int]], *, step: int, rank: int, world_size: int
) -> dict[str, Any]:
    members = [(index, comparisons[i]) for index, group in enumerate(microbatches) for i in group]
    branches = [branch for _, c in members for branch in c.branch_ids]
    pieces = [piece for _, c in members for piece in (c.prefix_ids, *c.branch_ids)]
    ranks = [np.full(c.num_completions, np.nan, np.float32) if c.labels.ranks is None else c.labels.ranks for _, c in members]
    # A comparison without ratings stands among rated ones as missing ratings.
    num_attributes = max((c.labels.attributes.shape[1] for _, c in members if c.labels.attributes is not None), default=0)
    attributes = [
        np.full((c.num_completions, num_attributes), np.nan, np.float32) if c.labels.attributes is None else c.labels.attributes
        for _, c in members
    ]
    steps = [ends for _, c in members for ends in c.step_ends or ((),) * c.num_completions]
    step_labels = [labels for _, c in members for labels in c.labels.step_labels or ()]
    return {
        "step": step,
        "rank": rank,
        "world_size": world_size,
        "num_microbatches": len(microbatches),
        "ids": [c.id for _, c in members],
        "microbatch": [index for index, _ in members],
        "prefix_length": [len(c.prefix_ids) for _, c in members],
        "num_completions": [c.num_completions for _, c in members],
        "margin": [c.labels.margin for _, c in members],
        "strength": [c.labels.strength for _, c in members],
        "weight": [c.labels.weight for _, c in members],
        "branch_length": [len(branch) for branch in branches],
        "ranks": np.concatenate(ranks) if ranks else [],
        "tokens": np.concatenate(pieces) if pieces else [],
        "num_attributes": num_attributes,
        "attributes": np.concatenate(attributes).reshape(-1) if num_attributes else [],
        "text_starts": [start for _, c in members for start in c.text_starts or ()],
        "num_steps": [len(ends) for ends in steps],
        "step_ends": [end for ends in steps for end in ends],
        "step_labels": np.concatenate(step_labels) if step_labels else [],
    }


def read_share(table: pa.Table, *, layout: Layout, pad_token_id: int, read: Place = "end") -> StepShare:
    """One row of `plan_block`'s output, packed for the model, to be read at ends, steps or tokens."""
    (row,) = table.slice(0, 1).to_pylist()
    flat = {name: _values(table, name) for name in ("tokens", "ranks", "attributes", "step_labels")}
    groups: list[list[EncodedComparison]] = [[] for _ in range(row["num_microbatches"])]
    token = completion = step = 0
    num_attributes = row["num_attributes"]
    for index, comparison_id in enumerate(row["ids"]):
        count = row["num_completions"][index]
        lengths = [row["prefix_length"][index], *row["branch_length"][completion : completion + count]]
        stops = token + np.cumsum(lengths)
        pieces = np.split(flat["tokens"][token : stops[-1]], stops[:-1] - token)
        ranks = flat["ranks"][completion : completion + count]
        ratings = flat["attributes"][completion * num_attributes : (completion + count) * num_attributes]
        labels = Labels(
            ranks=None if np.isnan(ranks).any() else ranks,
            margin=row["margin"][index],
            strength=row["strength"][index],
            weight=row["weight"][index],
            attributes=ratings.reshape(count, num_attributes) if num_attributes else None,
        )
        text_starts = tuple(row["text_starts"][completion : completion + count])
        num_steps = row["num_steps"][completion : completion + count]
        ends = None
        if all(num_steps):
            edges = step + np.cumsum([0, *num_steps])
            ends = tuple(tuple(row["step_ends"][a:b]) for a, b in pairwise(edges))
            labels = replace(labels, step_labels=tuple(flat["step_labels"][a:b] for a, b in pairwise(edges)))
            step = int(edges[-1])
        groups[row["microbatch"][index]].append(
            EncodedComparison(comparison_id, pieces[0], tuple(pieces[1:]), labels, text_starts=text_starts, step_ends=ends)
        )
        token, completion = int(stops[-1]), completion + count
    return StepShare(
        step=row["step"],
        rank=row["rank"],
        world_size=row["world_size"],
        microbatches=tuple(pack(group, layout=layout, pad_token_id=pad_token_id, read=read) for group in groups),
    )


def _values(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = table[name].slice(0, 1).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values
