"""Formats of rankings and ratings: K completions with ranks, scores or attributes, and single rated completions.

Ratings reach a comparison only for the attributes that `data.attributes` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayward.contract.conversation import Completion, Message
from rayward.contract.encoder import split_steps
from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.data.formats.fields import (
    Row,
    SourceOptions,
    as_completion,
    as_list,
    as_number,
    as_prompt,
    as_text,
    build_comparison,
    kind_of,
    optional,
    require_user_last,
    required,
)
from rayward.data.formats.pairs import TRANSCRIPT, transcript
from rayward.data.formats.values import as_rating, missing
from rayward.data.record import BadRow, Comparison, RowRejected

HELPSTEER2_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_ROLE_MARK = "<extra_id_1>"


def ranking(row: Row, options: SourceOptions) -> Comparison:
    """`ranks` (lower is better), or `attributes` (per completion a mapping, or a list in the order of `data.attributes`), or both.

    Besides, per completion: `step_labels` (a list; read where `data.step_separator` is set) and `critiques` (a text); per pair, in the
    order (0, 1), (0, 2), …: `vote_shares`, the share of the votes for its first one.
    """
    prompt = as_prompt(required(row, "prompt"), "prompt")
    given = as_list(required(row, "completions"), "completions")
    texts = [as_completion(value, f"completions[{i}]", prompt) for i, value in enumerate(given)]
    if not texts:
        raise RowRejected(BadRow.EMPTY_COMPLETION, "completions is an empty list")
    ranks = None if row.get("ranks") is None else _ranks(as_list(row["ranks"], "ranks"), len(texts), "ranks")
    ratings = None
    if row.get("attributes") is not None:
        ratings = [_named(value, options, f"attributes[{i}]") for i, value in enumerate(as_list(row["attributes"], "attributes"))]
        if len(ratings) != len(texts):
            raise RowRejected(BadRow.BAD_RATING, f"{len(ratings)} rows of attributes for {len(texts)} completions")
    return build_comparison(
        row,
        options,
        prompt,
        texts,
        ranks=ranks,
        margin=optional(row, "margin"),
        strength=optional(row, "strength"),
        ratings=ratings,
        step_labels=_steps_of(row, texts, options.step_separator),
        critiques=None if row.get("critiques") is None else as_list(row["critiques"], "critiques"),
        vote_shares=_shares(row),
    )


def _shares(row: Row) -> tuple[float, ...] | None:
    if row.get("vote_shares") is None:
        return None
    return tuple(as_number(share, f"vote_shares[{i}]") for i, share in enumerate(as_list(row["vote_shares"], "vote_shares")))


def _steps_of(row: Row, texts: Sequence[Completion], separator: str | None) -> tuple[tuple[float, ...], ...] | None:
    if separator is None or row.get("step_labels") is None:
        return None
    given = [as_list(labels, f"step_labels[{i}]") for i, labels in enumerate(as_list(row["step_labels"], "step_labels"))]
    if len(given) != len(texts):
        raise RowRejected(BadRow.BAD_STEPS, f"{len(given)} rows of step_labels for {len(texts)} completions")
    return tuple(
        _step_labels(labels, text, separator, f"completion {i}") for i, (labels, text) in enumerate(zip(given, texts, strict=True))
    )


def _step_labels(labels: Sequence[Any], text: Completion, separator: str, where: str) -> tuple[float, ...]:
    if not isinstance(text, str):
        raise RowRejected(BadRow.BAD_STEPS, f"{where} is made of turns; the rule is a text, whose steps have labels")
    found = len(split_steps(text.strip(), separator))
    if not labels or found != len(labels):
        raise RowRejected(
            BadRow.BAD_STEPS,
            f"{where}: {len(labels)} labels of steps, and split at data.step_separator {separator!r} it has {found}; the rule is as many",
        )
    known = [_flag(label, f"{where}: label {i}") for i, label in enumerate(labels)]
    return tuple(math.nan if label is None else label for label in known)


def nectar(row: Row, options: SourceOptions) -> Comparison:
    """Nectar: `prompt` (a transcript) and `answers` with `answer` and `rank` 1..7, 1 the best."""
    prompt = _open_transcript(required(row, "prompt"))
    answers = [_object(value, f"answers[{i}]") for i, value in enumerate(as_list(required(row, "answers"), "answers"))]
    texts = [as_text(required(answer, "answer"), f"answers[{i}].answer") for i, answer in enumerate(answers)]
    return build_comparison(row, options, prompt, texts, ranks=_ranks([a.get("rank") for a in answers], len(texts), "answers.rank"))


def ultrafeedback(row: Row, options: SourceOptions) -> Comparison:
    """UltraFeedback with its ratings: `instruction`, `completions` with `response`, `annotations`, scores.

    Attributes: instruction_following, truthfulness, honesty, helpfulness (`annotations.<name>.Rating`, "N/A" is missing),
    overall_score, fine_grained_score. Critiques: `completions.critique`.
    """
    prompt = as_prompt(required(row, "instruction"), "instruction")
    completions = [_object(value, f"completions[{i}]") for i, value in enumerate(as_list(required(row, "completions"), "completions"))]
    texts = [as_text(required(value, "response"), f"completions[{i}].response") for i, value in enumerate(completions)]
    ratings = []
    for index, value in enumerate(completions):
        annotations = value.get("annotations")
        named = annotations if isinstance(annotations, dict) else {}
        rating = {
            name: _rating(note.get("Rating"), f"completions[{index}].{name}") for name, note in named.items() if isinstance(note, dict)
        }
        rating["overall_score"] = value.get("overall_score")
        rating["fine_grained_score"] = value.get("fine-grained_score")
        ratings.append(rating)
    critiques = [value.get("critique") for value in completions]
    return build_comparison(row, options, prompt, texts, ranks=None, ratings=ratings, critiques=critiques)


def helpsteer2(row: Row, options: SourceOptions) -> Comparison:
    """HelpSteer2: one `response` a row and five ratings 0..4; rows of one prompt join by `data.merge_prompts`."""
    prompt = _marked_turns(as_text(required(row, "prompt"), "prompt"))
    return build_comparison(row, options, prompt, [as_text(required(row, "response"), "response")], ranks=None, ratings=[row])


def safe_rlhf(row: Row, options: SourceOptions) -> Comparison:
    """PKU-SafeRLHF: two responses, the better and the safer one, and for each whether it is safe (attribute `is_safe`)."""
    prompt = as_prompt(required(row, "prompt"), "prompt")
    texts = [as_text(required(row, f"response_{i}"), f"response_{i}") for i in (0, 1)]
    key = f"{options.preference}_response_id"
    best = as_number(required(row, key), key)
    if best not in (0, 1):
        raise RowRejected(BadRow.BAD_RANKING, f"{key} is {best:g}; the rule is 0 or 1")
    ratings = [{"is_safe": _flag(row.get(f"is_response_{i}_safe"), f"is_response_{i}_safe")} for i in (0, 1)]
    return build_comparison(row, options, prompt, texts, ranks=(best, 1.0 - best), ratings=ratings)


def scored(row: Row, options: SourceOptions) -> Comparison:
    """`responses` with `scores` (higher is better; attribute `score`); of two, the strength is the gap."""
    prompt = as_prompt(required(row, "prompt"), "prompt")
    texts = [as_completion(value, f"responses[{i}]", prompt) for i, value in enumerate(as_list(required(row, "responses"), "responses"))]
    scores = _ranks(as_list(required(row, "scores"), "scores"), len(texts), "scores", as_rating)
    strength = abs(scores[0] - scores[1]) if len(scores) == 2 else None
    ratings = [{"score": score} for score in scores]
    return build_comparison(row, options, prompt, texts, ranks=tuple(-score for score in scores), strength=strength, ratings=ratings)


def pointwise(row: Row, options: SourceOptions) -> Comparison:
    """One `completion` and its `label`: true, false or a number (attribute `label`); rows of one prompt join by `data.merge_prompts`."""
    prompt = as_prompt(required(row, "prompt"), "prompt")
    completion = as_completion(required(row, "completion"), "completion", prompt)
    return build_comparison(row, options, prompt, [completion], ranks=None, ratings=[{"label": _flag(required(row, "label"), "label")}])


def stepwise(row: Row, options: SourceOptions) -> Comparison:
    """The steps of one completion in `completions`, and in `labels` whether each is right: true, false, a number 0 to 1, or null.

    The completion is the steps with `data.step_separator` (or an empty line) between them; rows of one prompt join by `data.merge_prompts`.
    """
    prompt = as_prompt(required(row, "prompt"), "prompt")
    steps = [as_text(step, f"completions[{i}]") for i, step in enumerate(as_list(required(row, "completions"), "completions"))]
    separator = options.step_separator or DEFAULT_SEPARATOR
    labels = _step_labels(as_list(required(row, "labels"), "labels"), separator.join(steps), separator, "the completion")
    if len(labels) != len(steps):
        raise RowRejected(BadRow.BAD_STEPS, f"{len(labels)} labels for {len(steps)} steps")
    return build_comparison(row, options, prompt, [separator.join(steps)], ranks=None, step_labels=(labels,))


def critique(row: Row, options: SourceOptions) -> Comparison:
    """One `completion` and the `critique` of it; no ranking (critique SFT); rows of one prompt stay apart."""
    prompt = as_prompt(required(row, "prompt"), "prompt")
    completion = as_completion(required(row, "completion"), "completion", prompt)
    return build_comparison(row, options, prompt, [completion], ranks=None, critiques=[required(row, "critique")])


def _ranks(values: Sequence[Any], num_completions: int, key: str, read: Callable[[Any, str], float] = as_number) -> tuple[float, ...]:
    if len(values) != num_completions:
        raise RowRejected(BadRow.BAD_RANKING, f"{key}: {len(values)} values for {num_completions} completions")
    unknown = [index for index, value in enumerate(values) if missing(value)]
    if unknown:
        raise RowRejected(BadRow.BAD_RANKING, f"{key}: completion {unknown[0]} has none")
    return tuple(read(value, f"{key}[{index}]") for index, value in enumerate(values))


def _named(value: Any, options: SourceOptions, key: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    ratings = as_list(value, key)
    if options.attributes and len(ratings) != len(options.attributes):
        raise RowRejected(
            BadRow.BAD_RATING, f"{key} has {len(ratings)} ratings without names; data.attributes names {len(options.attributes)}"
        )
    return dict(zip(options.attributes, ratings, strict=False))


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowRejected(BadRow.WRONG_TYPE, f"{key} is {kind_of(value)}; the rule is an object")
    return value


def _rating(value: Any, key: str) -> float | None:
    if missing(value) or (isinstance(value, str) and value.strip().upper() == "N/A"):
        return None
    try:
        return as_rating(value, key)
    except RowRejected as exc:
        raise RowRejected(BadRow.BAD_RATING, f"{exc.detail} or N/A") from exc


def _flag(value: Any, key: str) -> float | None:
    number = None if missing(value) else as_rating(value, key)
    return None if number is None or math.isnan(number) else number


def _open_transcript(value: Any) -> tuple[Message, ...]:
    # Nectar's prompts end with an assistant turn that has only begun.
    if not (isinstance(value, str) and TRANSCRIPT.match(value)):
        return as_prompt(value, "prompt")
    turns = transcript(value, "prompt")
    while turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns = turns[:-1]
    return require_user_last(turns, "prompt")


def _marked_turns(text: str) -> tuple[Message, ...]:
    # HelpSteer2 writes the inner turns of a dialogue as `<extra_id_1>Assistant\n…` and `<extra_id_1>User\n…`.
    first, *rest = text.split(_ROLE_MARK)
    turns = [Message(role="user", content=first.strip() if rest else first)]
    for part in rest:
        speaker, _, content = part.partition("\n")
        role = {"assistant": "assistant", "user": "user"}.get(speaker.strip().lower())
        if role is None:
            raise RowRejected(BadRow.UNKNOWN_ROLE, f"prompt: {speaker[:40]!r} after {_ROLE_MARK} is neither User nor Assistant")
        turns.append(Message(role=role, content=content.strip()))
    return require_user_last(tuple(turns), "prompt")
