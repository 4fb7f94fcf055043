"""Rows of one prompt that become one comparison: votes, rated completions, rankings that determine one order. No Ray, no tokenizer."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from rayward.batch.comparison import shared_prefix_length
from rayward.contract.conversation import Completion
from rayward.data.prepare.join import Left, join
from rayward.data.prepare.judge import Policy, Unseen, judge
from rayward.data.prepare.rows import ENCODED_SCHEMA, printable
from rayward.data.prepared import label_columns
from rayward.data.record import BadRow, Comparison, RowRejected, completion_key, dump_record, joined, load_record, ranked_by, validate
from rayward.data.votes import merged

Row = dict[str, Any]
MARK = "grouping"
"""Kind of a line that counts: `number` rows (or groups) of what `detail` says."""


class _Branch(NamedTuple):
    # One completion of a row, in token ids.
    key: str
    completion: Completion
    ids: list[int]
    text_start: int
    step_ends: list[int] | None


def settle(table: pa.Table, policy: Policy, unseen: Unseen | None = None) -> pa.Table:
    """Judge and combine encoded rows; ENCODED_SCHEMA -> ENCODED_SCHEMA. `table` holds whole prompts, of both roles.

    Args:
        unseen: prompts of benchmarks; None: those of the table.
    """
    if not policy.joins:
        return judge(table, policy, None if unseen is None else [unseen])
    held_out = pc.equal(table.column("role"), "validation")
    validation = combine(judge(table.filter(held_out), policy, []), policy)
    others = table.filter(pc.invert(held_out))
    benchmarks = Unseen.of(others) if unseen is None else unseen
    # What leaves validation holds no prompt there.
    return pa.concat_tables([validation, combine(judge(others, policy, [Unseen.of(validation), benchmarks]), policy)])


def combine(table: pa.Table, policy: Policy) -> pa.Table:
    """Join what the policy asks for; ENCODED_SCHEMA -> ENCODED_SCHEMA. `table` holds whole prompts, after `judge`."""
    if not policy.joins:
        return table
    by_prompt: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, (split, prompt) in enumerate(zip(table.column("split").to_pylist(), table.column("prompt_key").to_pylist(), strict=True)):
        if split is not None:
            by_prompt[split, prompt].append(index)
    alone = policy.rank_by is not None or policy.votes is not None  # a row may be ranked, or be a tied vote
    together = [rows for rows in by_prompt.values() if len(rows) > 1 or alone]
    taken = [index for rows in together for index in rows]
    given = iter(table.take(pa.array(taken, pa.int64())).to_pylist())
    changed: list[Row] = []
    left: Counter[str] = Counter()
    for rows in together:
        members = [next(given) for _ in rows]
        if policy.votes is not None:
            _count_votes(members, policy)
        unranked = [row for row in members if row["split"] is not None and row["ranks"] is None]
        for rows_of_one in [unranked] if policy.merge_prompts else [[row] for row in unranked]:
            _merge(rows_of_one, policy)
        if policy.group_tokens is not None:
            left += _group([row for row in members if row["split"] is not None and row["ranks"] is not None], policy.group_tokens)
        changed += members
    marks = [{"kind": MARK, "detail": what, "number": number} for what, number in left.items()]
    gone = set(taken)
    rest = table.take(pa.array([index for index in range(table.num_rows) if index not in gone], pa.int64()))
    return pa.concat_tables([rest, pa.Table.from_pylist([*changed, *marks], schema=ENCODED_SCHEMA)])


def _count_votes(members: Sequence[Row], policy: Policy) -> None:
    """Rows of equal content as one, or all out where their votes say that no completion is better; rows are changed in place."""
    assert policy.votes is not None
    by_content: defaultdict[bytes, list[Row]] = defaultdict(list)
    for row in members:
        by_content[row["content"]].append(row)
    for rows in by_content.values():
        if len(rows) == 1 and not rows[0]["tied"]:
            continue
        rows.sort(key=lambda row: (row["record"], row["file"], row["number"]))
        orders = [sorted(range(len(row["completion_keys"])), key=row["completion_keys"].__getitem__) for row in rows]
        try:
            kept, whole, votes = merged([load_record(row["record"]) for row in rows], policy.votes, orders)
            problem = _broken(whole, policy)
        except RowRejected as exc:
            problem, votes = exc, f"{len(rows)} rows"
        if problem is not None:
            for row in rows:
                detail = printable(f"{problem.detail} ({votes}; data.votes is {policy.votes!r})")
                row |= {"split": None, "reason": problem.reason.value, "detail": detail}
            continue
        _become(rows[kept], whole, _branches(rows[kept]), rows)
        for row in (*rows[:kept], *rows[kept + 1 :]):
            row |= {"kind": "merged", "split": None}


def _broken(comparison: Comparison, policy: Policy) -> RowRejected | None:
    try:
        validate(comparison, ties=policy.ties)
    except RowRejected as exc:
        return exc
    return None


def _merge(members: Sequence[Row], policy: Policy) -> None:
    """Unranked rows of a prompt as one, ranked if the policy says so; rows are changed in place."""
    if not members or (len(members) == 1 and policy.rank_by is None):
        return
    kept, *others = sorted(members, key=lambda row: row["record"])
    comparison = joined([load_record(row["record"]) for row in (kept, *others)])
    branches = [branch for row in (kept, *others) for branch in _branches(row)]
    try:
        if policy.rank_by is not None:
            comparison = ranked_by(comparison, *policy.rank_by)
        validate(comparison, ties=policy.ties)
        if len({branch.key for branch in branches}) != len(branches):
            raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, "two completions of the prompt's rows have the same token ids")
    except RowRejected as exc:
        for row in members:
            row |= {"split": None, "reason": exc.reason.value, "detail": printable(exc.detail)}
        return
    _become(kept, comparison, branches, members)
    for row in others:
        row |= {"kind": "merged", "split": None}


def _group(members: Sequence[Row], max_tokens: int) -> Counter[str]:
    """Ranked rows of a prompt, joined where they can be; rows are changed in place. Back come the counts of `Grouping`."""
    branches: dict[str, _Branch] = {}
    for branch in (branch for row in members for branch in _branches(row)):
        # Of texts that the template makes equal the same one stands for all, whatever the order of the rows.
        known = branches.setdefault(branch.key, branch)
        if _rank(branch) < _rank(known):
            branches[branch.key] = branch
    comparisons = [
        replace(load_record(row["record"]), completions=tuple(branches[key].completion for key in row["completion_keys"]))
        for row in members
    ]
    by_text = {completion_key(branch.completion): branch for branch in branches.values()}
    groups, others = join(comparisons)
    counts: Counter[str] = Counter({str(reason): number for reason, number in others.items()})
    for group in groups:
        first, *others_of = (members[index] for index in group.members)
        whole = [by_text[completion_key(completion)] for completion in group.comparison.completions]
        shared = shared_prefix_length([branch.ids for branch in whole])
        if shared + sum(len(branch.ids) - shared for branch in whole) > max_tokens:
            counts[Left.UNFIT] += len(group.members)
            continue
        _become(first, group.comparison, whole, [first, *others_of])
        for row in others_of:
            row |= {"kind": "merged", "split": None}
        counts += Counter({"groups": 1, "joined": len(group.members)})
    return counts


def _rank(branch: _Branch) -> tuple[str, int]:
    return completion_key(branch.completion), branch.text_start


def _branches(row: Row) -> list[_Branch]:
    completions = load_record(row["record"]).completions
    steps = row["step_ends"] or [None] * len(completions)
    ids = [row["prefix_ids"] + branch for branch in row["branch_ids"]]
    return [_Branch(*each) for each in zip(row["completion_keys"], completions, ids, row["text_starts"], steps, strict=True)]


def _become(row: Row, comparison: Comparison, branches: Sequence[_Branch], members: Iterable[Row]) -> None:
    # The joined comparison in the place of its first row.
    sequences = [branch.ids for branch in branches]
    shared = shared_prefix_length(sequences)
    members = list(members)
    row |= {
        "prefix_ids": sequences[0][:shared],
        "branch_ids": [ids[shared:] for ids in sequences],
        "text_starts": [branch.text_start for branch in branches],
        "step_ends": None if comparison.step_labels is None else [branch.step_ends for branch in branches],
        **label_columns(comparison),
        "completions_json": json.dumps(comparison.completions),
        "critiques_json": None if comparison.critiques is None else json.dumps(comparison.critiques),
        "record": dump_record(comparison),
        "completion_keys": [branch.key for branch in branches],
        "truncated": any(member["truncated"] for member in members),
        "trimmed": any(member["trimmed"] for member in members),
        "changed": next((member["changed"] for member in members if member["changed"] is not None), None),
    }
