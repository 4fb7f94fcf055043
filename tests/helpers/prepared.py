"""Prepared directories of hand-made rows, at a path or URI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayward import storage
from rayward.data.prepared import MANIFEST_FILE, PREPARED_SCHEMA, Manifest, PreparedData, ShardEntry

Rows = Sequence[Mapping[str, Any]]


def prepared_row(number: int, **columns: Any) -> dict[str, Any]:
    """One row with two completions, the first one better."""
    return {
        "row": number,
        "id": f"r{number}",
        "source": "s",
        "prompt_key": f"k{number}",
        "prefix_ids": [5, 6],
        "branch_ids": [[7, 2], [8, 9, 2]],
        "text_starts": [2, 2],
        "ranks": [0.0, 1.0],
        "weight": 1.0,
        "prompt_json": '[{"role": "user", "content": "2 + 2?"}]',
        "completions_json": '["4", "5"]',
        **columns,
    }


def make_manifest(shards: Mapping[str, Sequence[ShardEntry]] = {}, **changes: Any) -> Manifest:
    """A manifest of these shards by split; the other counts are made up."""
    entries = {split: tuple(shards.get(split, ())) for split in ("train", "validation")}
    counts = {split: sum(entry.num_rows for entry in found) for split, found in entries.items()}
    values = {
        "fingerprint": "f" * 8,
        "num_input_rows": sum(counts.values()),
        "num_train": counts["train"],
        "num_validation": counts["validation"],
        "num_quarantined": {},
        "train_shards": entries["train"],
        "validation_shards": entries["validation"],
        "longest_comparison_tokens": 160,
        "longest_conversation_tokens": 80,
        "total_train_tokens": 1,
        "total_train_tokens_unshared": 1,
        "length_histogram": {},
        "max_completions": 2,
        "sources": {"s": counts["train"]},
    }
    return Manifest.model_validate({**values, **changes})


def write_prepared(directory: str, shards: Mapping[str, Sequence[Rows]], **changes: Any) -> PreparedData:
    """Write the shards of each split and the manifest."""
    filesystem, root = storage.resolve(directory)
    entries: dict[str, list[ShardEntry]] = {}
    for split, parts in shards.items():
        filesystem.create_dir(f"{root}/{split}", recursive=True)
        entries[split] = []
        for index, rows in enumerate(parts):
            entry = ShardEntry(file=f"{split}/part-{index:05d}.parquet", num_rows=len(rows))
            with filesystem.open_output_stream(f"{root}/{entry.file}") as stream:
                pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=PREPARED_SCHEMA), stream)
            entries[split].append(entry)
    storage.write_text(filesystem, f"{root}/{MANIFEST_FILE}", make_manifest(entries, **changes).model_dump_json())
    return PreparedData.load(directory)
