"""The steps of `prepare` as Ray Data operations: encoded rows go to disk, their keys from task to task."""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from rayward.contract.contract import Contract
from rayward.data.prepare.combine import settle
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.judge import Policy, Unseen, judge
from rayward.data.prepare.leftover import Leftovers
from rayward.data.prepare.parts import gather, write_part
from rayward.data.prepare.repeats import repeated
from rayward.data.prepare.rows import ENCODED_SCHEMA, KEY, KEYED_SCHEMA, Adaptation, read
from rayward.data.prepare.tally import Sources, Tally, cut, largest, sources_of
from rayward.data.prepared import LABELS, Label
from rayward.data.sources.read import ReadUnit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL_ROWS = 200_000
"""Keys of so many rows are judged and sorted by one task, which is quicker than a shuffle; also the size of a bucket."""


def _is_number(label: Label) -> bool:
    return bool(pa.types.is_float32(label.column.type)) or label.column.name == "attributes"


ENCODE_ROWS = 256
"""Rows that are tokenized in one call."""

SLIM_SCHEMA = pa.schema(
    [
        *(pa.field(field.name, pa.int32()) if field.name == "file" else field for field in KEYED_SCHEMA),
        *(label.column.with_nullable(True) for label in LABELS if _is_number(label)),
        pa.field("part", pa.int64()),
        pa.field("place", pa.int32()),
    ]
)
"""KEYED_SCHEMA with files by number, the numbers that may be outliers, and where the row stands on disk."""


@dataclass(frozen=True)
class Plan:
    """What the tasks are told.

    Attributes:
        units: what is read; files: by number, as everywhere.
        adaptation, policy: how rows become comparisons, and who goes where.
        directory: where parts are written.
        encoders: reference to contract and tokenizer, in a list so that Ray does not resolve it.
    """

    units: Sequence[ReadUnit]
    files: Sequence[str]
    adaptation: Adaptation
    policy: Policy
    directory: str
    encoders: list[ray.ObjectRef[Any]]


@lru_cache(maxsize=1)
def _encoders(reference: ray.ObjectRef[tuple[Contract, PreTrainedTokenizerBase]]) -> Encoders:
    return Encoders.of(*ray.get(reference))


def encoded(plan: Plan) -> ray.data.Dataset:
    """Read, adapt and encode everything: the keys of all rows, in SLIM_SCHEMA, when the rows themselves are on disk."""
    units: ray.data.Dataset = ray.data.from_items([{"unit": i} for i in range(len(plan.units))], override_num_blocks=len(plan.units))
    # Another share of a CPU keeps reading a step of its own: one large file is then encoded by many tasks.
    tables = units.map_batches(partial(_read, units=plan.units), batch_size=None, num_cpus=0.5)
    return tables.map_batches(partial(_encode, plan=plan), batch_size=None, batch_format="pyarrow").materialize()


def _read(batch: dict[str, Any], units: Sequence[ReadUnit]) -> Iterator[pa.Table]:
    for index in batch["unit"]:
        yield from read(units[int(index)])


def _encode(table: pa.Table, plan: Plan) -> pa.Table:
    encoders = _encoders(plan.encoders[0])
    leftovers = Leftovers()
    # Collecting garbage walks all lists of token ids again and again; they hold no circles.
    gc.disable()
    try:
        parts = [
            encode(table.slice(start, ENCODE_ROWS), plan.adaptation, encoders, plan.policy, leftovers)
            for start in range(0, table.num_rows, ENCODE_ROWS)
        ]
    finally:
        gc.enable()
    if not parts:
        return SLIM_SCHEMA.empty_table()
    whole = pa.concat_tables(parts)
    told = pa.array([leftovers.dump(), *([None] * (whole.num_rows - 1))], pa.string())
    whole = whole.set_column(whole.schema.get_field_index("leftover"), "leftover", told)
    return _written(whole, plan, order_by="near_prompt" if plan.policy.joins else "order")


def _written(table: pa.Table, plan: Plan, *, order_by: str) -> pa.Table:
    table = write_part(table, plan.directory, order_by=order_by)
    numbers = {file: number for number, file in enumerate(plan.files)}
    columns: dict[str, Any] = {name: table.column(name) for name in SLIM_SCHEMA.names}
    columns["file"] = pa.array([numbers.get(file) for file in columns["file"].to_pylist()], pa.int32())
    # What is wrong with a row stays beside it on disk; lines that are no rows are nowhere else.
    is_row = pc.equal(table.column("kind"), "row")
    columns["detail"] = pc.if_else(is_row, pa.scalar(None, pa.string()), table.column("detail"))
    return pa.Table.from_arrays([columns[name] for name in SLIM_SCHEMA.names], schema=SLIM_SCHEMA)


def judged(keys: ray.data.Dataset, plan: Plan) -> ray.data.Dataset:
    """Decide about every row of `encoded`."""
    # Where rows join, those of validation may leave before they are compared with: it is done among the rows of a prompt.
    roles = ["contamination"] if plan.policy.joins else ["validation", "contamination"]
    unseen = _unseen(keys, roles, plan.files) if any(unit.file.role in roles for unit in plan.units) else Unseen.nothing()
    groups = partial(_judge, plan=plan, unseen=[ray.put(unseen) if isinstance(unseen, Unseen) else unseen])
    key = "near_prompt" if plan.policy.joins else "near_content"
    return by_bucket(keys, key, keys.count(), groups).materialize()


def _unseen(keys: ray.data.Dataset, roles: list[str], files: Sequence[str]) -> ray.ObjectRef[Unseen]:
    names = ["kind", "role", "near_prompt", "reason", "file", "number"]

    def choose(table: pa.Table) -> pa.Table:
        return table.filter(pc.is_in(table.column("role"), pa.array(roles))).select(names)

    @ray.remote  # type: ignore[untyped-decorator]
    def collect(*tables: pa.Table) -> Unseen:
        known = [table.select(names) for table in tables if table.num_columns]
        return Unseen.of(pa.concat_tables([SLIM_SCHEMA.empty_table().select(names), *known]), files)

    reference: ray.ObjectRef[Unseen] = collect.remote(*keys.map_batches(choose, batch_size=None, batch_format="pyarrow").to_arrow_refs())
    return reference


@lru_cache(maxsize=1)
def _resolved(reference: ray.ObjectRef[Unseen]) -> Unseen:
    unseen: Unseen = ray.get(reference)
    return unseen


def _judge(table: pa.Table, plan: Plan, unseen: list[ray.ObjectRef[Unseen]]) -> pa.Table:
    prompts = _resolved(unseen[0])
    if not plan.policy.joins:
        return judge(table, plan.policy, [prompts], plan.files)
    used = pc.is_valid(table.column("split"))
    chosen, others = table.filter(used), table.filter(pc.invert(used))
    if not chosen.num_rows:
        return others
    settled = settle(gather(chosen, plan.directory, ENCODED_SCHEMA.names), plan.policy, prompts)
    return pa.concat_tables([others, _written(settled, plan, order_by="order")])


def by_bucket(rows: ray.data.Dataset, key: str, num_rows: int, function: Callable[[pa.Table], pa.Table]) -> ray.data.Dataset:
    """Apply a function to tables that hold all rows of a key (binary or text), and of others."""
    if num_rows <= SMALL_ROWS:
        return rows.repartition(1).map_batches(function, batch_size=None, batch_format="pyarrow")
    buckets = max(-(-num_rows // SMALL_ROWS), 2 * int(ray.cluster_resources().get("CPU", 1)))

    def add(table: pa.Table) -> pa.Table:
        return table.append_column(
            "bucket", pa.array([_bucket(*each, buckets) for each in enumerate(table.column(key).to_pylist())], pa.int32())
        )

    def apply(table: pa.Table) -> pa.Table:
        return function(table.drop_columns(["bucket"]))

    numbered = rows.map_batches(add, batch_size=None, batch_format="pyarrow")
    return numbered.groupby("bucket", num_partitions=buckets).map_groups(apply, batch_format="pyarrow")


def _bucket(index: int, key: bytes | str | None, buckets: int) -> int:
    # Rows without a key are already out; spread, they overfill no bucket.
    if key is None:
        return index % buckets
    return int.from_bytes(key[:6], "little") % buckets if isinstance(key, bytes) else zlib.crc32(key.encode()) % buckets


def overlap(keys: ray.data.Dataset) -> int:
    """Rows in train whose prompt stands in validation."""

    def held_out(table: pa.Table) -> pa.Table:
        return table.filter(pc.equal(table.column("split"), "validation")).select(["near_prompt"])

    @ray.remote  # type: ignore[untyped-decorator]
    def distinct(*tables: pa.Table) -> pa.Array:
        return pc.unique(pa.chunked_array([chunk for t in tables if t.num_columns for chunk in t.column("near_prompt").chunks], KEY))

    def count(table: pa.Table, known: list[ray.ObjectRef[pa.Array]]) -> pa.Table:
        train = table.filter(pc.equal(table.column("split"), "train")).column("near_prompt")
        return pa.table({"rows": [pc.sum(pc.is_in(train, ray.get(known[0]))).as_py() or 0]})

    known = distinct.remote(*keys.map_batches(held_out, batch_size=None, batch_format="pyarrow").to_arrow_refs())
    counts = keys.map_batches(partial(count, known=[known]), batch_size=None, batch_format="pyarrow")
    return sum(row["rows"] for row in counts.take_all())


def all_sources(keys: ray.data.Dataset, num_rows: int) -> Sources:
    """The largest sources of very many, and the others as one."""

    def count(table: pa.Table) -> pa.Table:
        return pa.table({"counts": [json.dumps(cut(sources_of(table)))]})

    def choose(table: pa.Table) -> pa.Table:
        return table.select(["kind", "role", "source", "split"])

    chosen = keys.map_batches(choose, batch_size=None, batch_format="pyarrow")
    return largest(json.loads(row["counts"]) for row in by_bucket(chosen, "source", num_rows, count).take_all())


def source_counts(rows: ray.data.Dataset, num_rows: int, known: Sources | None = None) -> Sources:
    """Rows by source and split: the known counts, or those of the largest sources and of the others as one."""
    if known is not None:
        return known
    few = Tally.merged(row["tally"] for row in rows.map_batches(_counted, batch_size=None, batch_format="pyarrow").take_all()).sources
    return all_sources(rows, num_rows) if few is None else few


def _counted(table: pa.Table) -> pa.Table:
    return pa.table({"tally": [Tally.of(table)]})


def sorted_keys(keys: ray.data.Dataset, num_rows: int, repeats: Mapping[int, float]) -> ray.data.Dataset:
    """Rows in use in their order, with their places on disk.

    Args:
        repeats: by number of the file, how often each of its training rows is used.
    """
    names = SLIM_SCHEMA.names if repeats else ["order", "split", "part", "place"]

    def choose(table: pa.Table) -> pa.Table:
        return repeated(table, repeats).select(names)

    chosen = keys.map_batches(choose, batch_size=None, batch_format="pyarrow")
    if num_rows <= SMALL_ROWS:
        ordered = chosen.repartition(1).map_batches(lambda table: table.sort_by("order"), batch_size=None, batch_format="pyarrow")
    else:
        ordered = chosen.sort("order")
    # Materialised: a strict repartition that is fused into a sort keeps the sort's blocks (Ray 2.60).
    return ordered.materialize()
