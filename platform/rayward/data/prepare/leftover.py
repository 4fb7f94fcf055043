"""Columns that no adapter reads: counted over all rows where they are adapted, added up, and told. No Ray.

Counts travel as lines of kind `columns` beside the rows: `number` rows, and in `detail` source, column and type as JSON; a line without a
column counts the rows of the source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rayward.data.formats.columns import Columns, type_of
from rayward.data.prepared import UnusedColumn

COLUMNS = "columns"
"""Kind of the lines."""

LIMIT = 200
"""Columns of one source that are counted; a row of free keys has more."""


class Leftovers:
    """The counts of one block."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[tuple[str, str, str]]] = {}

    def add(self, file: str, source: str, columns: Columns, row: Mapping[str, Any]) -> None:
        """Count a row."""
        counts = self._counts.setdefault(file, Counter())
        counts[source, "", ""] += 1
        for name in columns.unused(row):
            counts[source, name, type_of(row[name])] += 1

    def lines(self) -> list[dict[str, Any]]:
        """What goes on beside the rows of the block."""
        return [
            {"kind": COLUMNS, "file": file, "number": count, "raw": "", "detail": json.dumps(key)}
            for file, counts in self._counts.items()
            for key, count in counts.most_common(LIMIT)
        ]


def unused_columns(counts: Mapping[str, int], settings: Mapping[str, Mapping[str, str]]) -> tuple[UnusedColumn, ...]:
    """The counts of all blocks, a line for each column of each source, the most frequent first.

    Args:
        counts: rows by the `detail` of their line.
        settings: by source, columns that a setting would read, and that setting.
    """
    rows: Counter[str] = Counter()
    found: dict[tuple[str, str], Counter[str]] = {}
    for detail, count in counts.items():
        source, column, kind = json.loads(detail)
        if not column:
            rows[source] += count
        else:
            found.setdefault((source, column), Counter())[kind] += count
    listed = [
        UnusedColumn(
            source=source,
            column=column.encode("utf-8", "backslashreplace").decode(),
            type=" or ".join(kind for kind, _ in kinds.most_common()),
            num_rows=kinds.total(),
            share=kinds.total() / max(rows[source], kinds.total()),
            setting=settings.get(source, {}).get(column),
        )
        for (source, column), kinds in found.items()
    ]
    return tuple(sorted(listed, key=lambda each: (each.source, -each.num_rows, each.column)))
