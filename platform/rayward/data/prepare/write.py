"""How prepared data gets to its place: shards, quarantine, and the one rename or file that commits them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pyarrow import fs as pafs

from rayward import storage
from rayward.data.prepare.parts import gather
from rayward.data.prepare.report import EXAMPLES_PER_REASON
from rayward.data.prepare.rows import BENCHMARK
from rayward.data.prepare.stages import by_bucket
from rayward.data.prepare.stats import SplitStats
from rayward.data.prepared import PREPARED_SCHEMA, Manifest, PreparedData, ShardEntry
from rayward.errors import DataError
from rayward.schema import digest

QUARANTINE_FILE_ROWS = 50_000


def summaries(dataset: ray.data.Dataset, of: Any) -> list[str]:
    """One text per block, made where the block is."""

    def summarize(table: pa.Table) -> pa.Table:
        return pa.table({"summary": pa.array([of(table)] if table.num_rows else [], pa.string())})

    return [row["summary"] for row in dataset.map_batches(summarize, batch_size=None, batch_format="pyarrow").take_all()]


def _select(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table.column("split"), split))


def write_split(
    ordered: ray.data.Dataset, split: Literal["train", "validation"], num_rows: int, rows_per_shard: int, workspace: str, parts: str
) -> tuple[tuple[ShardEntry, ...], SplitStats]:
    """Cut the sorted keys of a split into shards, gather the rows of each and write them.

    Args:
        parts: directory where the rows stand.

    Raises:
        DataError: the parts that other machines wrote are not visible.
    """
    if num_rows == 0:
        return (), SplitStats()
    selected = ordered.map_batches(partial(_select, split=split), batch_size=None, batch_format="pyarrow")
    blocks = selected.repartition(target_num_rows_per_block=rows_per_shard, strict=True).materialize()
    heads = sorted(json.loads(text) for text in summaries(blocks, lambda table: json.dumps([table["order"][0].as_py(), table.num_rows])))
    sizes = [size for _, size in heads]
    expected = [min(rows_per_shard, num_rows - start) for start in range(0, num_rows, rows_per_shard)]
    assert sizes == expected, f"shards of {sizes[:10]}… rows instead of {expected[:10]}…"
    shards = tuple(ShardEntry(file=f"{split}/part-{index:05d}.parquet", num_rows=size) for index, size in enumerate(sizes))
    places = {order: (index * rows_per_shard, storage.join(workspace, shards[index].file)) for index, (order, _) in enumerate(heads)}
    _make_directory(storage.join(workspace, split))
    found = summaries(blocks, partial(_gather_shard, places=places, parts=parts))
    if "" in found:
        raise not_shared(f"rows that other machines wrote to {parts} are not visible everywhere")
    stats = SplitStats.merged(SplitStats.model_validate_json(text) for text in found)
    assert stats.num_rows == num_rows, f"{stats.num_rows} {split} rows were written, {num_rows} were counted"
    return shards, stats


_SHARD_COLUMNS = (*(name for name in PREPARED_SCHEMA.names if name != "row"), "order", "truncated", "trimmed", "changed")


def _gather_shard(table: pa.Table, places: Mapping[str, tuple[int, str]], parts: str) -> str:
    # Raised here the error would reach the user as one of a Ray task.
    try:
        rows = gather(table, parts, _SHARD_COLUMNS)
    except FileNotFoundError:
        return ""
    # The place of a shard is that of its first key: the row itself does not know that it is a copy.
    return _write_shard(rows, *places[table["order"][0].as_py()])


def _write_shard(table: pa.Table, first_row: int, uri: str) -> str:
    rows = pa.array(range(first_row, first_row + table.num_rows), pa.int64())
    columns = [rows if field.name == "row" else table.column(field.name).cast(field.type) for field in PREPARED_SCHEMA]
    filesystem, path = storage.resolve(uri)
    # Workers on other nodes have not seen the directory that the driver made, if the storage is not shared; the driver checks.
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        pq.write_table(pa.Table.from_arrays(columns, schema=PREPARED_SCHEMA), stream, compression="zstd", row_group_size=1000)
    # Sources are counted by their keys: there may be as many as rows.
    text: str = SplitStats.of(table).model_copy(update={"sources": {}}).model_dump_json()
    return text


def write_quarantine(
    keys: ray.data.Dataset, counts: Counter[str], workspace: str, parts: str, names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Write `quarantine/<reason>.jsonl` (more files per reason when there are many rows); some records per reason come back.

    Args:
        keys: what was decided about every row.
        parts: directory where the rows stand.
        names: of the files, which `keys` counts.
    """
    if not counts:
        return {}
    _make_directory(storage.join(workspace, "quarantine"))
    files = {reason: -(-count // QUARANTINE_FILE_ROWS) for reason, count in counts.items()}

    def choose(table: pa.Table) -> pa.Table:
        table = table.filter(
            pc.and_(pc.equal(table["kind"], "row"), pc.and_(pc.is_null(table["split"]), pc.not_equal(table["role"], BENCHMARK)))
        )
        table = table.select(["file", "number", "reason", "detail", "part", "place"])
        targets = []
        for reason, file, number in zip(*(table.column(name).to_pylist() for name in ("reason", "file", "number")), strict=True):
            target = int(digest([names[file], number])[:15], 16) % files[reason]
            targets.append(f"{reason}-{target:05d}" if files[reason] > 1 else reason)
        return table.append_column("target", pa.array(targets, pa.string()))

    def write(table: pa.Table) -> pa.Table:
        examples: list[str] = []
        for target in sorted(set(table.column("target").to_pylist())):
            rows = table.filter(pc.equal(table.column("target"), target)).sort_by([("file", "ascending"), ("number", "ascending")])
            try:
                records = _records(rows, parts, names)
            except FileNotFoundError:
                return pa.table({"examples": [""]})
            write_file(storage.join(workspace, "quarantine", f"{target}.jsonl"), "".join(json.dumps(r) + "\n" for r in records).encode())
            examples.append(json.dumps(records[:EXAMPLES_PER_REASON]))
        return pa.table({"examples": pa.array(examples, pa.string())})

    chosen = keys.map_batches(choose, batch_size=None, batch_format="pyarrow")
    written = [row["examples"] for row in by_bucket(chosen, "target", counts.total(), write).take_all()]
    if "" in written:
        raise not_shared(f"rows that other machines wrote to {parts} are not visible everywhere")
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted((r for text in written for r in json.loads(text)), key=lambda r: (r["file"], r["row"])):
        if len(found[record["reason"]]) < EXAMPLES_PER_REASON:
            found[record["reason"]].append(record)
    return dict(found)


def _records(rows: pa.Table, parts: str, names: Sequence[str]) -> list[dict[str, Any]]:
    # What a step decided later stands with the key, the rest with the row.
    stored = gather(rows, parts, ["source", "raw", "detail"])
    details = pc.coalesce(rows.column("detail"), stored.column("detail"))
    columns = (rows["reason"], details, stored["source"], rows["file"], rows["number"], stored["raw"])
    return [
        {"reason": reason, "detail": detail, "source": source, "file": names[file], "row": number, "raw": raw}
        for reason, detail, source, file, number, raw in zip(*(column.to_pylist() for column in columns), strict=True)
    ]


@contextmanager
def open_workspace(directory: str) -> Iterator[str]:
    """Where to write: beside a local directory, to be renamed; in place on object stores, where the manifest alone commits."""
    workspace = directory if "://" in directory else f"{directory}.partial-{uuid.uuid4().hex[:8]}"
    _make_directory(workspace)
    try:
        yield workspace
    finally:
        if workspace != directory:
            shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def scratch(workspace: str) -> Iterator[str]:
    """A directory in the workspace that is gone at the end."""
    directory = storage.join(workspace, f"rows-{uuid.uuid4().hex[:8]}")
    try:
        yield directory
    finally:
        storage.delete_dir(*storage.resolve(directory))


def publish(workspace: str, directory: str) -> None:
    """Rename the workspace into place, unless it is the place."""
    if workspace == directory:
        return
    if PreparedData.find(directory) is not None:
        return  # another driver prepared the same data meanwhile
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(workspace, directory)


def check_shared(workspace: str, manifest: Manifest) -> None:
    """Raises DataError where shards that workers wrote are not visible here."""
    filesystem, path = storage.resolve(workspace)
    names = [f"{path}/{shard.file}" for shard in (*manifest.train_shards, *manifest.validation_shards)]
    missing = [info.path for info in filesystem.get_file_info(names) if info.type != pafs.FileType.File]
    if missing:
        raise not_shared(f"{len(missing)} shards were written on other machines and are not visible here, for example {missing[0]}")


def not_shared(problem: str) -> DataError:
    """The error of a place that not all machines see."""
    return DataError(problem, remedy="set run.storage_path to a directory or URI that all nodes of the cluster share")


def _make_directory(uri: str) -> None:
    filesystem, path = storage.resolve(uri)
    try:
        filesystem.create_dir(path, recursive=True)
    except OSError as exc:
        raise DataError(f"{uri} cannot be created ({exc})", remedy="set run.storage_path to a place that can be written") from exc


def write_file(uri: str, content: bytes) -> None:
    """A whole file at a path or URI, the bytes as they are whatever its suffix."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)
