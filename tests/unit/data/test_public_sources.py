"""The settings that docs/data.md gives for public data sets read rows in the schemas of these; the rows are made up."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.data.formats.table import adapt, choose_format, columns_of
from rayward.data.record import Comparison, validate

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
SECTION = "Public data sets, by options alone"


def blocks() -> dict[str, dict[str, Any]]:
    """The `data:` block of each data set, by the title over it."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {SECTION}\n", 1)[1].split("\n## ", 1)[0]
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
    found = {}
    for title, part in zip(parts[1::2], parts[2::2], strict=True):
        (block,) = re.findall(r"```yaml\n(.*?)```", part, re.DOTALL)
        found[title] = yaml.safe_load(block)["data"]
    return found


JUDGED = """Write critiques for a submitted response:

[BEGIN DATA]
***
[Query]: Name a prime.
***
[Response]: Seven.
***
[END DATA]

Write critiques for this response."""
ARGUMENTS = {"arg1": {"id": "a", "text": "Seven.", "voteUp": 1}, "arg2": {"id": "b", "text": "Eight.", "voteUp": 0}}

ROWS: dict[str, dict[str, Any]] = {
    "ETHICS, utilitarianism": {"more_pleasant": "Seven.", "less_pleasant": "Eight."},
    "UKPConvArg1, pairs": {
        "id": "a_b", "file": "primes_yes", "title": "Primes", "description": "x", "stance": "Yes", **ARGUMENTS, "goldLabel": "a1",
        "in_strict": True,
        "votes": [{"worker": "w", "value": value, "reason": "x", "competence": 0.5} for value in ("a1", "a1", "equal", "a2")],
    },
    "UKPConvArg1, rankings": {
        "topic": "Primes",
        "candidates": [{"id": "a", "rank_score": 0.01, "text": "Seven."}, {"id": "b", "rank_score": 0.02, "text": "Eight."}],
    },
    "QA-Feedback": {
        "question": "Which is prime?", "passages": [["Primes", "Seven is one."]], "gold": "Seven.", "prediction 1": "Eight.",
        "prediction 2": "Seven.", "prediction 3": "Nine.", "prediction 4": "Ten.", "feedback": {"errors": []},
        "preference": [2, 0, 0, 1, 1, 0],
    },
    "AlpacaEval 2": {
        "instruction": "Name a prime.", "dataset": "helpful_base", "baseline": "m", "baseline_output": "Eleven.", "annotator": "j",
        "candidates": [
            {"generator": "a", "output": "Eight.", "preference": 1.1}, {"generator": "b", "output": "Seven.", "preference": 1.9},
            {"generator": "m", "output": "Eleven.", "preference": 1.5},
        ],
    },
    "Tülu 1, human evaluation": {
        "sheet": "s", "id": 1.0, "instance_index": 0.0, "instance_id": "t_2", "prompt": "Name a prime.", "model_a": "m", "model_b": "n",
        "completion_a": "Eight.", "completion_b": "Seven.", "completion_a_is_acceptable": "no", "completion_b_is_acceptable": "yes",
        "preference": "b-is-slightly-better", "instance_quality": None, "comment": None, "evaluator": "e", "timestamp": "t",
    },
    "UniEval": {
        "source": "Is seven a prime?", "context": "It has no divisors.", "system_id": "m", "system_output": "Seven.", "subset": "dialogue",
        "scores": {"naturalness": 3.0, "overall": 4.5},
    },
    "Shepherd, critiques": {"id": 0, "dataset": "GSM8K", "question": "Name a prime.", "answer": "Seven.", "feedback": "Right."},
    "Auto-J, critiques with a grade": {
        "usrmsg": JUDGED, "target_output": "Right, and short.\n\nRating: [[6]]", "pred_score": 6.0, "scenario": "default",
        "source_dataset": "arena",
    },
    "LLaMA-Factory, KTO": {
        "messages": [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}], "label": True,
    },
    "LLMBar": {"input": "Name a prime.", "output_1": "Eight.", "output_2": "Seven.", "label": 2, "subset": "LLMBar/Natural"},
    "JudgeBench": {
        "pair_id": "p", "original_id": 3, "source": "mmlu-pro-math", "question": "Name a prime.", "response_model": "m",
        "response_A": "Eight.", "response_B": "Seven.", "label": "B>A",
    },
    "Lists with scores": {
        "id": "x/1", "source": "x", "human": True, "split": "train", "prompt": [{"role": "user", "content": "Name a prime."}],
        "candidates": [{"text": "Eight.", "score": 0.5}, {"text": "Seven.", "score": 2.0}], "score_kind": "wins",
    },
    "Answers with ratings": {
        "id": "x/2", "source": "x", "human": True, "split": "train", "prompt": [{"role": "user", "content": "Name a prime."}],
        "response": "Seven.", "attributes": {"overall": 4.0}, "error_types": ["NONE"],
    },
    "Answers with critiques": {
        "id": "x/3", "source": "x", "human": True, "prompt": [{"role": "user", "content": "Name a prime."}], "response": "Seven.",
        "critique": "Right.", "score": 3.0,
    },
    "Benchmarks in one file": {
        "bench": "x", "subset": "easy", "id": "x/4", "prompt": [{"role": "user", "content": "Name a prime."}], "chosen": "Seven.",
        "rejected": "Eight.", "style_pair": "00", "difficulty": "normal",
    },
}  # fmt: skip


def read(title: str) -> Comparison:
    config = parse_config(blocks()[title], DataConfig)
    row = ROWS[title]
    name, options = choose_format([row], config, where=title, source="file", mapping=config.sources[0])
    columns = columns_of(name, options)
    assert not columns.missed(row)
    comparison = adapt(name, columns, row, options)
    validate(comparison, ties="quarantine")
    return comparison


@pytest.mark.parametrize("title", ROWS)
def test_the_settings_of_a_data_set_read_its_rows(title: str) -> None:
    comparison = read(title)
    if comparison.ranks is None:
        assert comparison.completions == ("Seven.",)
    else:
        best = [text for text, rank in zip(comparison.completions, comparison.ranks, strict=True) if rank == min(comparison.ranks)]
        assert best == ["Seven."]
    assert comparison.prompt[0]["content"]


def test_every_block_of_the_page_has_a_row_here() -> None:
    assert set(blocks()) == set(ROWS)


def test_what_the_settings_keep_besides_the_order() -> None:
    assert read("UKPConvArg1, pairs").vote_shares == (0.625,)
    assert read("UKPConvArg1, pairs").prompt[0]["content"] == "Give a convincing argument.\nDebate: Primes\nPosition: Yes"
    assert read("AlpacaEval 2").ranks == (-1.1, -1.9, -1.5)
    assert read("QA-Feedback").prompt[0]["content"] == "Which is prime?\n\nPassages:\nPrimes\nSeven is one."
    tulu = read("Tülu 1, human evaluation")
    assert (tulu.ranks, tulu.strength, tulu.attributes) == ((1.0, 0.0), 1.0, ((0.0,), (1.0,)))
    rated = read("UniEval")
    assert rated.attributes is not None
    assert rated.attributes[0][:2] == (4.5, 3.0)
    assert all(math.isnan(rating) for rating in rated.attributes[0][2:])
    assert (rated.source, rated.prompt[0]["content"]) == ("dialogue", "Is seven a prime?\n\nFact: It has no divisors.")
    graded = read("Auto-J, critiques with a grade")
    assert (graded.prompt[0]["content"], graded.critiques, graded.attributes) == ("Name a prime.", ("Right, and short.",), ((6.0,),))
    assert read("JudgeBench").id == "p"
