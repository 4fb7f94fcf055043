"""Who goes where: duplicates, contradictions, and train rows whose prompt is to stay unseen. Whole groups of equal content; no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.data.prepare.rows import BENCHMARK, KEYED_SCHEMA
from rayward.data.record import BadRow
from rayward.data.votes import VoteRule
from rayward.schema import digest

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Policy:
    """Who goes where.

    Attributes:
        seed: seeds the split and the order.
        validation_fraction: share of prompts of the train sources that is held out.
        too_long: policy for conversations that lose turns.
        ties: policy for completions of equal rank.
        merge_prompts: unranked rows of one prompt become one comparison.
        rank_by: column and name of the attribute that ranks what is unranked.
        group_tokens: ranked rows of one prompt join into groups of at most so many tokens; None: they stay rows.
        step_separator: text between two steps of a completion.
        votes: what rows are that judge the same completions differently; None: contradictions.
        split_by: what stands on one side of the split only.
    """

    seed: int
    validation_fraction: float
    too_long: Literal["truncate", "quarantine"]
    ties: Literal["quarantine", "keep"] = "quarantine"
    merge_prompts: bool = False
    rank_by: tuple[int, str] | None = None
    group_tokens: int | None = None
    step_separator: str = DEFAULT_SEPARATOR
    votes: VoteRule | None = None
    split_by: Literal["prompt", "row"] = "prompt"

    @property
    def joins(self) -> bool:
        """Whether rows of one prompt may become one."""
        return self.merge_prompts or self.group_tokens is not None or self.votes is not None


def side_of(role: str, near_prompt: bytes, policy: Policy) -> str:
    """The split of a row: that of its file, or by a hash of its prompt, so that near duplicates of a prompt are on one side."""
    if role == "validation":
        return "validation"
    held_out = int(digest([policy.seed, "split", near_prompt.hex()])[:16], 16) < policy.validation_fraction * 2.0**64
    return "validation" if held_out else "train"


def order_of(side: str, identifier: str, content: bytes, policy: Policy) -> str:
    """The rank of a row: one sort orders both splits; the content breaks the tie between rows that share an id."""
    return f"{side} {digest([policy.seed, identifier])[:16]}{content.hex()[:16]}"


@dataclass(frozen=True, slots=True)
class Unseen:
    """Prompts of validation files and benchmarks, which are not trained on.

    Attributes:
        keys: their keys, sorted, each once.
        benchmark: whether each is of a benchmark only.
        files, numbers: where each stands first.
    """

    keys: npt.NDArray[np.bytes_]
    benchmark: npt.NDArray[np.bool_]
    files: npt.NDArray[Any]
    numbers: Indices

    @classmethod
    def nothing(cls) -> Unseen:
        """No prompt."""
        return cls.of(KEYED_SCHEMA.empty_table())

    @classmethod
    def of(cls, table: pa.Table, files: Sequence[str] | None = None) -> Unseen:
        """The prompts of a table of KEYED_SCHEMA: of its validation rows that are in use, and of its benchmarks.

        Args:
            files: names, where the column `file` counts them.
        """
        first: dict[bytes, tuple[bool, Any, int]] = {}
        names = ("kind", "role", "near_prompt", "reason", "file", "number")
        for kind, role, key, reason, file, number in zip(*(table.column(name).to_pylist() for name in names), strict=True):
            if role != "train" and key is not None and reason is None and kind == "row":
                place = (role == BENCHMARK, file if files is None else files[file], number)
                first[key] = min(first.get(key, place), place)
        keys = sorted(first)
        return cls(
            np.array(keys, dtype="S16"),
            np.array([first[key][0] for key in keys], dtype=bool),
            np.array([first[key][1] for key in keys], dtype=object),
            np.array([first[key][2] for key in keys], dtype=np.int64),
        )

    def find(self, keys: Sequence[bytes]) -> Indices:
        """Of each key its place, or -1."""
        asked = np.array(keys, dtype="S16")
        if not len(self.keys) or not len(asked):
            return np.full(len(asked), -1)
        places = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        return np.where(self.keys[places] == asked, places, -1)


class _Verdicts:
    # Columns of a table of KEYED_SCHEMA, and what is decided about its rows.

    def __init__(self, table: pa.Table, files: Sequence[str] | None) -> None:
        self.table = table
        self.reasons: list[str | None] = table.column("reason").to_pylist()
        self.details: list[str | None] = table.column("detail").to_pylist()
        self.splits: list[str | None] = table.column("split").to_pylist()
        self.beside: list[str | None] = [None] * table.num_rows
        self._files = files

    def place(self, index: int) -> str:
        file, number = self.value("file", index), self.value("number", index)
        return f"row {number} of {file if self._files is None else self._files[file]}"

    def value(self, name: str, index: int) -> Any:
        return self.table.column(name)[int(index)].as_py()

    def smallest(self, indices: Indices) -> int:
        names = ("record_key", "file", "number")
        found: int = min(indices.tolist(), key=lambda index: tuple(self.value(name, index) for name in names))
        return found

    def reject(self, indices: Indices, reason: BadRow, detail: str) -> None:
        for index in indices.tolist():
            self.reasons[index], self.details[index], self.splits[index] = reason.value, detail, None

    def done(self) -> pa.Table:
        table = self.table
        for name, values in (("reason", self.reasons), ("detail", self.details), ("split", self.splits), ("beside", self.beside)):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
        return table


def judge(table: pa.Table, policy: Policy, unseen: Sequence[Unseen] | None = None, files: Sequence[str] | None = None) -> pa.Table:
    """Mark duplicates, contradictions, near duplicates, and train rows whose prompt stands in validation or in a benchmark.

    `table` holds all rows of a content, or of a near content where near duplicates are asked for. Of equal rows the one with the smallest
    record stays, so that the result does not depend on files or their order; only between rows equal to the letter the first of the first
    file stays.

    Args:
        table: has the columns of KEYED_SCHEMA.
        unseen: prompts that are not trained on; None: those of the table itself.
        files: names, where the column `file` counts them.
    """
    verdicts = _Verdicts(table, files)
    for prompts in [Unseen.of(table)] if unseen is None else unseen:
        _keep_unseen(verdicts, prompts)
    for rows in _groups(verdicts, "content"):
        judgements = pc.unique(table.column("judgement").take(pa.array(rows)))
        if policy.votes is not None and (len(judgements) > 1 or verdicts.value("tied", rows[0])):
            continue  # they are votes, which `combine` counts
        if len(judgements) > 1:
            _contradict(verdicts, rows)
        else:
            kept = verdicts.smallest(rows)
            verdicts.reject(rows[rows != kept], BadRow.DUPLICATE, f"the same as {verdicts.place(kept)}")
    for rows in _groups(verdicts, "near_content"):
        first = verdicts.smallest(rows)
        for index in rows[rows != first].tolist():
            verdicts.beside[index] = verdicts.place(first)
    return verdicts.done()


def _keep_unseen(verdicts: _Verdicts, unseen: Unseen) -> None:
    table = verdicts.table
    in_use = np.array([split is not None for split in verdicts.splits], dtype=bool)
    of_train = np.array([role == "train" for role in table["role"].to_pylist()], dtype=bool)
    candidates = np.flatnonzero(of_train & in_use)
    found = unseen.find(table["near_prompt"].take(pa.array(candidates)).to_pylist())
    for index, place in zip(candidates[found >= 0].tolist(), found[found >= 0].tolist(), strict=True):
        other = f"row {unseen.numbers[place]} of {unseen.files[place]}"
        reason = BadRow.CONTAMINATED if unseen.benchmark[place] else BadRow.IN_VALIDATION
        verdicts.reject(
            np.array([index]), reason, f"the prompt is that of {other}, or differs from it in case, spaces and punctuation only"
        )
        verdicts.beside[index] = other


def _groups(verdicts: _Verdicts, column: str) -> list[Indices]:
    """Rows in use that share a key and a role, in groups of two or more."""
    rows = np.array([index for index, split in enumerate(verdicts.splits) if split is not None], dtype=np.int64)
    if not len(rows):
        return []
    chosen = verdicts.table.select([column, "role"]).take(pa.array(rows))
    keys = chosen.column(column).combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    keys = 2 * keys + pc.equal(chosen["role"], "validation").to_numpy(zero_copy_only=False)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    return [rows[part] for part in np.split(order, starts[1:]) if len(part) > 1]


def _contradict(verdicts: _Verdicts, rows: Indices) -> None:
    judgements = [verdicts.value("judgement", index) for index in rows]
    first = judgements[0]
    other = next(index for index, judgement in zip(rows, judgements, strict=True) if judgement != first)
    for index, judgement in zip(rows, judgements, strict=True):
        against = other if judgement == first else rows[0]
        detail = f"{verdicts.place(against)} judges the same completions otherwise"
        verdicts.reject(np.array([index]), BadRow.CONTRADICTION, detail)
