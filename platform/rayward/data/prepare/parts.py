"""Encoded rows on disk between two steps of `prepare`, so that Ray moves the keys of rows only. No Ray.

A part holds the rows of one task, in the order in which they are asked for later: whoever gathers a range of that order from all parts
reads one run of each.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from rayward import storage

BATCH_ROWS = 256
"""Rows that are read together."""


def write_part(table: pa.Table, directory: str, *, order_by: str) -> pa.Table:
    """Write a table sorted by a column; back comes the table in that order, with its place in the columns `part` and `place`."""
    name = uuid.uuid4().int >> 65
    table = table.sort_by(order_by)
    filesystem, path = storage.resolve(_file(directory, name))
    # A worker on another node has not seen the directory that the driver made, if the storage is not shared.
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=BATCH_ROWS)
    places = {"part": pa.array([name] * table.num_rows, pa.int64()), "place": pa.array(range(table.num_rows), pa.int32())}
    for column, values in places.items():
        table = table.append_column(column, values)
    return table


def gather(rows: pa.Table, directory: str, columns: Sequence[str]) -> pa.Table:
    """These columns of rows that stand in parts, in the order of `rows`, which has the columns `part` and `place`.

    Raises:
        FileNotFoundError: a part was written where this machine does not see it.
    """
    parts, places = (rows.column(name).to_numpy() for name in ("part", "place"))
    order = np.lexsort((places, parts))
    names, starts = np.unique(parts[order], return_index=True)
    pieces = [
        _rows(directory, int(name), places[order[start:stop]], columns)
        for name, start, stop in zip(names, starts, [*starts[1:], len(order)], strict=True)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_tables(pieces).take(pa.array(back))


def _rows(directory: str, name: int, places: npt.NDArray[np.int32], columns: Sequence[str]) -> pa.Table:
    filesystem, path = storage.resolve(_file(directory, name))
    local = isinstance(filesystem, pafs.LocalFileSystem)
    with pa.memory_map(path) if local else filesystem.open_input_file(path) as source:
        schema = pa.ipc.open_file(source).schema
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(column) for column in columns])
        reader = pa.ipc.open_file(source, options=options)
        batches, of_batch = np.unique(places // BATCH_ROWS, return_inverse=True)
        read = pa.Table.from_batches([reader.get_batch(int(batch)) for batch in batches])
        return read.take(pa.array(of_batch * BATCH_ROWS + places % BATCH_ROWS)).select(list(columns))


def _file(directory: str, name: int) -> str:
    return storage.join(directory, f"{name:016x}.arrow")


def select(table: pa.Table, columns: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Columns in the types of a schema."""
    return table.select(list(columns)).cast(pa.schema([schema.field(name) for name in columns]))


def usable(table: pa.Table) -> pa.Table:
    """Rows with a place in a split."""
    return table.filter(pc.is_valid(table.column("split")))
