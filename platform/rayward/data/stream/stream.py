"""Prepared shards -> step shares: which comparisons an optimizer step holds depends on its number alone.

One block becomes one optimizer step, `plan_block` turns it into one row per rank, and a round-robin split hands row i to
rank i % world_size. Membership is exact for any world size; the order is Ray's internal behaviour, so every share carries
its step number and the worker checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.train import DataConfig

from rayward import storage
from rayward.batch.layout import Layout
from rayward.data.prepared import ShardEntry
from rayward.data.stream.shares import STREAM_COLUMNS, plan_block

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset


def prepared_rows(directory: str, shards: Sequence[ShardEntry], *, start_row: int, stop_row: int) -> Dataset:
    """Rows [start_row, stop_row) of prepared shards in order; shards outside the range are not read."""
    filesystem, root = storage.resolve(directory)
    paths = []
    first = 0
    for shard in shards:
        if first < stop_row and first + shard.num_rows > start_row:
            paths.append(f"{root}/{shard.file}")
        first += shard.num_rows

    def select(block: pa.Table) -> pa.Table:
        rows = block["row"]
        return block.filter(pc.and_(pc.greater_equal(rows, start_row), pc.less(rows, stop_row)))

    with filesystem.open_input_file(paths[0]) as stream:
        known = set(pq.read_schema(stream).names)
    dataset = ray.data.read_parquet(paths, filesystem=filesystem, columns=[name for name in STREAM_COLUMNS if name in known])
    return dataset.map_batches(select, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)


class StepShares(DataConfig):  # type: ignore[misc]  # Ray is not checked for types
    """Turns each data set of prepared rows into step shares, for whatever world size the worker group has."""

    def __init__(self, *, comparisons_per_step: int, tokens_per_microbatch: int, layout: Layout) -> None:
        super().__init__()
        self._settings = {
            "comparisons_per_step": comparisons_per_step,
            "tokens_per_microbatch": tokens_per_microbatch,
            "layout": layout,
        }

    def configure(
        self, datasets: Mapping[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        output: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for rank, split in enumerate(self.split(dataset, world_size)):
                output[rank][name] = split
        return output

    def split(self, dataset: Dataset, world_size: int) -> list[DataIterator]:
        """One iterator per rank; its i-th row is the rank's share of the i-th step of the data set."""
        dataset = dataset.copy(dataset)
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        planned = dataset.repartition(target_num_rows_per_block=self._settings["comparisons_per_step"], strict=True).map_batches(
            plan_block,
            fn_kwargs={"world_size": world_size, **self._settings},
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
        )
        shares = planned.repartition(target_num_rows_per_block=1, strict=True)
        splits: list[DataIterator] = shares.streaming_split(world_size, equal=False)
        return splits


def dataset_factory(directory: str, shards: Sequence[ShardEntry], *, start_row: Callable[[], int], stop_row: int) -> Callable[[], Dataset]:
    """A data set that asks where to start each time it is built: Ray Train calls it again after a restart."""
    return lambda: prepared_rows(directory, shards, start_row=start_row(), stop_row=stop_row)
