"""Public preference formats: one adapter per format turns a row into a `Comparison`; detection picks the format.

Every adapter honours the optional columns `id` (text or integer), `source` (text) and `weight` (number >= 0). A row that
does not fit raises `RowRejected` and is quarantined; only a file whose format cannot be decided is an error.
No Ray and no tokenizer here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayward.config import DataConfig
from rayward.data.comparison import ROLES, BadRow, Comparison, Message, RowRejected, check_text, digest
from rayward.errors import DataFormatError

Row = Mapping[str, Any]
_TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_FLOAT32_MAX = 3.4028234663852886e38
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What an adapter needs to know besides the row.

    Attributes:
        source: value of `Comparison.source` for rows without a `source` column.
        prompt_key: column of the prompt, for `trl` and `openrlhf`; None means that the prompt stands inside both texts.
        chosen_key, rejected_key: columns of the better and the worse completion, for `trl` and `openrlhf`.
    """

    source: str
    prompt_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"


@dataclass(frozen=True, slots=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        columns: the columns, in words, for error messages.
        fits: whether a row looks like this format.
        adapt: row to comparison; raises `RowRejected`.
    """

    columns: str
    fits: Callable[[Row, SourceOptions], bool]
    adapt: Callable[[Row, SourceOptions], Comparison]


# ---- fields -----------------------------------------------------------------------------------------------------


def _field(row: Row, key: str) -> Any:
    value = row.get(key)
    if value is None:
        raise RowRejected(BadRow.MISSING_FIELD, f"field {key!r} is {'null' if key in row else 'missing'}")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_kind(value)}; the rule is a text")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_kind(value)}; the rule is a number")
    try:
        number = float(value)
    except OverflowError as exc:
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is an integer too large for a float") from exc
    # The shards hold fp32: what does not fit is infinite there, and must be refused as such here.
    return number if math.isnan(number) or abs(number) <= _FLOAT32_MAX else math.copysign(math.inf, number)


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_kind(value)}; the rule is a list")
    return value


def _kind(value: Any) -> str:
    names = {"str": "a text", "list": "a list", "dict": "an object", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    for index, turn in enumerate(_list(value, key)):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowRejected(BadRow.WRONG_TYPE, f"{where} is {_kind(turn)}; the rule is an object with role and content")
        role, content = _text(_field(turn, "role"), f"{where}.role"), _text(_field(turn, "content"), f"{where}.content")
        if role not in ROLES:
            raise RowRejected(BadRow.UNKNOWN_ROLE, f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _prompt(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_kind(value)}; the rule is a text or a list of messages")
    return _asks(_messages(value, key), key)


def _asks(turns: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    # A completion is an answer: templates print two assistant turns in a row in ways nobody trained on.
    if turns and turns[-1]["role"] == "assistant":
        raise RowRejected(BadRow.WRONG_TYPE, f"the prompt in {key!r} ends with an assistant turn; the rule is a user or tool turn")
    return turns


def _completion(value: Any, key: str, prompt: tuple[Message, ...]) -> str:
    """Text, one assistant message, or the whole conversation with the prompt repeated."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowRejected(BadRow.WRONG_TYPE, f"field {key!r} is {_kind(value)}; the rule is a text or a list of messages")
    turns = _messages(value, key)
    before, text = _split_last(turns, key)
    if before and before != prompt:
        raise RowRejected(BadRow.NO_SHARED_PROMPT, f"{key!r} holds {len(turns)} turns that do not repeat the prompt")
    return text


def _split_last(turns: tuple[Message, ...], key: str) -> tuple[tuple[Message, ...], str]:
    if not turns:
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"{key!r} holds no turn")
    if turns[-1]["role"] != "assistant":
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"the last turn of {key!r} is a {turns[-1]['role']} turn, so there is no completion")
    return turns[:-1], turns[-1]["content"]


def _optional(row: Row, key: str) -> float | None:
    return None if row.get(key) is None else _number(row[key], key)


def _finish(
    row: Row,
    options: SourceOptions,
    prompt: tuple[Message, ...],
    completions: Sequence[str],
    *,
    ranks: tuple[float, ...] | None,
    margin: float | None = None,
    attributes: tuple[tuple[float, ...], ...] | None = None,
) -> Comparison:
    weight = _optional(row, "weight")
    name, source = row.get("id"), row.get("source")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    comparison = Comparison(
        id="" if name is None else _text(name, "id"),
        source=options.source if source is None else _text(source, "source"),
        prompt=prompt,
        completions=tuple(completions),
        ranks=ranks,
        margin=margin,
        weight=1.0 if weight is None else weight,
        attributes=attributes,
    )
    check_text(comparison.id)
    check_text(comparison.source)
    return comparison if comparison.id else replace(comparison, id=digest([comparison.content_key(), comparison.judgement_key()]))


# ---- adapters ---------------------------------------------------------------------------------------------------


def _pair(row: Row, options: SourceOptions) -> Comparison:
    """TRL and OpenRLHF: chosen and rejected, texts or messages, prompt in its own column or inside both."""
    chosen, rejected = _field(row, options.chosen_key), _field(row, options.rejected_key)
    if options.prompt_key is not None:
        prompt = _prompt(_field(row, options.prompt_key), options.prompt_key)
        texts = [_completion(chosen, options.chosen_key, prompt), _completion(rejected, options.rejected_key, prompt)]
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, texts = _split_common_text(chosen, rejected)
    else:
        prompt, texts = _split_common_turns(
            _messages(chosen, options.chosen_key), _messages(rejected, options.rejected_key), options.chosen_key, options.rejected_key
        )
    return _finish(row, options, prompt, texts, ranks=(0.0, 1.0), margin=_optional(row, "margin"))


def _split_common_text(chosen: str, rejected: str) -> tuple[tuple[Message, ...], list[str]]:
    if chosen == rejected:
        raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, "chosen and rejected are the same text")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    # Back to the last white space: otherwise `cat` and `car` would leave the completions `t` and `r`.
    while common and not chosen[common - 1].isspace():
        common -= 1
    prompt = chosen[:common].strip()
    if not prompt:
        raise RowRejected(BadRow.NO_SHARED_PROMPT, "chosen and rejected do not begin with the same words")
    return (Message(role="user", content=prompt),), [chosen[common:].strip(), rejected[common:].strip()]


def _split_common_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], chosen_key: str, rejected_key: str
) -> tuple[tuple[Message, ...], list[str]]:
    prompt, better = _split_last(chosen, chosen_key)
    other, worse = _split_last(rejected, rejected_key)
    if prompt != other:
        raise RowRejected(BadRow.NO_SHARED_PROMPT, "the turns before the last answer differ between chosen and rejected")
    return _asks(prompt, chosen_key), [better, worse]


def _transcript(value: Any, key: str) -> tuple[Message, ...]:
    parts = _TRANSCRIPT.split(_text(value, key))
    if len(parts) < 3 or parts[0].strip():
        raise RowRejected(BadRow.UNPARSABLE, f"{key!r} does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        Message(role=_TRANSCRIPT_ROLES[speaker], content=text.strip()) for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    )


def _hh_rlhf(row: Row, options: SourceOptions) -> Comparison:
    """Anthropic hh-rlhf: two transcripts; all turns but the last answer are the prompt."""
    chosen, rejected = _transcript(_field(row, "chosen"), "chosen"), _transcript(_field(row, "rejected"), "rejected")
    prompt, texts = _split_common_turns(chosen, rejected, "chosen", "rejected")
    return _finish(row, options, prompt, texts, ranks=(0.0, 1.0), margin=_optional(row, "margin"))


def _ultrafeedback(row: Row, options: SourceOptions) -> Comparison:
    """UltraFeedback binarized: the margin is the score gap; equal scores are a tie, a negative gap is an error of the row."""
    chosen, rejected = _messages(_field(row, "chosen"), "chosen"), _messages(_field(row, "rejected"), "rejected")
    _text(_field(row, "prompt"), "prompt")
    prompt, texts = _split_common_turns(chosen, rejected, "chosen", "rejected")
    scores = _optional(row, "score_chosen"), _optional(row, "score_rejected")
    if scores[0] is None or scores[1] is None:
        return _finish(row, options, prompt, texts, ranks=(0.0, 1.0))
    gap = scores[0] - scores[1]
    if gap < 0:
        raise RowRejected(BadRow.BAD_RANKING, f"score_chosen {scores[0]} is below score_rejected {scores[1]}")
    return _finish(row, options, prompt, texts, ranks=(0.0, float(gap != 0)), margin=gap)


def _helpsteer(prompt_key: str, first_key: str, second_key: str, strength_key: str) -> Callable[[Row, SourceOptions], Comparison]:
    """HelpSteer2 and 3 preference: a signed strength, below 0 the first is better, 0 a tie; the margin is its size."""

    def adapt(row: Row, options: SourceOptions) -> Comparison:
        prompt = _prompt(_field(row, prompt_key), prompt_key)
        texts = [_completion(_field(row, key), key, prompt) for key in (first_key, second_key)]
        strength = _number(_field(row, strength_key), strength_key)
        ranks = (float(strength > 0), float(strength < 0))
        return _finish(row, options, prompt, texts, ranks=ranks, margin=abs(strength))

    return adapt


def _ranking(row: Row, options: SourceOptions) -> Comparison:
    """K completions of one prompt; `ranks` (lower is better) or `attributes` (K rows of ratings, null = missing) or both."""
    prompt = _prompt(_field(row, "prompt"), "prompt")
    texts = [_completion(value, f"completions[{i}]", prompt) for i, value in enumerate(_list(_field(row, "completions"), "completions"))]
    if not texts:
        raise RowRejected(BadRow.EMPTY_COMPLETION, "completions is an empty list")
    ranks = attributes = None
    if row.get("ranks") is not None:
        ranks = tuple(_number(value, f"ranks[{i}]") for i, value in enumerate(_list(row["ranks"], "ranks")))
        if len(ranks) != len(texts):
            raise RowRejected(BadRow.BAD_RANKING, f"{len(ranks)} ranks for {len(texts)} completions")
    if row.get("attributes") is not None:
        attributes = tuple(_ratings(value, f"attributes[{i}]") for i, value in enumerate(_list(row["attributes"], "attributes")))
        if len(attributes) != len(texts) or len({len(ratings) for ratings in attributes}) != 1:
            raise RowRejected(BadRow.BAD_RANKING, "attributes must have one row per completion, all of the same length")
    return _finish(row, options, prompt, texts, ranks=ranks, margin=_optional(row, "margin"), attributes=attributes)


def _ratings(value: Any, key: str) -> tuple[float, ...]:
    ratings = tuple(math.nan if v is None else _number(v, f"{key}[{i}]") for i, v in enumerate(_list(value, key)))
    if any(math.isinf(rating) for rating in ratings):
        raise RowRejected(BadRow.WRONG_TYPE, f"{key} holds an infinite rating")
    return ratings


# ---- detection --------------------------------------------------------------------------------------------------


def _fits_trl(row: Row, options: SourceOptions) -> bool:
    if (options.chosen_key, options.rejected_key) != ("chosen", "rejected") or options.prompt_key not in (None, "prompt"):
        return False
    kinds = {type(row.get(key)) for key in ("chosen", "rejected")}
    if len(kinds) != 1 or not kinds <= {str, list} or _fits_hh_rlhf(row, options):
        return False
    return row.get("prompt") is None or type(row["prompt"]) in kinds


def _fits_openrlhf(row: Row, options: SourceOptions) -> bool:
    keys = (options.chosen_key, options.rejected_key, *([options.prompt_key] if options.prompt_key else []))
    named = options.prompt_key is not None or keys != ("chosen", "rejected")
    return named and all(isinstance(row.get(key), str | list) for key in keys) and not _fits_trl(row, options)


def _fits_hh_rlhf(row: Row, options: SourceOptions) -> bool:
    texts = [row.get(key) for key in ("chosen", "rejected")]
    return "prompt" not in row and all(isinstance(text, str) and _TRANSCRIPT.match(text) for text in texts)


def _fits_ultrafeedback(row: Row, options: SourceOptions) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)


def _has(*keys: str) -> Callable[[Row, SourceOptions], bool]:
    return lambda row, options: all(key in row for key in keys)


FORMATS: dict[str, Format] = {
    "trl": Format("chosen, rejected[, prompt][, margin]: texts, or lists of messages", _fits_trl, _pair),
    "openrlhf": Format("data.chosen_key, data.rejected_key[, data.prompt_key][, margin]", _fits_openrlhf, _pair),
    "hh_rlhf": Format("chosen, rejected: transcripts 'Human: … Assistant: …'", _fits_hh_rlhf, _hh_rlhf),
    "ultrafeedback_binarized": Format(
        "prompt (text), chosen, rejected (messages)[, score_chosen, score_rejected]", _fits_ultrafeedback, _ultrafeedback
    ),
    "helpsteer2_preference": Format(
        "prompt, response_1, response_2, preference_strength",
        _has("response_1", "response_2", "preference_strength"),
        _helpsteer("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3_preference": Format(
        "context, response1, response2, overall_preference",
        _has("response1", "response2", "overall_preference"),
        _helpsteer("context", "response1", "response2", "overall_preference"),
    ),
    "ranking": Format(
        "prompt, completions, ranks[, attributes]",
        lambda row, options: isinstance(row.get("completions"), list) and ("ranks" in row or "attributes" in row),
        _ranking,
    ),
}
"""Name of the format (`data.format`) to its detection and adapter."""


def choose_format(rows: Sequence[Row], config: DataConfig, *, where: str, source: str) -> tuple[str, SourceOptions]:
    """Decide the format of one file from its first rows, and whether the prompt has a column of its own.

    Args:
        rows: the first parsable rows of the file; at least one.
        config: `format` other than `auto` is taken as given.
        where: the file, for messages.
        source: default value of `Comparison.source`.

    Raises:
        DataFormatError: no format fits, or more than one fits equally well.
    """
    options = SourceOptions(source, config.prompt_key, config.chosen_key, config.rejected_key)
    name: str = config.format
    if name == "auto":
        votes = {key: sum(entry.fits(row, options) for row in rows) for key, entry in FORMATS.items()}
        most = max(votes.values())
        # A few odd rows do not decide: a second format that fits half as many rows still makes the file ambiguous.
        candidates = [key for key, count in votes.items() if 2 * count >= most] if most else []
        if len(candidates) != 1:
            raise _undecided(rows, candidates, where)
        name = candidates[0]
    # For the whole file: a row that lost its prompt must not be read as one whose prompt is implied.
    if name == "trl" and options.prompt_key is None and any("prompt" in row for row in rows):
        options = replace(options, prompt_key="prompt")
    return name, options


def _undecided(rows: Sequence[Row], candidates: list[str], where: str) -> DataFormatError:
    columns = ", ".join(sorted({str(key) for row in rows for key in row}))[:500]
    columns = columns.encode("utf-8", "backslashreplace").decode()
    listed = "\n    ".join(f"{key}: {FORMATS[key].columns}" for key in (candidates or FORMATS))
    problem = f"fits {len(candidates)} formats" if candidates else "fits no known format"
    return DataFormatError(
        f"{where} {problem}; its columns are: {columns}\n  candidates:\n    {listed}",
        remedy="choose one with data.format=<name>; set data.prompt_key, data.chosen_key and data.rejected_key for other column names",
    )
