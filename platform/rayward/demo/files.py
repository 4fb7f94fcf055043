"""The generated world as files: rankings with ratings, labels of steps and critiques, pairs, and a tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from rayward.contract.encoder import split_steps
from rayward.demo.tokenizer import train_tokenizer
from rayward.demo.world import ATTRIBUTES, FILLERS, Task, generate, pairs

STEP_SEPARATOR = ". "
"""Between the sentences of a completion."""


def write_demo(directory: Path, num_train_prompts: int, num_validation_prompts: int, seed: int) -> None:
    """Write the demo's data; the same arguments give the same bytes.

    Files: `train.jsonl` and `validation.jsonl` (pairs), `rankings.jsonl` and `rankings_validation.jsonl` (all completions of the same
    prompts, with attributes by name, among them `label`: 1 when the answer is right, else 0; `step_labels` of their sentences;
    `critiques`), `tokenizer/` (trained on the training prompts only). No prompt is on both sides.

    Raises:
        DataError: the world has not that many prompts.
    """
    rows = list(generate(num_train_prompts + num_validation_prompts, seed))
    held_out = set(random.Random(f"rayward world split {seed}").sample(range(len(rows)), num_validation_prompts))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    validation = [rows[index] for index in sorted(held_out)]
    directory.mkdir(parents=True, exist_ok=True)
    _write_lines(directory / "train.jsonl", pairs(train))
    _write_lines(directory / "validation.jsonl", pairs(validation))
    _write_lines(directory / "rankings.jsonl", map(_with_names, train))
    _write_lines(directory / "rankings_validation.jsonl", map(_with_names, validation))
    prompts = (f"{turn['role']} {turn['content']}" for row in train for turn in row["prompt"])
    completions = (f"assistant {text}" for row in train for text in row["completions"])
    train_tokenizer(chain(prompts, completions), directory / "tokenizer")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _with_names(row: dict[str, Any]) -> dict[str, Any]:
    task = Task.from_prompt(row["prompt"])
    named = [dict(zip(ATTRIBUTES, ratings, strict=True)) for ratings in row["attributes"]]
    return {
        **row,
        "attributes": [{**ratings, "label": float(ratings["correctness"] == 4.0)} for ratings in named],
        "step_labels": [step_labels(task, text) for text in row["completions"]],
        "critiques": [critique(task, text) for text in row["completions"]],
    }


def critique(task: Task, completion: str) -> str:
    """What is right and wrong with a completion, in words."""
    if not task.answers(completion):
        return "The answer is wrong."
    rated = task.grade(completion)
    answer = "right" if rated["correctness"] == 4.0 else "near" if rated["correctness"] > 0 else "wrong"
    faults = {"completeness": "It says little.", "concision": "It says a lot.", "tone": "It does not sound so."}
    return " ".join([f"The answer is {answer}.", *(text for name, text in faults.items() if rated[name] < 4.0)])


def step_labels(task: Task, completion: str) -> list[float]:
    """For each sentence 1, or 0 where it answers wrongly or is one too many; the last also if the whole is too short or sounds wrong."""
    whole = task.grade(completion)
    labels = []
    for sentence, _ in split_steps(completion, STEP_SEPARATOR):
        text = f"{sentence}." if sentence[-1] not in ".!" else sentence
        right = task.demand != "short" if text.endswith(FILLERS) else task.grade(text)["correctness"] == 4.0
        labels.append(float(right))
    labels[-1] *= float(whole["completeness"] == whole["tone"] == 4.0)
    return labels
