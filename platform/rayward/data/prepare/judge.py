"""Who goes where: split by prompt, duplicates, contradictions, what joins. Whole buckets of rows; no Ray."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.data.prepare.join import fold
from rayward.data.prepare.rows import ADAPTED_SCHEMA, printable
from rayward.data.record import BadRow, Comparison, RowRejected, dump_record, joined, load_record, ranked_by, validate
from rayward.data.votes import VoteRule, merged
from rayward.schema import digest


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


def judge(table: pa.Table, policy: Policy) -> pa.Table:
    """Split by prompt; mark duplicates, contradictions and train rows whose prompt stands in validation.

    `table` holds whole buckets: all rows of a prompt. Of equal rows the one with the smallest record stays, so that the result does not
    depend on files or their order; only between rows equal to the letter the first of the first file stays.
    """
    names = ("role", "prompt_key", "content_key", "judgement_key", "reason", "detail", "file", "number")
    role, prompt, content, judgement, reasons, details, file, number = (table.column(name).to_pylist() for name in names)
    kinds, texts = table.column("kind").to_pylist(), table.column("record").to_pylist()
    splits: list[str | None] = [None] * table.num_rows
    rows = _Rows(kinds, prompt, texts, splits, reasons, details)
    in_validation: dict[str, int] = {}
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, key in enumerate(content):
        if key is not None and reasons[index] is None:
            groups[role[index], key].append(index)
    # Validation first: what is held out decides over train rows.
    for (where, _), members in sorted(groups.items(), key=lambda group: group[0][0], reverse=True):
        if where == "train" and prompt[members[0]] in in_validation:
            other = in_validation[prompt[members[0]]]
            for index in members:
                reasons[index], details[index] = BadRow.IN_VALIDATION, f"the prompt is also that of row {number[other]} of {file[other]}"
        elif policy.votes is not None and (len({judgement[index] for index in members}) > 1 or _tied(texts[members[0]])):
            _count_votes(rows, members, policy.votes, policy.ties)
        elif len({judgement[index] for index in members}) > 1:
            for index in members:
                other = next(i for i in members if judgement[i] != judgement[index])
                reasons[index] = BadRow.CONTRADICTION
                details[index] = f"row {number[other]} of {file[other]} judges the same completions otherwise"
        elif len(members) > 1:
            kept, *copies = sorted(members, key=lambda i: (texts[i], file[i], number[i]))
            for index in copies:
                reasons[index], details[index] = BadRow.DUPLICATE, f"the same as row {number[kept]} of {file[kept]}"
        if where == "validation" and reasons[members[0]] != BadRow.TIE:
            in_validation[prompt[members[0]]] = members[0]
    for index, key in enumerate(content):
        if key is not None and reasons[index] is None and kinds[index] == "row":
            splits[index] = "validation" if role[index] == "validation" or _held_out(prompt[index], policy) else "train"
    if policy.merge_prompts or policy.rank_by is not None:
        _join_unranked(rows, policy)
    changed = {"kind": kinds, "record": texts, "reason": reasons, "detail": details, "split": splits}
    for name, values in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    sides = {side: {key for key, split in zip(prompt, splits, strict=True) if split == side} for side in ("train", "validation")}
    overlap = {"kind": "overlap", "number": len(sides["train"] & sides["validation"]), "raw": ""}
    table = pa.concat_tables([table, pa.Table.from_pylist([overlap], schema=ADAPTED_SCHEMA)])
    return table if policy.group_tokens is None else fold(table)


@dataclass(frozen=True, slots=True)
class _Rows:
    # Columns of a bucket, changed in place.
    kinds: list[str]
    prompts: list[str | None]
    records: list[str]
    splits: list[str | None]
    reasons: list[str | None]
    details: list[str | None]


def _tied(record: str) -> bool:
    ranks = load_record(record).ranks
    return ranks is not None and len(set(ranks)) == 1


def _count_votes(rows: _Rows, members: list[int], rule: VoteRule, ties: Literal["quarantine", "keep"]) -> None:
    """Rows of equal content become one, or leave together where their votes say that no completion is better."""
    kept, whole, votes = merged([load_record(rows.records[index]) for index in members], rule)
    try:
        validate(whole, ties=ties)
    except RowRejected as exc:
        for index in members:
            rows.reasons[index], rows.details[index] = exc.reason.value, printable(f"{exc.detail} ({votes}; data.votes is {rule!r})")
        return
    rows.records[members[kept]] = dump_record(whole)
    for index in members:
        if index != members[kept]:
            rows.kinds[index] = "merged"


def _join_unranked(rows: _Rows, policy: Policy) -> None:
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    unranked: dict[int, Comparison] = {}
    for index, split in enumerate(rows.splits):
        if split is None:
            continue
        comparison = load_record(rows.records[index])
        if comparison.ranks is None:
            unranked[index] = comparison
            groups[split, rows.prompts[index] if policy.merge_prompts else f"row {index}"].append(index)  # type: ignore[index]
    for members in groups.values():
        kept, *others = sorted(members, key=lambda index: rows.records[index])
        comparison = joined([unranked[index] for index in (kept, *others)])
        try:
            if policy.rank_by is not None:
                comparison = ranked_by(comparison, *policy.rank_by)
            validate(comparison, ties=policy.ties)
        except RowRejected as exc:
            for index in members:
                rows.splits[index], rows.reasons[index], rows.details[index] = None, exc.reason.value, printable(exc.detail)
            continue
        rows.records[kept] = dump_record(comparison)
        for index in others:
            rows.kinds[index], rows.splits[index] = "merged", None


def _held_out(prompt_key: str, policy: Policy) -> bool:
    return int(digest([policy.seed, "split", prompt_key])[:16], 16) < policy.validation_fraction * 2.0**64
