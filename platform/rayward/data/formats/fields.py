"""What every adapter is made of: typed access to the columns of a row, and the last step to a `Comparison`.

A row that does not fit raises `RowRejected` and is quarantined. No Ray and no tokenizer here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rayward.config.sources import SourceConfig
from rayward.contract.conversation import (
    Completion,
    Message,
    RuleBrokenError,
    broken_by_completion,
    broken_by_prompt,
    broken_by_role,
    broken_by_text,
    completion_of,
    parse_turn,
)
from rayward.data.formats.hook import Adapter
from rayward.data.formats.turns import plain_turns, without_metadata
from rayward.data.formats.values import (
    FLOAT32_MAX,
    Row,
    as_list,
    as_name,
    as_number,
    as_rating,
    as_text,
    kind_of,
    missing,
    optional,
    parsed,
    required,
)
from rayward.data.record import NUMBER_COLUMNS, BadRow, Comparison, RowRejected, ranked_by, require
from rayward.schema import digest

__all__ = [
    "Row",
    "SourceOptions",
    "as_completion",
    "as_list",
    "as_messages",
    "as_number",
    "as_prompt",
    "as_text",
    "build_comparison",
    "kind_of",
    "optional",
    "require_user_last",
    "required",
    "shared_turns",
]


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What an adapter needs to know besides the row.

    Attributes:
        source: value of `Comparison.source` for rows without a `source` column.
        prompt_key: column of the prompt, for `trl` and `openrlhf`; None means that the prompt stands inside both texts.
        chosen_key, rejected_key: columns of the better and the worse completion, for `trl` and `openrlhf`.
        attributes: ratings to keep, by name and in this order; attribute_range: smallest and largest.
        rank_by: the attribute that ranks completions without a ranking.
        preference: which of the two judgements of `safe_rlhf` orders the completions.
        step_separator: text between two steps of a completion; None: labels of steps are ignored outside format `stepwise`.
        critiques: whether critiques are kept; a row without them is then rejected.
        ignore: names of columns, with wildcards, that may stay unread.
        votes: what the counts of votes in a row become.
        mapping: how the columns are named; None: as the format says.
        adapter: the user's own function that makes the row.
    """

    source: str
    prompt_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    attributes: tuple[str, ...] = ()
    attribute_range: tuple[float, float] | None = None
    rank_by: str | None = None
    preference: str = "better"
    step_separator: str | None = None
    critiques: bool = False
    ignore: tuple[str, ...] = ()
    votes: Literal["majority", "soft"] = "majority"
    mapping: SourceConfig | None = None
    adapter: Adapter | None = None


def as_messages(value: Any, key: str) -> tuple[Message, ...]:
    """The value as turns; rejected when it is no list of them, or when a part of one would be lost."""
    turns: list[Message] = []
    for index, turn in enumerate(plain_turns(value, key)):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowRejected(BadRow.WRONG_TYPE, f"{where} is {kind_of(turn)}; the rule is an object with role and content")
        role = as_text(required(turn, "role"), f"{where}.role")
        if not any(turn.get(each) is not None for each in ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")):
            raise RowRejected(BadRow.MISSING_FIELD, f"{where}: field 'content' is {'null' if 'content' in turn else 'missing'}")
        require(broken_by_role(role), where)
        try:
            turns.append(parse_turn(without_metadata(turn), extra="leave"))
        except RuleBrokenError as exc:
            require(exc.broken, where)
        except TypeError as exc:
            raise RowRejected(BadRow.WRONG_TYPE, f"{where}: {exc}") from exc
    return tuple(turns)


def as_prompt(value: Any, key: str) -> tuple[Message, ...]:
    """A text as one user turn, one turn, or the turns themselves."""
    value = _listed(parsed(value))
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {kind_of(value)}; the rule is a text or a list of messages")
    return require_user_last(as_messages(value, key), key)


def _listed(value: Any) -> Any:
    # One turn may stand without a list around it.
    return [value] if isinstance(value, dict) else value


def require_user_last(turns: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    """The turns, if they are a prompt: they end with a user or tool turn, or with one that an assistant has begun."""
    require(broken_by_prompt(turns), repr(key))
    return turns


def as_completion(value: Any, key: str, prompt: tuple[Message, ...]) -> Completion:
    """Text, one assistant message, several turns from an assistant's on, or the whole conversation with the prompt repeated."""
    value = _listed(parsed(value))
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {kind_of(value)}; the rule is a text or a list of messages")
    turns = as_messages(value, key)
    require_answer(turns, key)
    if turns[: len(prompt)] == prompt:
        return branch_of(turns[len(prompt) :], key)
    if turns[0]["role"] != "assistant":
        raise RowRejected(BadRow.NO_SHARED_PROMPT, f"{key!r} holds {len(turns)} turns that do not repeat the prompt")
    return branch_of(turns, key)


def branch_of(turns: tuple[Message, ...], key: str) -> Completion:
    """Turns after a prompt as a completion; rejected when they do not begin and end with an assistant's."""
    require(broken_by_completion(0, tuple(turns)) if len(turns) != 1 else None, repr(key))
    return completion_of(turns)


def require_answer(turns: tuple[Message, ...], key: str) -> None:
    """Reject turns that do not end with an answer."""
    if not turns:
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"{key!r} holds no turn")
    if turns[-1]["role"] != "assistant":
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"the last turn of {key!r} is a {turns[-1]['role']} turn, so there is no completion")


def shared_turns(conversations: Sequence[tuple[Message, ...]], keys: Sequence[str]) -> tuple[tuple[Message, ...], list[Completion]]:
    """What conversations have in common up to where an assistant answers, and how each goes on from there."""
    for turns, key in zip(conversations, keys, strict=True):
        require_answer(turns, key)
    limit = min(len(turns) for turns in conversations) - 1
    common = 0
    while common < limit and all(turns[common] == conversations[0][common] for turns in conversations):
        common += 1
    # Back to where an assistant answers in all of them: the branches begin with its turn.
    while common and not all(turns[common]["role"] == "assistant" for turns in conversations):
        common -= 1
    prompt = conversations[0][:common]
    if not common and all(turns[0]["role"] == "assistant" for turns in conversations):
        require(broken_by_prompt(()), " and ".join(keys))
    if not common or not any(turn["role"] not in ("system", "developer") for turn in prompt):
        raise RowRejected(BadRow.NO_SHARED_PROMPT, f"{' and '.join(keys)} do not begin with the same turns up to an assistant's")
    return require_user_last(prompt, keys[0]), [branch_of(turns[common:], key) for turns, key in zip(conversations, keys, strict=True)]


def with_system(system: Any, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt after the system turn that a column of its own holds; the same turn may stand in both."""
    if system is None or system == "":
        return prompt
    text = as_text(system, "system")
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != text.strip():
            raise RowRejected(BadRow.WRONG_TYPE, "the column 'system' and the prompt's own system turn differ; the rule is one of them")
        return prompt
    return (Message(role="system", content=text), *prompt) if text.strip() else prompt


def build_comparison(
    row: Row,
    options: SourceOptions,
    prompt: tuple[Message, ...],
    completions: Sequence[Completion],
    *,
    ranks: tuple[float, ...] | None,
    margin: float | None = None,
    strength: float | None = None,
    ratings: Sequence[Mapping[str, Any]] | None = None,
    step_labels: tuple[tuple[float, ...], ...] | None = None,
    critiques: Sequence[Any] | None = None,
    vote_shares: tuple[float, ...] | None = None,
) -> Comparison:
    """The comparison, with the columns that every format may carry (`columns.COMMON_COLUMNS`).

    Args:
        ratings: one mapping from attribute to rating per completion; those that `data.attributes` names are kept.
        critiques: one text per completion; kept where `data.critique_lead_in` is set.
        vote_shares: as in `Comparison`; `votes.judgement` makes ranks and shares of the votes that a row counts.
    """
    for key in ("system", "system_prompt"):
        prompt = with_system(row.get(key), prompt)
    numbers = {key: number for key in NUMBER_COLUMNS if (number := optional(row, key)) is not None}
    kept = None
    if ratings is not None and options.attributes:
        kept = tuple(_ratings(given, options, f"completion {index}") for index, given in enumerate(ratings))
    comparison = Comparison(
        id=as_name(row.get("id")),
        source=as_name(row.get("source")) or options.source,
        prompt=prompt,
        completions=tuple(completions),
        ranks=ranks,
        margin=margin,
        strength=strength,
        attributes=kept,
        step_labels=step_labels,
        critiques=_critiques(critiques, len(completions)) if options.critiques else None,
        vote_shares=vote_shares,
        tools=_tools(row.get("tools")),
        chat_template_kwargs=_kwargs(row.get("chat_template_kwargs")),
        **numbers,
    )
    if ranks is None and options.rank_by is not None and len(completions) > 1:
        comparison = ranked_by(comparison, options.attributes.index(options.rank_by), options.rank_by)
    for key, text in (("id", comparison.id), ("source", comparison.source)):
        require(broken_by_text(text), f"field {key!r}")
    return comparison if comparison.id else replace(comparison, id=digest([comparison.content_key(), comparison.judgement_key()]))


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    # Schemas of tools as a list, or as the JSON of one.
    if value is None or value in ("", [], "[]"):
        return None
    found = _decoded(value)
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowRejected(BadRow.WRONG_TYPE, f"field 'tools' is {kind_of(value)}; the rule is a list of tool schemas, or the JSON of one")
    return tuple(found)


def _kwargs(value: Any) -> dict[str, Any] | None:
    found = None if value is None or value in ("", {}, "{}") else _decoded(value)
    if found is not None and not isinstance(found, dict):
        raise RowRejected(BadRow.WRONG_TYPE, f"field 'chat_template_kwargs' is {kind_of(value)}; the rule is an object, or the JSON of one")
    return found


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _ratings(given: Mapping[str, Any], options: SourceOptions, where: str) -> tuple[float, ...]:
    ratings = []
    for name in options.attributes:
        value = given.get(name)
        rating = math.nan if missing(value) else as_rating(value, f"{where}: {name}")
        low, high = options.attribute_range or (-FLOAT32_MAX, FLOAT32_MAX)
        if not (math.isnan(rating) or low <= rating <= high):
            rule = f"the rule (data.attribute_range) is {low:g} to {high:g}" if options.attribute_range else "the rule is a finite number"
            raise RowRejected(BadRow.BAD_RATING, f"{where}: {name} is {rating:g}; {rule}")
        ratings.append(rating)
    return tuple(ratings)


def _critiques(given: Sequence[Any] | None, num_completions: int) -> tuple[str, ...]:
    if given is None or None in given:
        which = "a completion of the row" if given is None else f"completion {list(given).index(None)}"
        raise RowRejected(BadRow.NO_CRITIQUE, f"data.critique_lead_in is set, and {which} has no critique")
    if len(given) != num_completions:
        raise RowRejected(BadRow.NO_CRITIQUE, f"{len(given)} critiques for {num_completions} completions")
    return tuple(as_text(value, f"critique {index}") for index, value in enumerate(given))
