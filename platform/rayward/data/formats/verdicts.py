"""Published sets of two or more answers and whose is the best: Chatbot Arena, Stanford SHP, RM-Bench, RMB, distilabel's ratings."""

from __future__ import annotations

from typing import Any

from rayward.contract.conversation import Message
from rayward.data.formats.conversations import one_of
from rayward.data.formats.fields import SourceOptions, as_completion, as_messages, as_prompt, build_comparison, shared_turns
from rayward.data.formats.values import (
    Row,
    as_list,
    as_name,
    as_rating,
    as_text,
    missing,
    optional,
    parsed_list,
    required,
)
from rayward.data.record import BadRow, Comparison, RowRejected

WINNERS = {
    "model_a": (0.0, 1.0),
    "model_b": (1.0, 0.0),
    "tie": (0.0, 0.0),
    "tie (bothbad)": (0.0, 0.0),
    "tie(bothbad)": (0.0, 0.0),
    "bothbad": (0.0, 0.0),
    "both_bad": (0.0, 0.0),
}
FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")
ARENA_ANSWERS = (("conversation_a", "conversation_b"), ("response_a", "response_b"), ("response_1", "response_2"))


def arena(row: Row, options: SourceOptions) -> Comparison:
    """Chatbot Arena: two conversations, or a prompt and two responses, and the `winner`: model_a, model_b, tie or both bad (a tie).

    In the competition's table `prompt` and both responses are JSON lists with a text per round, and the winner is one of three flags.
    """
    ranks = _winner(row)
    first, second = next((keys for keys in ARENA_ANSWERS if row.get(keys[0]) is not None), ARENA_ANSWERS[0])
    if first == "conversation_a":
        conversations = [_judged_rounds(row, as_messages(required(row, key), key)) for key in (first, second)]
        prompt, answers = shared_turns(conversations, (first, second))
        if row.get("prompt") is not None and as_prompt(row["prompt"], "prompt")[-1:] not in (prompt[:1], prompt[-1:]):
            raise RowRejected(BadRow.NO_SHARED_PROMPT, "prompt is not what the conversations begin with")
    elif any(key in row for key in FLAGS):
        prompt, answers = shared_turns([_rounds(row, first), _rounds(row, second)], (first, second))
    else:
        prompt = as_prompt(required(row, "prompt"), "prompt")
        answers = [as_completion(required(row, key), key, prompt) for key in (first, second)]
    question = row.get("question_id")
    named = {**row, "id": question} if row.get("id") is None and isinstance(question, str) else row
    return build_comparison(named, options, prompt, answers, ranks=ranks)


def _winner(row: Row) -> tuple[float, float]:
    if row.get("winner") is not None:
        name = as_text(row["winner"], "winner")
        ranks = WINNERS.get(name.strip().lower())
        if ranks is None:
            raise RowRejected(BadRow.BAD_RANKING, f"winner is {name[:40]!r}; the rule is model_a, model_b, tie or tie (bothbad)")
        return ranks
    if missing(row.get(FLAGS[0])):
        raise RowRejected(BadRow.MISSING_FIELD, f"neither winner nor {', '.join(FLAGS)} is given")
    flags = [as_rating(required(row, key), key) for key in FLAGS]
    if sorted(flags) != [0.0, 0.0, 1.0]:
        raise RowRejected(
            BadRow.BAD_RANKING, f"{', '.join(FLAGS)} are {', '.join(f'{flag:g}' for flag in flags)}; the rule is that one is 1"
        )
    return WINNERS[("model_a", "model_b", "tie")[flags.index(1.0)]]


def _judged_rounds(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation up to the round that was judged: MT-Bench's judgements of its first round stand beside both."""
    judged = row.get("turn")
    ends = [index + 1 for index, turn in enumerate(turns) if turn["role"] == "assistant" and not turn.get("tool_calls")]
    return turns[: ends[judged - 1]] if type(judged) is int and 0 < judged < len(ends) else turns


def _rounds(row: Row, key: str) -> tuple[Message, ...]:
    asked, answered = (parsed_list(required(row, name), name) for name in ("prompt", key))
    if len(asked) != len(answered):
        raise RowRejected(BadRow.NO_SHARED_PROMPT, f"prompt has {len(asked)} texts and {key} has {len(answered)}")
    turns: list[Message] = []
    for index, (question, answer) in enumerate(zip(asked, answered, strict=True)):
        # A round without an answer is null there.
        turns.append(Message(role="user", content=as_text(question, f"prompt[{index}]")))
        turns.append(Message(role="assistant", content="" if answer is None else as_text(answer, f"{key}[{index}]")))
    return tuple(turns)


def shp(row: Row, options: SourceOptions) -> Comparison:
    """Stanford SHP: the post `history`, two comments, `labels` 1 where A is preferred; the strength is `score_ratio`."""
    prompt = as_prompt(required(row, "history"), "history")
    answers = [as_completion(required(row, key), key, prompt) for key in ("human_ref_A", "human_ref_B")]
    label = as_rating(required(row, "labels"), "labels")
    if label not in (0.0, 1.0):
        raise RowRejected(BadRow.BAD_RANKING, f"labels is {label:g}; the rule is 1 (A is preferred) or 0 (B)")
    scores = optional(row, "score_A"), optional(row, "score_B")
    if None not in scores and (scores[0] - scores[1]) * (label - 0.5) < 0:  # type: ignore[operator]
        raise RowRejected(BadRow.BAD_RANKING, f"labels is {label:g}, and score_A {scores[0]:g} and score_B {scores[1]:g} say otherwise")
    named = row if row.get("source") is not None else {**row, "source": row.get("domain")}
    return build_comparison(named, options, prompt, answers, ranks=(1.0 - label, label), strength=optional(row, "score_ratio"))


def rm_bench(row: Row, options: SourceOptions) -> Comparison:
    """RM-Bench: lists of chosen and rejected answers (three styles each); every chosen one is better than every rejected one."""
    prompt = as_prompt(required(row, "prompt"), "prompt")
    sides = [as_list(required(row, key), key) for key in ("chosen", "rejected")]
    answers = [
        as_completion(value, f"{key}[{i}]", prompt)
        for key, values in zip(("chosen", "rejected"), sides, strict=True)
        for i, value in enumerate(values)
    ]
    ranks = (0.0,) * len(sides[0]) + (1.0,) * len(sides[1])
    if not all(sides):
        raise RowRejected(
            BadRow.BAD_RANKING, f"{len(sides[0])} chosen and {len(sides[1])} rejected answers; the rule is one of each or more"
        )
    return build_comparison(_with_source(row, ("domain", "subset")), options, prompt, answers, ranks=ranks)


def rmb(row: Row, options: SourceOptions) -> Comparison:
    """RMB: `conversation_input` (turns) and answers: `bon_best` against all of `loser_list`, or `chosen` against `reject`."""
    prompt = as_prompt(required(row, "conversation_input"), "conversation_input")
    if row.get("bon_best") is not None:
        losers = [(f"loser_list[{i}]", value) for i, value in enumerate(as_list(required(row, "loser_list"), "loser_list"))]
        given = [("bon_best", row["bon_best"]), *losers]
    else:
        given = [(key, required(row, key)) for key in ("chosen", "reject")]
    answers = [as_completion(_written(value, key), key, prompt) for key, value in given]
    ranks = (0.0, *(1.0 for _ in given[1:]))
    named = _with_source(row, ("category_path",))
    identity = next((row[key] for key in ("bon_uid", "pair_uid") if row.get(key) is not None), None)
    if named.get("id") is None and identity is not None:
        # A number that begins anew in every file.
        named = {**named, "id": f"{as_name(named.get('source'))}/{as_name(identity)}"}
    return build_comparison(named, options, prompt, answers, ranks=ranks)


def _written(value: Any, key: str) -> Any:
    return required(value, "answer") if isinstance(value, dict) and "answer" in value else as_text(value, key)


def distilabel(row: Row, options: SourceOptions) -> Comparison:
    """distilabel: an instruction, its `generations` and their `ratings` (higher is better; attribute `rating`)."""
    key = one_of(row, ("instruction", "prompt", "input"))
    prompt = as_prompt(row[key], key)
    generations = as_list(required(row, "generations"), "generations")
    answers = [as_completion(value, f"generations[{i}]", prompt) for i, value in enumerate(generations)]
    name = next((name for name in ("ratings", "rating") if row.get(name) is not None), "ratings")
    given = as_list(required(row, name), name)
    if len(given) != len(answers):
        raise RowRejected(BadRow.BAD_RANKING, f"{name}: {len(given)} values for {len(answers)} generations")
    unrated = [i for i, value in enumerate(given) if missing(value)]
    if unrated:
        raise RowRejected(BadRow.BAD_RANKING, f"{name}: generation {unrated[0]} has none")
    ratings = [as_rating(value, f"{name}[{i}]") for i, value in enumerate(given)]
    strength = abs(ratings[0] - ratings[1]) if len(ratings) == 2 else None
    return build_comparison(
        row,
        options,
        prompt,
        answers,
        ranks=tuple(-rating for rating in ratings),
        strength=strength,
        ratings=[{"rating": rating} for rating in ratings],
    )


def _with_source(row: Row, keys: tuple[str, ...]) -> Row:
    """The row with the first of these columns as its source, where it has none of its own."""
    if row.get("source") is not None:
        return row
    return {**row, "source": next((row[key] for key in keys if row.get(key) is not None), None)}
