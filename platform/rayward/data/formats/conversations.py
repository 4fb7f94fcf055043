"""Formats of other training tools: LLaMA-Factory, axolotl, ms-swift, NeMo-RL, and single answers with a verdict (KTO)."""

from __future__ import annotations

from typing import Any

from rayward.contract.conversation import Message
from rayward.data.formats.columns import present
from rayward.data.formats.fields import (
    SourceOptions,
    as_completion,
    as_messages,
    as_prompt,
    build_comparison,
    require_user_last,
    shared_turns,
)
from rayward.data.formats.scores import judged
from rayward.data.formats.turns import with_tools
from rayward.data.formats.values import Row, as_list, as_number, as_object, as_rating, as_text, optional, parsed, required
from rayward.data.record import BadRow, Comparison, RowRejected

QUESTIONS = ("input", "question", "query")
"""Columns of a prompt that stands in a single text, besides `instruction` and `prompt`."""
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
"""Columns of the better and the worse answer."""
MESSAGES = ("messages", "conversations", "conversation")
"""Columns of a conversation that ends with an answer."""
MEDIA = ("images", "videos", "audios", "rejected_images", "rejected_videos", "rejected_audios", "objects")


def alpaca(row: Row, options: SourceOptions) -> Comparison:
    """LLaMA-Factory's alpaca ranking: `instruction` and `input` are one user turn, with a line break between.

    Also argilla's `chosen_response` and `rejected_response`.
    """
    prompt = _instructed(row)
    return _pair(row, options, prompt)


def axolotl(row: Row, options: SourceOptions) -> Comparison:
    """axolotl: [`system`,] `input`, `question` or `query`, `chosen`, `rejected`; or `messages` with a chosen and a rejected turn."""
    key = one_of(row, ("messages", *QUESTIONS))
    if key == "messages":
        return _pair(row, options, as_prompt(row[key], key))
    return _pair(row, options, (*_history(row), *as_prompt(as_text(row[key], key), key)))


def sharegpt(row: Row, options: SourceOptions) -> Comparison:
    """LLaMA-Factory's sharegpt ranking: `conversations` (turns with `from` and `value`), one turn `chosen`, one turn `rejected`."""
    return _pair(with_tools(row), options, as_prompt(required(row, "conversations"), "conversations"))


def ms_swift(row: Row, options: SourceOptions) -> Comparison:
    """ms-swift: the last answer of `messages` against `rejected_response` (an answer) or `rejected_messages` (a conversation).

    Or `query`, `response` and `rejected_response`.
    """
    for key in MEDIA:
        if present(row.get(key)):
            raise RowRejected(BadRow.UNSUPPORTED_MESSAGE, f"field {key!r} is not empty; only texts are supported, no images or sounds")
    if row.get("rejected_tools") not in (None, [], "", row.get("tools")):
        raise RowRejected(BadRow.WRONG_TYPE, "rejected_tools are not tools; the rule is one list of tools for both")
    asked, rejected = one_of(row, (*MESSAGES, "query")), one_of(row, ("rejected_messages", "rejected_response"))
    if rejected == "rejected_messages":
        keys = (asked, rejected)
        prompt, answers = shared_turns([as_messages(required(row, key), key) for key in keys], keys)
    elif asked in MESSAGES:
        prompt, better = _last_answer(row[asked], asked)
        answers = [better, as_completion(required(row, "rejected_response"), "rejected_response", prompt)]
    else:
        prompt = (*_history(row), *as_prompt(as_text(required(row, "query"), "query"), "query"))
        answers = [as_completion(required(row, key), key, prompt) for key in ("response", "rejected_response")]
    margin, strength = optional(row, "margin"), optional(row, "strength")
    return build_comparison(with_tools(row), options, prompt, answers, ranks=(0.0, 1.0), margin=margin, strength=strength)


def nemo_rl(row: Row, options: SourceOptions) -> Comparison:
    """NeMo-RL: `context` (turns), `completions` with `rank` (0 the best) and `completion` (turns)."""
    prompt = as_prompt(required(row, "context"), "context")
    given = [as_object(value, f"completions[{i}]") for i, value in enumerate(as_list(required(row, "completions"), "completions"))]
    if not given:
        raise RowRejected(BadRow.EMPTY_COMPLETION, "completions is an empty list")
    answers = [as_completion(required(each, "completion"), f"completions[{i}].completion", prompt) for i, each in enumerate(given)]
    for i, each in enumerate(given):
        if each.get("rank") is None:
            raise RowRejected(BadRow.BAD_RANKING, f"completions[{i}] has no rank")
    ranks = tuple(as_number(each["rank"], f"completions[{i}].rank") for i, each in enumerate(given))
    return build_comparison(row, options, prompt, answers, ranks=ranks, margin=optional(row, "margin"), strength=optional(row, "strength"))


def kto(row: Row, options: SourceOptions) -> Comparison:
    """KTO rows of LLaMA-Factory, ms-swift and axolotl: one answer and its `label` or `kto_tag` (attribute `label`).

    The answer is the last turn of `messages` or `conversations`, or stands in `completion`, `output` or `response`.
    """
    label = one_of(row, ("label", "kto_tag"))
    # The input of an instruction is part of it.
    inputs = () if row.get("instruction") is not None else ("input",)
    asked = one_of(row, (*MESSAGES, "instruction", "prompt", "question", "query", *inputs))
    if asked in MESSAGES:
        prompt, answer = _last_answer(row[asked], asked)
    else:
        key = one_of(row, ("completion", "output", "response"))
        prompt = _instructed(row) if asked == "instruction" else (*_history(row), *as_prompt(row[asked], asked))
        answer = as_completion(row[key], key, prompt)
    return build_comparison(with_tools(row), options, prompt, [answer], ranks=None, ratings=[{"label": as_rating(row[label], label)}])


def _pair(row: Row, options: SourceOptions, prompt: tuple[Message, ...]) -> Comparison:
    better, worse = next((keys for keys in ANSWERS if row.get(keys[0]) is not None or row.get(keys[1]) is not None), ANSWERS[0])
    answers = [as_completion(required(row, key), key, prompt) for key in (better, worse)]
    critiques = [row.get("chosen_feedback"), row.get("rejected_feedback")]
    return build_comparison(row, options, prompt, answers, critiques=critiques, **judged(row, options, better, worse))


def _last_answer(value: Any, key: str) -> tuple[tuple[Message, ...], Any]:
    """The turns before the last one as the prompt, and the last one as the answer."""
    turns = as_messages(value, key)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"{key!r} does not end with an assistant's turn, so there is no completion")
    prompt = require_user_last(turns[:-1], key)
    return prompt, as_completion([*turns[-1:]], key, prompt)


def _instructed(row: Row) -> tuple[Message, ...]:
    parts = [as_text(required(row, "instruction"), "instruction")]
    if row.get("input") is not None:
        parts.append(as_text(row["input"], "input"))
    text = "\n".join(part for part in parts if part.strip())
    return (*_history(row), Message(role="user", content=text))


def _history(row: Row) -> tuple[Message, ...]:
    """The earlier rounds in `history`: pairs of a question and its answer, or turns."""
    if row.get("history") is None:
        return ()
    rounds = as_list(parsed(row["history"]), "history")
    if all(isinstance(each, dict) for each in rounds):
        return as_messages(rounds, "history")
    turns: list[Message] = []
    for index, each in enumerate(rounds):
        texts = [as_text(text, f"history[{index}]") for text in as_list(each, f"history[{index}]")]
        if len(texts) != 2:
            raise RowRejected(BadRow.WRONG_TYPE, f"history[{index}] has {len(texts)} texts; the rule is a question and its answer")
        turns += [Message(role="user", content=texts[0]), Message(role="assistant", content=texts[1])]
    return tuple(turns)


def one_of(row: Row, keys: tuple[str, ...]) -> str:
    """The one of these columns that the row has."""
    found = [key for key in keys if row.get(key) is not None]
    if not found:
        raise RowRejected(BadRow.MISSING_FIELD, f"none of the fields {', '.join(keys)} is given")
    if len(found) > 1:
        raise RowRejected(BadRow.WRONG_TYPE, f"the fields {' and '.join(found)} are given; the rule is one of them")
    return found[0]
