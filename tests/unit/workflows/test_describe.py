"""`rayward data describe` and evaluation with a mapping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers.tokenizer import make_tokenizer
from typer.testing import CliRunner

from rayward.cli import app
from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.config.reading import reading_config
from rayward.data.formats.suggest import UNTOLD, suggest
from rayward.data.formats.table import choose_format
from rayward.data.prepared import told_unused
from rayward.evaluation.held_out import read_raw

ARENA = [
    {"q": f"{i}?", "a": {"text": "four"}, "b": {"text": "five"}, "winner": ("model_a", "model_b", "tie", "?")[i % 4], "magnitude": i}
    for i in range(8)
]
MAPPING = ["columns.prompt=q", "columns.first=a.text", "columns.second=b.text", "columns.label=winner"]
MAPPING += ["judgement.first=model_a", "judgement.second=model_b", "judgement.tie=tie"]


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    path = tmp_path / "arena.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ARENA))
    return path


def described(path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["data", "describe", str(path), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_rows_are_shown_as_they_would_be_trained(arena: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    text = described(arena, "--tokenizer", str(tmp_path / "tokenizer"), *(part for each in MAPPING for part in ("--data", each)))
    assert "winner: text, 100% of rows" in text
    assert "format: mapped" in text
    assert "not used: magnitude (number)" in text
    assert 'completion 1 (rank 0): "five"' in text  # row 2
    assert "<|im_start|>user\\n0?<|im_end|>" in text
    assert 'branch 0, 4 tokens, its text from position 21, judged at position 25 (token "<|im_end|>"): "our<|im_end|>"' in text
    assert "bad_ranking: 2, for example" in text
    pasted = parse_config(yaml.safe_load(text.split("a block to paste:\n")[1])["data"], DataConfig)
    assert pasted.sources[0].columns == reading_config(MAPPING, [str(arena)]).sources[0].columns


def test_a_file_of_no_format_gets_a_block_that_reads_it(arena: Path) -> None:
    text = described(arena)
    assert "format: none" in text
    assert "trl: " in text
    block = yaml.safe_load(text.split("a block to paste and correct:\n")[1])
    pasted = parse_config(block["data"], DataConfig).sources[0]
    assert choose_format(ARENA, DataConfig(), where="f", source="f", mapping=pasted)[0] == "mapped"
    assert (pasted.judgement.first, pasted.judgement.second, pasted.judgement.tie) == (("model_a",), ("model_b",), ("tie",))


def test_the_format_that_fits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "magnitude": 3}))
    text = described(path)
    assert "format: trl" in text
    assert "magnitude (number)" in text
    assert yaml.safe_load(text.split("a block to paste:\n")[1])["data"]["sources"] == [{"path": str(path), "format": "trl"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"question": "q", "better_answer": "a", "worse_answer": "b"},
            {"chosen": "better_answer", "rejected": "worse_answer", "prompt": "question"},
        ),
        (
            {"question": "q", "response1": "a", "response2": "b", "label": 1},
            {"first": "response1", "second": "response2", "label": "label", "prompt": "question"},
        ),
        (
            {"topic": "q", "items": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
            {"completions": "items.*.text", "scores": "items.*.score", "prompt": "topic"},
        ),
        ({"question": "q", "answer": "a", "feedback": "good"}, {"completion": "answer", "critiques": "feedback", "prompt": "question"}),
        ({"x": 1}, {"completion": UNTOLD, "prompt": UNTOLD}),
    ],
)
def test_blocks_are_guessed_from_names_and_values(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert yaml.safe_load(suggest("f", [row]))["data"]["sources"][0]["columns"] == columns


def test_evaluation_reads_raw_files_with_the_mapping(arena: Path, tmp_path: Path) -> None:
    held = read_raw([str(arena)], reading_config(MAPPING, [str(arena)]), download_to=str(tmp_path))
    ranks = [row["ranks"] for table in held.tables for row in table.to_pylist()]
    assert ranks == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]] * 2
    assert [record.error_code for record in held.rejected.values()] == ["bad_ranking"] * 2
    assert held.num_rows == 8
    assert told_unused(held.unused) == ["not used of arena: magnitude (number, 100 % of rows)"]
    limited = read_raw([str(arena)], reading_config([*MAPPING, "limit=3"], [str(arena)]), download_to=str(tmp_path))
    assert limited.num_rows == 3
