"""How the rows that `data.group_pairs` joins travel through `prepare`: folded into one row before encoding, decided after it.

A group that cannot be encoded as a whole, or is too large, is unfolded into its rows again: a row is never lost to its group.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from rayward.data.joining import Group, Left, join
from rayward.data.records import dump_record, load_record

Row = dict[str, Any]
MARK = "grouping"
"""Kind of a line that counts: `number` rows (or groups) of what `detail` says."""


def fold(table: pa.Table) -> pa.Table:
    """Put the rows of each group into one row, in its column `members`. `table` holds whole prompts, after the split."""
    by_prompt: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, (split, prompt) in enumerate(zip(table.column("split").to_pylist(), table.column("prompt_key").to_pylist(), strict=True)):
        if split is not None:
            by_prompt[split, prompt].append(index)
    records = table.column("record")
    groups: list[tuple[list[int], Group]] = []
    left: Counter[Left] = Counter()
    for rows in by_prompt.values():
        if len(rows) > 1:
            found, others = join([load_record(records[index].as_py()) for index in rows])
            groups += [([rows[member] for member in group.members], group) for group in found]
            left += others
    taken = [index for indices, _ in groups for index in indices]
    members = iter(table.take(pa.array(taken, pa.int64())).to_pylist())
    folded: list[Row] = []
    for indices, group in groups:
        rows_of_group = [next(members) for _ in indices]
        folded.append(rows_of_group[0] | {"record": dump_record(group.comparison), "members": json.dumps(rows_of_group)})
    gone = set(taken)
    rest = table.take(pa.array([index for index in range(table.num_rows) if index not in gone], pa.int64()))
    marks = [_mark(reason, number) for reason, number in left.items()]
    return pa.concat_tables([rest, pa.Table.from_pylist([*folded, *marks], schema=table.schema)])


def unfold(row: Row, encode: Callable[[Row], Row], max_group_tokens: int) -> list[Row]:
    """The encoded row; of a folded one, the whole beside its merged rows, or else its rows one by one."""
    if row["members"] is None:
        return [encode(row)]
    members: list[Row] = json.loads(row["members"])
    whole = encode(row)
    if whole["split"] is not None and _num_tokens(whole) <= max_group_tokens:
        merged = [member | {"kind": "merged", "split": None} for member in members[1:]]
        return [whole, *merged, _mark("groups", 1), _mark("joined", len(members))]
    return [*(encode(member) for member in members), _mark(Left.UNFIT, len(members))]


def _num_tokens(row: Row) -> int:
    return len(row["prefix_ids"]) + sum(len(ids) for ids in row["branch_ids"])


def _mark(what: str, number: int) -> Row:
    return {"kind": MARK, "detail": str(what), "number": number, "raw": ""}
