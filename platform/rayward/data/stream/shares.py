"""Step shares: one rank's part of one optimizer step, as an Arrow row on the way and as micro-batches on arrival. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from rayward.batch.layout import Layout, PackedBatch, pack
from rayward.batch.planner import plan_step
from rayward.contract.reading import Place
from rayward.data.prepared import COMPARISON_COLUMNS, PREPARED_SCHEMA, comparisons_from_table, with_columns
from rayward.errors import StreamOrderError, marking

STREAM_COLUMNS = ["row", *COMPARISON_COLUMNS]
ROW_SCHEMA = pa.schema([PREPARED_SCHEMA.field(name) for name in COMPARISON_COLUMNS])

SHARE_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("world_size", pa.int32()),
        pa.field("microbatch_sizes", pa.list_(pa.int32())),  # comparisons in each micro-batch
        pa.field("rows", pa.large_binary()),  # those comparisons in order: an Arrow record batch (IPC) of ROW_SCHEMA
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
    rows_of_step = with_columns(block, COMPARISON_COLUMNS)
    comparisons = comparisons_from_table(rows_of_step)
    plan = plan_step(comparisons, world_size=world_size, tokens_per_microbatch=tokens_per_microbatch, layout=layout)
    shares = [
        {
            "step": step,
            "rank": rank,
            "world_size": world_size,
            "microbatch_sizes": [len(members) for members in microbatches],
            "rows": _pack_rows(rows_of_step, [index for members in microbatches for index in members]),
        }
        for rank, microbatches in enumerate(plan)
    ]
    return pa.Table.from_pylist(shares, schema=SHARE_SCHEMA)


def read_share(table: pa.Table, *, layout: Layout, pad_token_id: int, read: Place = "end") -> StepShare:
    """One row of `plan_block`'s output, packed for the model, to be read at ends, steps or tokens."""
    row = table.select([name for name in table.column_names if name != "rows"]).slice(0, 1).to_pylist()[0]
    batch = pa.ipc.read_record_batch(table["rows"][0].as_buffer(), ROW_SCHEMA)
    comparisons = iter(comparisons_from_table(pa.Table.from_batches([batch])))
    groups = [list(islice(comparisons, size)) for size in row["microbatch_sizes"]]
    return StepShare(
        step=row["step"],
        rank=row["rank"],
        world_size=row["world_size"],
        microbatches=tuple(pack(group, layout=layout, pad_token_id=pad_token_id, read=read) for group in groups),
    )


def _pack_rows(rows: pa.Table, members: list[int]) -> bytes:
    columns = [column.take(pa.array(members, pa.int64())).combine_chunks() for column in rows.columns]
    message: bytes = pa.RecordBatch.from_arrays(columns, schema=ROW_SCHEMA).serialize().to_pybytes()
    return message
