"""Pairs to groups through the steps of `prepare`: folded after the split, decided at encoding, counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.tokenizer import CHATML, make_tokenizer

from rayward.config.load import load_config
from rayward.contract.contract import Contract
from rayward.data.formats.table import SourceOptions
from rayward.data.prepare.combine import settle
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.tally import Tally
from rayward.data.prepared import PREPARED_SCHEMA
from rayward.errors import ConfigError

MAX_TOKENS = 100
NO_LIMIT = 10_000


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """By a template that cuts spaces at the end of a turn."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'].rstrip()")
    contract = Contract.from_tokenizer(tokenizer, max_tokens=MAX_TOKENS)
    return Encoders.of(contract, tokenizer)


def prepared(rows: list[dict[str, Any]], encoders: Encoders, *, buckets: int = 1, role: str = "train", **policy: Any) -> pa.Table:
    """The rows after all steps; encoded row by row, and each bucket is settled on its own."""
    rule = Policy(0, policy.pop("fraction", 0.0), "truncate", **{"group_tokens": 2 * MAX_TOKENS, **policy})
    raw = [{"kind": "row", "role": role, "file": "f", "number": i, "raw": json.dumps(row)} for i, row in enumerate(rows, 1)]
    read = pa.Table.from_pylist([*raw, {"kind": "total", "role": role, "file": "f", "number": len(raw), "raw": ""}], schema=READ_SCHEMA)
    plan = Adaptation({"f": ("trl", SourceOptions("set", "prompt"))}, rule.ties)
    encoded = pa.concat_tables([encode(read.slice(i, 1), plan, encoders, rule) for i in range(read.num_rows)])
    numbers = [0 if key is None else key[0] % buckets for key in encoded.column("near_prompt").to_pylist()]
    parts = [encoded.take(pa.array([i for i, number in enumerate(numbers) if number == bucket], pa.int64())) for bucket in range(buckets)]
    return pa.concat_tables([settle(part, rule) for part in parts])


def used(table: pa.Table) -> list[dict[str, Any]]:
    return sorted((row for row in table.to_pylist() if row["split"] is not None), key=lambda row: row["order"])


def _written(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PREPARED_SCHEMA.names if name != "row"}


def tally(table: pa.Table) -> Tally:
    counts = Tally.merged([Tally.of(table)])
    assert counts.read == counts.splits.total() + counts.num_merged + counts.quarantined.total()
    return counts


def pair(prompt: str, chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


CHAIN = [pair("p", "a", "b"), pair("p", "b", "c"), pair("p", "a", "c")]


def test_a_chain_becomes_one_comparison_with_the_ids_of_its_conversations(encoders: Encoders) -> None:
    table = prepared([*CHAIN, pair("q", "a", "b")], encoders)
    counts = tally(table)
    assert (counts.splits, counts.num_merged, counts.quarantined) == ({"train": 2}, 2, {})
    assert counts.grouping == {"groups": 1, "joined": 3}
    (group,) = [row for row in used(table) if len(row["branch_ids"]) == 3]
    assert (json.loads(group["completions_json"]), group["ranks"]) == (["a", "b", "c"], [0, 1, 2])
    prompt = json.loads(group["prompt_json"])
    assert [group["prefix_ids"] + branch for branch in group["branch_ids"]] == [encoders.contract.encode(prompt, text) for text in "abc"]


def test_without_the_setting_nothing_joins(encoders: Encoders) -> None:
    counts = tally(prepared(CHAIN, encoders, group_tokens=None))
    assert (counts.splits, counts.num_merged, counts.grouping) == ({"train": 3}, 0, {})


def test_prompts_are_told_apart_by_all_their_turns(encoders: Encoders) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p"}]
    assert tally(prepared([CHAIN[0], pair(turns, "b", "c")], encoders)).splits == {"train": 2}  # type: ignore[arg-type]


def test_what_cannot_join_stays_as_its_rows_and_is_counted(encoders: Encoders) -> None:
    rows = [
        *[pair("incomplete", "a", "b"), pair("incomplete", "a", "c")],
        *[pair("circle", "a", "b"), pair("circle", "b", "c"), pair("circle", "c", "a")],
        *[pair("margin", "a", "b", margin=1.0), pair("margin", "b", "c", margin=1.0)],
        *[pair("unrelated", "a", "b"), pair("unrelated", "c", "d")],
    ]
    table = prepared(rows, encoders)
    assert tally(table).grouping == {"incomplete": 2, "contradictory": 3, "apart": 2}
    alone = prepared(rows, encoders, group_tokens=None)
    assert [_written(row) for row in used(table)] == [_written(row) for row in used(alone)]


def test_ties_take_part_where_they_are_kept(encoders: Encoders) -> None:
    rows = [{"prompt": "p", "completions": list(texts), "ranks": ranks} for texts, ranks in (("ab", [0, 0]), ("bc", [0, 1]))]
    rule = Policy(0, 0.0, "truncate", ties="keep", group_tokens=NO_LIMIT)
    raw = [{"kind": "row", "role": "train", "file": "f", "number": i, "raw": json.dumps(row)} for i, row in enumerate(rows, 1)]
    plan = Adaptation({"f": ("ranking", SourceOptions("set"))}, "keep")
    (group,) = used(settle(encode(pa.Table.from_pylist(raw, schema=READ_SCHEMA), plan, encoders, rule), rule))
    assert (json.loads(group["completions_json"]), group["ranks"]) == (["a", "b", "c"], [0, 0, 1])


def test_duplicates_and_contradictions_go_before(encoders: Encoders) -> None:
    rows = [*CHAIN, CHAIN[0], pair("p", "x", "y"), pair("p", "y", "x"), pair("p", "y", "a")]
    counts = tally(prepared(rows, encoders))
    assert counts.quarantined == {"duplicate": 1, "contradiction": 2}
    assert counts.grouping == {"groups": 1, "joined": 4}  # y > a > b > c: the pairs of x and y are out


@pytest.mark.parametrize(("limit", "groups"), [(83, 1), (82, 0)])
def test_a_group_over_the_limit_stays_as_its_rows(encoders: Encoders, limit: int, groups: int) -> None:
    # <|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n takes 20 tokens, each answer 20 and its end 1.
    rows = [pair("p", first * 20, second * 20) for first, second in ("ab", "bc", "ac")]
    table = prepared(rows, encoders, group_tokens=limit)
    tokens = [len(row["prefix_ids"]) + sum(map(len, row["branch_ids"])) for row in used(table)]
    assert tokens == ([20 + 3 * 21] if groups else [20 + 2 * 21] * 3)
    assert tally(table).grouping == ({"groups": 1, "joined": 3} if groups else {"unfit": 3})


def test_a_row_is_not_lost_to_a_completion_of_another_row(encoders: Encoders) -> None:
    long = "x" * MAX_TOKENS
    table = prepared([*CHAIN, pair("p", "c", long)], encoders)
    counts = tally(table)
    assert (counts.splits, counts.quarantined, counts.grouping) == ({"train": 1}, {"too_long": 1}, {"groups": 1, "joined": 3})
    # "b" and "b " are one text to the template, so two of these contradict each other.
    table = prepared([pair("p", "a", "b"), pair("p", "b", "c"), pair("p", "c", "b ")], encoders)
    counts = tally(table)
    assert (counts.splits, counts.quarantined, counts.grouping) == ({"train": 1}, {"contradiction": 2}, {})


def test_no_prompt_is_on_both_sides(encoders: Encoders) -> None:
    rows = [pair(f"p{i}", *two) for i in range(40) for two in ("ab", "bc")]
    table = prepared(rows, encoders, fraction=0.5)
    sides = Counter(row["prompt_key"] for row in used(table))
    assert set(sides.values()) == {1}
    assert len({row["split"] for row in used(table)}) == 2
    assert tally(table).grouping == {"groups": 40, "joined": 80}


def test_neither_order_of_rows_nor_number_of_buckets_matters(encoders: Encoders) -> None:
    generator = random.Random(3)
    rows = []
    for prompt in range(12):
        best_first = generator.sample("abcdef", 4)
        chosen = [(i, j) for i in range(4) for j in range(i + 1, 4) if generator.random() < 0.7]
        flip = generator.random() < 0.2
        rows += [pair(f"p{prompt}", *(best_first[k] for k in ((j, i) if flip and (i, j) == (0, 3) else (i, j)))) for i, j in chosen]
    expected = used(prepared(rows, encoders))
    assert tally(prepared(rows, encoders)).grouping.keys() >= {"groups", "joined", "incomplete"}
    for buckets in (1, 3, 7):
        generator.shuffle(rows)
        found = used(prepared(rows, encoders, buckets=buckets))
        assert [(row["order"], _written(row)) for row in found] == [(row["order"], _written(row)) for row in expected]


def test_the_limit_is_that_of_a_pair_unless_it_is_set() -> None:
    def limit(*settings: str) -> int | None:
        return load_config([], ["model.path=x", "model.max_tokens=512", *settings]).group_tokens

    assert limit() is None
    assert limit("data.group_pairs=true") == 1024
    assert limit("data.group_pairs=true", "training.tokens_per_microbatch=8192") == 1024
    assert limit("data.group_pairs=true", "data.group_tokens=9000") == 9000
    with pytest.raises(ConfigError, match=r"data\.group_pairs is false"):
        limit("data.group_tokens=9000")
