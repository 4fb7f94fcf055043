"""Numbers of the first rows of ranges of bytes: tasks count line ends, the driver reads none of the file."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from rayward.data.sources.read import ReadUnit, line_counts_needed, lines_in, numbered
from rayward.errors import DataError


def number_units(units: Sequence[ReadUnit]) -> list[ReadUnit]:
    """The units with the number of their first row; needs a connection to Ray where a file was split by bytes.

    Raises:
        DataError: a file cannot be read.
    """
    needed = line_counts_needed(units)
    if not needed:
        return list(units)
    counts: dict[ReadUnit, int] = {}
    problems: list[str] = []
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_count)
    for unit, (count, problem) in zip(needed, ray.get([task.remote(unit) for unit in needed]), strict=True):
        counts[unit] = count
        problems += [] if problem is None else [problem]
    if problems:
        raise DataError("\n  ".join(sorted(set(problems))), remedy="restore the files or remove them from the configuration")
    return numbered(units, counts)


def _count(unit: ReadUnit) -> tuple[int, str | None]:
    try:
        return lines_in(unit), None
    except DataError as exc:
        return 0, exc.problem  # raised here it would reach the user as the error of a task
