"""PRM800K: solutions of which people judged every step."""

from __future__ import annotations

import math
import re
from typing import Any

from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.data.formats.fields import SourceOptions, as_prompt, build_comparison
from rayward.data.formats.values import Row, as_list, as_number, as_object, as_text, required
from rayward.data.record import BadRow, Comparison, RowRejected

_EMPTY_LINES = re.compile(r"\n\s*\n")


def prm800k(row: Row, options: SourceOptions) -> Comparison:
    """PRM800K: `question.problem` and `label.steps`, each with candidate `completions` and their `rating` -1, 0 or 1.

    The solution is the chosen candidate (or the labeler's own step) of every step; -1 is wrong, 0 and 1 are right. Where labelling
    ended without a choice, every candidate of that last step ends a solution of its own, whose earlier steps carry no second label.
    """
    question, label = as_object(required(row, "question"), "question"), as_object(required(row, "label"), "label")
    prompt = as_prompt(required(question, "problem"), "question.problem")
    if label.get("finish_reason") == "bad_problem":
        raise RowRejected(BadRow.BAD_STEPS, "label.finish_reason is bad_problem: the labeler reported the problem as broken")
    separator = options.step_separator or DEFAULT_SEPARATOR
    texts: list[str] = []
    labels: list[float] = []
    ends: list[tuple[str, float]] = []
    for index, value in enumerate(as_list(required(label, "steps"), "label.steps")):
        where = f"label.steps[{index}]"
        if ends:
            raise RowRejected(BadRow.BAD_STEPS, f"{where} follows a step without a chosen completion")
        step = as_object(value, where)
        taken, ends = _step(step, where, separator)
        if taken is not None:
            texts.append(taken[0])
            labels.append(taken[1])
    solutions = [([*texts, text], [*labels, rating]) for text, rating in ends[:1]]
    solutions += [([*texts, text], [math.nan] * len(labels) + [rating]) for text, rating in ends[1:]]
    if not ends:
        solutions = [(texts, labels)]
    if not solutions[0][0]:
        raise RowRejected(BadRow.BAD_STEPS, "label.steps holds no labelled step")
    return build_comparison(
        row,
        options,
        prompt,
        [separator.join(steps) for steps, _ in solutions],
        ranks=None,
        step_labels=tuple(tuple(found) for _, found in solutions),
    )


def _step(step: dict[str, Any], where: str, separator: str) -> tuple[tuple[str, float] | None, list[tuple[str, float]]]:
    """The step that was chosen; without one the candidates, each text once."""
    listed = as_list(step.get("completions") or [], f"{where}.completions")
    candidates = [as_object(value, f"{where}.completions[{i}]") for i, value in enumerate(listed)]
    if (chosen := step.get("chosen_completion")) is not None:
        position = as_number(chosen, f"{where}.chosen_completion")
        if not (position.is_integer() and 0 <= position < len(candidates)):
            raise RowRejected(BadRow.BAD_STEPS, f"{where}: chosen_completion is {position:g} of {len(candidates)} completions")
        return _judged(candidates[int(position)], f"{where}.completions[{position:g}]", separator), []
    if step.get("human_completion") is not None:
        written = step["human_completion"]
        # The labeler's own step is written to be right.
        return (_one_step(written["text"] if isinstance(written, dict) else written, f"{where}.human_completion", separator), 1.0), []
    found: dict[str, float] = {}
    for i, candidate in enumerate(candidates):
        text, rating = _judged(candidate, f"{where}.completions[{i}]", separator)
        found.setdefault(text, rating)
    return None, list(found.items())


def _judged(candidate: dict[str, Any], where: str, separator: str) -> tuple[str, float]:
    rating = candidate.get("rating")
    known = math.nan if rating is None else as_number(rating, f"{where}.rating")
    if known not in (-1.0, 0.0, 1.0) and rating is not None:
        raise RowRejected(BadRow.BAD_STEPS, f"{where}.rating is {known:g}; the rule is -1, 0 or 1, or null")
    return _one_step(required(candidate, "text"), where, separator), math.nan if rating is None else float(known >= 0)


def _one_step(value: Any, where: str, separator: str) -> str:
    text = as_text(value, where).strip()
    if separator == DEFAULT_SEPARATOR:
        # The last step of a solution holds empty lines before its answer, which would be read as three steps.
        text = _EMPTY_LINES.sub("\n", text)
    if separator in text or not text:
        raise RowRejected(BadRow.BAD_STEPS, f"{where}: the step is empty or holds data.step_separator {separator!r}")
    return text
