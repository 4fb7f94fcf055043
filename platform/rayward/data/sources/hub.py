"""Data sets of the Hugging Face hub, streamed once to where every node can read them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pyarrow as pa
from pyarrow import fs as pafs

from rayward import storage
from rayward.data.sources.find import SourceFile
from rayward.data.sources.kinds import Role
from rayward.errors import DataError

HUB_PREFIX = "hf:"
BATCH_ROWS = 1000
SHARD_BYTES = 64 * 1024 * 1024
"""Uncompressed bytes of one shard, which one task reads."""
INDEX_FILE = "shards.json"
"""Written last: what it lists is complete."""


@dataclass(frozen=True, slots=True)
class HubName:
    """`hf:owner/name[/config][@split]`, taken apart."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.name}{'/' + self.config if self.config else ''}@{self.split}"


def parse_hub_name(location: str, role: Role) -> HubName:
    """Take `hf:owner/name[/config][@split]` apart; the split defaults to `train`, `validation` or (of a benchmark) `test`, by role.

    Raises:
        DataError: the name does not have that form.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([^@/]+))?(?:@(.+))?", location)
    if match is None:
        raise DataError(f"{location!r} is not a hub name", remedy="write hf:owner/name, hf:owner/name/config or hf:owner/name/config@split")
    return HubName(match[1], match[2], match[3] or ("test" if role == "contamination" else role))


def download(hub: HubName, directory: str, role: Role) -> list[SourceFile]:
    """Stream a hub data set into Arrow files under `directory`, or find those of the same revision that are there.

    No file of the data set is stored on the machine that calls, and no more than a shard is in its memory. A slice of a split
    (`train[:10%]`) is the exception: `datasets` downloads and caches the whole of it.

    Raises:
        DataError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(hub.name, hub.config)
        label = re.sub(r"[^\w.-]+", "--", str(hub).removeprefix(HUB_PREFIX))
        target = storage.join(directory, f"{label}-{builder.config.name}-{builder.hash}")
        filesystem, root = storage.resolve(target)
        if not storage.exists(filesystem, f"{root}/{INDEX_FILE}"):
            _store(builder, hub.split, filesystem, root)
        shards = json.loads(storage.read_text(filesystem, f"{root}/{INDEX_FILE}"))
    except (OSError, ValueError, pa.ArrowException, httpx.HTTPError, datasets.exceptions.DatasetsError) as exc:
        raise DataError(f"{hub} cannot be loaded: {exc}", remedy="check the name, the configuration, the split and the network") from exc
    place = target if "://" in target else root
    source = hub.name.partition("/")[2]
    return [SourceFile(storage.join(place, shard["file"]), "arrow", None, source, role, shard["size"]) for shard in shards]


def _store(builder: Any, split: str, filesystem: pafs.FileSystem, root: str) -> None:
    # A folder of its own for each attempt: two jobs may do this at once, and one that dies leaves no index.
    attempt = uuid.uuid4().hex[:12]
    folder = f"{root}/{attempt}"
    filesystem.create_dir(folder, recursive=True)
    shards: list[dict[str, str | int]] = []
    try:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        for shard in _shards(_tables(builder, split)):
            name = f"{attempt}/part-{len(shards):05d}.arrow"
            with (
                filesystem.open_output_stream(f"{root}/{name}", compression=None) as stream,
                pa.ipc.new_file(stream, shard.schema, options=options) as writer,
            ):
                writer.write_table(shard, max_chunksize=BATCH_ROWS)
            shards.append({"file": name, "size": filesystem.get_file_info(f"{root}/{name}").size})
        if not storage.exists(filesystem, f"{root}/{INDEX_FILE}"):
            storage.write_text(filesystem, f"{root}/{INDEX_FILE}", json.dumps(shards))
            folder = ""
    finally:
        if folder:
            storage.delete_dir(filesystem, folder)


def _tables(builder: Any, split: str) -> Iterator[pa.Table]:
    """The rows in small tables; images and the like as the bytes that they are stored as."""
    if "[" in split:  # a slice cannot be streamed
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=split)
    else:
        loaded = builder.as_streaming_dataset(split=split)
    yield from loaded.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _shards(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables put together up to the size of a shard, while their columns allow it: types that are read off JSON change along the file."""
    parts: list[pa.Table] = []
    size = 0
    for table in tables:
        fitted = _fitted(table, parts[0].schema) if parts else table
        if parts and (fitted is None or size >= SHARD_BYTES):
            yield pa.concat_tables(parts)
            parts, size, fitted = [], 0, table
        parts.append(fitted)
        size += table.nbytes
    if parts:
        yield pa.concat_tables(parts)


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table | None:
    """The table in this schema, when nothing but columns of nulls stands against it."""
    if set(table.column_names) - set(schema.names):
        return None
    columns = []
    for field in schema:
        found = table.schema.get_field_index(field.name)
        if found < 0 or pa.types.is_null(table.schema.field(found).type):
            columns.append(pa.nulls(table.num_rows, field.type))
        elif table.schema.field(found).type == field.type:
            columns.append(table.column(found))
        else:
            return None
    return pa.table(columns, schema=schema)
