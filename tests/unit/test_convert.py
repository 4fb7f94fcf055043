"""benchmarks/convert.py on small rows in the original columns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from convert import (
    GROUP_SIZE,
    ROUNDS,
    argument_rankings,
    argument_rankings_test,
    convert,
    rated_utterances,
    rated_utterances_test,
    written_critiques,
    written_critiques_test,
)

Row = dict[str, Any]


def side(topic: str, scores: dict[str, float]) -> Row:
    candidates = [{"id": text, "rank_score": score, "text": text} for text, score in scores.items()]
    return {"topic": topic, "candidates": candidates}


def utterance(meaning: str, text: str, overall: float, subset: str = "data2text/sfres") -> Row:
    return {"source": meaning, "system_output": text, "scores": {"naturalness": 3.0, "overall": overall}, "subset": subset}


def test_files_become_json_lines_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("ethics_util_train", "ethics_util_test"):
        with gzip.open(data / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"more_pleasant": f"good {i}", "less_pleasant": f"bad {i}"}) + "\n" for i in range(10))
    files = convert(data, out, test_rows=3)
    assert [file.name for file in files] == ["ethics_util_train.jsonl", "ethics_util_test.jsonl"]
    train, test = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    assert train[0] == {"prompt": "How was day 1?", "chosen": "good 0", "rejected": "bad 0"}
    assert len(train) == 10
    assert [row["chosen"] for row in test] == ["good 0", "good 3", "good 6"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_more_test_rows_than_there_are_keep_all(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "ethics_util_test.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"more_pleasant": "good", "less_pleasant": "bad"}) + "\n")
    (file,) = convert(tmp_path, tmp_path / "out", test_rows=5)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1


def test_both_sides_of_every_third_topic_are_held_out() -> None:
    arguments = {f"argument {i}": i / 100 for i in range(2 * GROUP_SIZE + 1)}
    rows = [side(f"{topic}_{word}", arguments) for word in ("yes", "no") for topic in ("d", "c", "b", "a")]
    train, test = argument_rankings(rows), argument_rankings_test(rows)
    assert [row["source"] for row in test] == ["d_yes", "a_yes", "d_no", "a_no"]
    assert {row["source"] for row in train} == {"b_yes", "b_no", "c_yes", "c_no"}
    assert {len(row["completions"]) for row in test} == {len(arguments)}
    # Two groups of eight a round, no argument twice in a round, and each with its own place.
    assert len(train) == 4 * ROUNDS * 2
    first = [row for row in train if row["source"] == "b_yes"][:2]
    assert len({text for row in first for text in row["completions"]}) == 2 * GROUP_SIZE
    assert all(arguments[text] == rank for row in train for text, rank in zip(row["completions"], row["ranks"], strict=True))
    assert argument_rankings(rows) == train


def test_arguments_are_cleaned_and_repeated_ones_joined() -> None:
    row = side("tv-is-better-than-books-_tv--yes-", {"One <br/> two": 0.1, "&quot;No&quot; ": 0.2})
    row["candidates"].append({"id": "again", "rank_score": 0.3, "text": "One<br/>two"})
    assert argument_rankings_test([row]) == [
        {
            "prompt": "tv is better than books: argue for tv yes",
            "completions": ("One\ntwo", '"No"'),
            "ranks": (0.2, 0.2),
            "source": row["topic"],
        }
    ]


def test_utterances_of_one_meaning_are_one_row_and_single_ones_are_left_out() -> None:
    rows = [
        utterance("inform(name=x)", "x it is", 2.0),
        utterance("inform(name=x)", "how about x ?", 6.0),
        utterance("inform(name=x)", "x it is", 5.0),
        utterance("inform(name=x)", "x is a hotel", 1.0, "data2text/sfhot"),
        utterance("a story", "its summary", 1.0, "fact/qags_xsum"),
    ]
    assert rated_utterances_test(rows) == [
        {
            "prompt": "In a dialogue about a restaurant, say: inform(name=x)",
            "completions": ["x it is", "how about x ?"],
            "attributes": [{"naturalness": 3.0, "overall": 3.5}, {"naturalness": 3.0, "overall": 6.0}],
            "source": "data2text/sfres",
        }
    ]
    assert rated_utterances(rows) == []


def test_every_fifth_meaning_is_held_out() -> None:
    rows = [utterance(f"inform(name={i})", text, 4.0) for text in ("one", "two") for i in range(11)]
    train, test = rated_utterances(rows), rated_utterances_test(rows)
    assert [row["prompt"].split("=")[1] for row in test] == ["0)", "5)", "10)"]
    assert len(train) == 8


def test_short_critiques_are_kept_and_every_tenth_is_held_out() -> None:
    rows = [{"question": f" q{i} ", "answer": "a\n", "feedback": "f" * (2000 if i % 7 == 3 else 5), "dataset": "d"} for i in range(40)]
    train, test = written_critiques(rows), written_critiques_test(rows)
    assert [row["prompt"] for row in test] == ["q0", "q20", "q30"]  # the tenth is long
    assert len(train) + len(test) == sum(i % 7 != 3 for i in range(40))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert train[0] == {"prompt": "q1", "completion": "a", "critique": "fffff", "source": "d"}
