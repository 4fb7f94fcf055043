"""What makes two rows the same: by token ids, or by text but for case, spaces and punctuation; and what follows for the split."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.tokenizer import CHATML, make_tokenizer

from rayward.contract.contract import Contract
from rayward.data.formats.table import SourceOptions
from rayward.data.prepare.combine import settle
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.identity import normalised
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.parts import gather, write_part
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.tally import SOURCES_KEPT, Sources, Tally, cut, largest

MAX_TOKENS = 120
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")
SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + CHATML


def encoders_of(path: Path, template: str = CHATML) -> Encoders:
    tokenizer = make_tokenizer(path)
    tokenizer.chat_template = template
    return Encoders.of(Contract.from_tokenizer(tokenizer, max_tokens=MAX_TOKENS), tokenizer)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return encoders_of(tmp_path_factory.mktemp("tokenizer"))


def pair(prompt: Any, chosen: str = "yes", rejected: str = "no", **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def settled(rows: list[dict[str, Any]], encoders: Encoders, **policy: Any) -> list[dict[str, Any]]:
    """Rows after all steps, each with its `role`, in the order of the file."""
    rule = Policy(0, policy.pop("fraction", 0.0), policy.pop("too_long", "truncate"), **policy)
    raw = [
        {"kind": "row", "role": row.pop("role", "train"), "file": "f", "number": i, "raw": json.dumps(row)}
        for i, row in enumerate(map(dict, rows), 1)
    ]  # fmt: skip
    plan = Adaptation({"f": ("trl", SourceOptions("set", "prompt"))}, "quarantine")
    table = settle(encode(pa.Table.from_pylist(raw, READ_SCHEMA), plan, encoders, rule), rule)
    return sorted(table.to_pylist(), key=lambda row: row["number"])


def fates(rows: list[dict[str, Any]]) -> list[str]:
    return [row["reason"] or row["split"] or row["role"] for row in rows]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is it?", "  what IS it ", True),
        ("It's, well: “so”…", "it s well so", True),
        ("ﬁne", "fine", True),  # a ligature
        ("Straße", "STRASSE", True),
        ("3-2", "3 - 2", True),
        ("a\n\n- b", "a b", True),
        ("3-2", "3/2", False),
        ("3-2", "32", False),
        ("3.5", "35", False),
        ("3.5", "3,5", False),
        ("x = 5", "x < 5", False),
        ("!!!", "???", False),
        ("😀", "😢", False),
        ("कि", "की", False),  # vowel signs are no punctuation
    ],
)
def test_normalised_texts(first: str, second: str, same: bool) -> None:
    assert (normalised(first) == normalised(second)) is same


def test_ascii_goes_the_quick_way_to_the_same_words() -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(chr(generator.randrange(128)) for _ in range(40))
        assert normalised(text + " x") == normalised(text + " \u00adx"), repr(text)  # a soft hyphen is white space


def test_what_the_template_trims_is_the_same(tmp_path: Path) -> None:
    encoders = encoders_of(tmp_path, TRIMS)
    rows = [pair("q"), pair("q "), pair(" q", "yes ", "no"), pair("q", "no ", "yes"), pair("q\n", "a", "b")]
    assert fates(settled(rows[:3], encoders)).count("duplicate") == 2
    assert fates(settled(rows, encoders)) == ["contradiction"] * 4 + ["train"]
    assert len({row["prompt_key"] for row in settled(rows, encoders)}) == 1


def test_an_implied_system_turn_is_the_one_that_is_written_out(tmp_path: Path) -> None:
    encoders = encoders_of(tmp_path, SYSTEM)
    written = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    other = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "q"}]
    assert sorted(fates(settled([pair("q"), pair(written), pair(other)], encoders))) == ["duplicate", "train", "train"]
    held_out = [pair(written, "1", "2", role="validation"), pair("q")]
    assert fates(settled(held_out, encoders)) == ["validation", "in_validation"]


def test_near_duplicates_are_told_and_on_one_side(encoders: Encoders) -> None:
    rows = [
        pair(text, *answers) for i in range(60) for text in (f"Question {i}?", f"question  {i}") for answers in (("Yes.", "no"), ("a", "b"))
    ]
    found = settled(rows, encoders, fraction=0.5)
    assert {row["split"] for row in found} == {"train", "validation"}
    for start in range(0, len(found), 4):
        assert len({row["split"] for row in found[start : start + 4]}) == 1
    near = [row for row in found if row["beside"] is not None]
    assert len(near) == 120
    tally = Tally.merged([Tally.of(pa.Table.from_pylist(found))])
    assert tally.near_duplicates == 120
    assert tally.splits.total() == 240
    assert len(tally.near_examples) == 5


def test_validation_and_benchmarks_keep_their_prompts(encoders: Encoders) -> None:
    rows = [
        pair("Held out?", role="validation"),
        pair("A benchmark's question", "no matter", "what", role="contamination"),
        pair("only a prompt", "same", "same", role="contamination"),
        {"prompt": "", "chosen": "a", "rejected": "b", "role": "contamination"},
        pair("held  out", "a", "b"),
        pair("a benchmark s question!", "a", "b"),
        pair("Only a prompt.", "a", "b"),
        pair("another", "a", "b"),
    ]
    found = settled(rows, encoders)
    assert fates(found) == [
        "validation", "contamination", "contamination", "empty_prompt", "in_validation", "contaminated", "contaminated", "train",
    ]  # fmt: skip
    assert found[5]["detail"] == "the prompt is that of row 2 of f, or differs from it in case, spaces and punctuation only"
    tally = Tally.merged([Tally.of(pa.Table.from_pylist(found))])
    assert (tally.contaminated, tally.benchmark, tally.unread) == ({"f": 2}, {"f": 2}, {"empty_prompt": 1})
    assert tally.quarantined == {"in_validation": 1, "contaminated": 2}
    # Where rows join it is decided among the rows of a prompt.
    assert fates(settled(rows, encoders, votes="soft")) == fates(found)


def test_a_prompt_that_is_cut_is_told_apart_by_what_it_was(encoders: Encoders) -> None:
    def turns(old: str) -> list[dict[str, str]]:
        contents = (("user", old * 30), ("assistant", "x"), ("user", "new"))
        return [{"role": role, "content": content} for role, content in contents]

    found = settled([pair(turns("old ")), pair(turns("odd ")), pair(turns("old "), "no", "yes")], encoders)
    assert fates(found) == ["contradiction", "train", "contradiction"]
    assert found[1]["truncated"]
    assert found[0]["prefix_ids"] == found[1]["prefix_ids"]
    assert found[0]["prompt_key"] != found[1]["prompt_key"]


def test_rows_come_back_from_disk_in_the_order_that_is_asked_for(encoders: Encoders, tmp_path: Path) -> None:
    rows = pa.Table.from_pylist(settled([pair(f"q{i}", f"a{i}", "b") for i in range(700)], encoders), schema=None)
    parts = [write_part(rows.slice(start, 350), f"{tmp_path}/parts", order_by="order") for start in (0, 350)]
    asked = pa.concat_tables([part.select(["part", "place", "id"]) for part in parts])
    chosen = asked.take(pa.array(random.Random(0).sample(range(700), 500)))
    found = gather(chosen, f"{tmp_path}/parts", ["id", "branch_ids", "raw"])
    assert found.column_names == ["id", "branch_ids", "raw"]
    assert found["id"].to_pylist() == chosen["id"].to_pylist()
    whole = dict(zip(rows["id"].to_pylist(), rows["branch_ids"].to_pylist(), strict=True))
    assert found["branch_ids"].to_pylist() == [whole[each] for each in chosen["id"].to_pylist()]


def test_of_very_many_sources_the_largest_are_named() -> None:
    many: Sources = {f"s{i}": (1, 0, 0) for i in range(3 * SOURCES_KEPT)}
    many["large"], many["bad"] = (50, 3, 1), (0, 0, 40)
    halves = [{name: counts for name, counts in many.items() if (len(name) % 2 == 0) is even} for even in (False, True)]
    whole = largest([cut(many)])
    assert largest(map(cut, halves)) == whole
    assert len(whole) == SOURCES_KEPT + 1
    assert (whole["large"], whole["bad"]) == ((50, 3, 1), (0, 0, 40))
    assert whole[f"{2 * SOURCES_KEPT + 2:,} other sources"] == (2 * SOURCES_KEPT + 2, 0, 0)
    rows = [{"kind": "row", "role": "train", "source": f"{i}", "split": "train"} for i in range(SOURCES_KEPT + 1)]
    empty = {"reason": None, "number": 1, "detail": None, "file": "f", "beside": None, "leftover": None}
    table = pa.Table.from_pylist([{**row, **empty} for row in rows])
    assert Tally.merged([Tally.of(table)]).sources is None
    assert Tally.merged([Tally.of(table.slice(0, SOURCES_KEPT)), Tally.of(table.slice(SOURCES_KEPT))]).sources is None
    assert Tally.merged([Tally.of(table.slice(1)), Tally.of(table.slice(1))]).sources == {
        f"{i}": (2, 0, 0) for i in range(1, SOURCES_KEPT + 1)
    }


def test_rows_of_one_prompt_are_held_out_one_by_one_where_that_is_asked(encoders: Encoders) -> None:
    rows = [pair("All have it.", f"yes {i}", f"no {i}") for i in range(60)]
    assert len(set(fates(settled(rows, encoders, fraction=0.5)))) == 1
    sides = fates(settled(rows, encoders, fraction=0.5, split_by="row"))
    assert 15 < sides.count("validation") < 45
    # Near duplicates stay together, and what is held out by name leaves the training data.
    twins = [pair("All have it.", f"Yes, {i}!", f"no {i}") for i in range(60)]
    assert fates(settled(twins, encoders, fraction=0.5, split_by="row")) == sides
    held_out = [{**row, "role": "validation"} for row in rows[:3]]
    assert fates(settled([*rows, *held_out], encoders, split_by="row")) == ["in_validation"] * 3 + ["train"] * 57 + ["validation"] * 3
