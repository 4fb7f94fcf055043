"""The record that everything is made of: one prompt, K >= 1 completions, and what is known about them.

`Comparison` is the text form that adapters produce and `prepare` validates. `PREPARED_SCHEMA` is its tokenized form
in the Parquet shards. Ranks follow one convention everywhere: lower is better, equal ranks are ties.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from itertools import combinations
from typing import Any, Literal, TypeVar

from rayward.contract.conversation import (
    BrokenRule,
    Completion,
    Message,
    RuleCode,
    TemplateInputs,
    broken_by_completion,
    broken_by_prompt,
    broken_by_text,
    strings_in,
)
from rayward.schema import digest


class BadRow(StrEnum):
    """Why a row was quarantined. The values are stable: reports and tests count by them."""

    UNPARSABLE = "unparsable"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_COMPLETION = "empty_completion"
    IDENTICAL_COMPLETIONS = "identical_completions"
    NO_SHARED_PROMPT = "no_shared_prompt"
    TIE = "tie"
    NON_FINITE_MARGIN = "non_finite_margin"
    OUTLIER = "outlier"
    UNKNOWN_ROLE = "unknown_role"
    BAD_RANKING = "bad_ranking"
    BAD_RATING = "bad_rating"
    NO_RATING = "no_rating"
    BAD_STEPS = "bad_steps"
    NO_CRITIQUE = "no_critique"
    BAD_TEXT = "bad_text"
    TOO_LONG = "too_long"
    TEMPLATE_REJECTED = "template_rejected"
    UNSUPPORTED_MESSAGE = "unsupported_message"
    ALREADY_TEMPLATED = "already_templated"
    CHANGED_BY_TEMPLATE = "changed_by_template"
    DUPLICATE = "duplicate"
    CONTRADICTION = "contradiction"
    IN_VALIDATION = "in_validation"
    CONTAMINATED = "contaminated"
    UNUSED_COLUMN = "unused_column"
    ADAPTER_REJECTED = "adapter_rejected"
    ADAPTER_FAILED = "adapter_failed"


LARGEST_NUMBER = 1e9
"""Of a margin, a strength, a weight or a rating without a range: more teaches nothing, and products of them must stay finite in fp32."""


class RowRejected(Exception):  # noqa: N818 - control flow inside prepare, never shown to a user as an error
    """Raised by adapters and `validate`; `prepare` turns it into a quarantined row."""

    def __init__(self, reason: BadRow, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


_REASONS: Mapping[RuleCode, BadRow] = {
    "unknown_role": BadRow.UNKNOWN_ROLE,
    "nul_byte": BadRow.BAD_TEXT,
    "lone_surrogate": BadRow.BAD_TEXT,
    "empty_prompt": BadRow.EMPTY_PROMPT,
    "prompt_end": BadRow.WRONG_TYPE,
    "empty_completion": BadRow.EMPTY_COMPLETION,
    "completion_turns": BadRow.WRONG_TYPE,
    "unsupported_message": BadRow.UNSUPPORTED_MESSAGE,
}


def require(broken: BrokenRule | None, where: str = "") -> None:
    """Reject the row for a rule of conversations that it breaks, if any.

    Raises:
        RowRejected: with the reason that belongs to the rule.
    """
    if broken is not None:
        raise RowRejected(_REASONS[broken.code], f"{where}: {broken.detail}" if where else broken.detail)


def _column(default: float | None) -> Any:
    """A field that a row of any format may carry: the number in its column of that name."""
    return field(default=default, metadata={"column": True})


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt and its judged completions, as text.

    Attributes:
        id: stable within a data set; a content hash when the source has none.
        source: where the row came from (file or data set name), kept for per-source metrics.
        prompt: the shared turns, ending with a user (or tool) turn; never empty.
        completions: K final assistant turns, or turns that begin and end with one.
        ranks: K numbers, lower is better, equal numbers tie; None when only attributes are known.
        margin: gap that the data asks of a pair (Llama 2, arXiv 2307.09288 section 3.2.2), else None.
        strength: how strong the preference of a pair is, in the source's own scale (HelpSteer: 1 slightly .. 3 much better), else None.
        weight: weight of the comparison in the loss.
        attributes: K rows of ratings in the order of `data.attributes` (NaN = missing), else None.
        step_labels: for each completion one label per step, the probability that it is right (NaN = missing), else None.
        critiques: K texts that judge the completions in words, else None.
        vote_shares: of several judges, for each pair of completions (0, 1), (0, 2), …, (1, 2), … the share that finds its first one
            better (a judge who finds them equal counts half for each), else None: the ranking is all that is known.
        tools, chat_template_kwargs: what the chat template is given besides turns, else None.
    """

    id: str
    source: str
    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    ranks: tuple[float, ...] | None = None
    margin: float | None = None
    strength: float | None = None
    weight: float = _column(1.0)
    attributes: tuple[tuple[float, ...], ...] | None = None
    step_labels: tuple[tuple[float, ...], ...] | None = None
    critiques: tuple[str, ...] | None = None
    vote_shares: tuple[float, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def inputs(self) -> TemplateInputs:
        """What the chat template is given besides turns."""
        return TemplateInputs.of(self.tools, self.chat_template_kwargs)

    def prompt_key(self) -> str:
        """Hash of the prompt alone: rows with one key never fall on both sides of a split."""
        turns = [[m["role"], m["content"]] if len(m) == 2 else m for m in self.prompt]
        return digest([turns, self.tools, self.chat_template_kwargs] if self.tools or self.chat_template_kwargs else turns)

    def content_key(self) -> str:
        """Hash of prompt and the set of completions, in whatever order: equal keys are duplicates or contradictions."""
        return digest([self.prompt_key(), sorted(map(completion_key, self.completions))])

    def judgement_key(self) -> str:
        """Hash of the judgement with completions in canonical order: tells a duplicate from a contradiction."""
        order = sorted(range(len(self.completions)), key=lambda i: completion_key(self.completions[i]))
        ranks = None if self.ranks is None else dense_ranks([self.ranks[i] for i in order])
        attributes = None if self.attributes is None else [[str(v) for v in self.attributes[i]] for i in order]
        known: list[Any] = [ranks, attributes]
        if self.step_labels is not None:
            known.append([[str(v) for v in self.step_labels[i]] for i in order])
        if self.vote_shares is not None:
            known.append([f"{share:.6f}" for share in pairwise_in_order(self.vote_shares, order)])
        return digest(known)


def completion_key(completion: Completion) -> str:
    """A completion as one text, the same for equal ones only."""
    return completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True)


NUMBER_COLUMNS = tuple(each.name for each in fields(Comparison) if each.metadata.get("column"))
"""Fields that every format reads from the column of their name."""


def dense_ranks(ranks: Sequence[float]) -> list[int]:
    """Ranks renumbered 0, 1, 2, … without gaps; ties keep a common number."""
    levels = {value: index for index, value in enumerate(sorted(set(ranks)))}
    return [levels[value] for value in ranks]


def pairwise_in_order(shares: Sequence[float], order: Sequence[int]) -> list[float]:
    """`vote_shares` of the completions in another order: of the new pair (i, j), the share for completion `order[i]`."""
    pairs = list(combinations(range(len(order)), 2))
    of = dict(zip(pairs, shares, strict=True))
    return [of[order[i], order[j]] if order[i] < order[j] else 1.0 - of[order[j], order[i]] for i, j in pairs]


def ranked_by(comparison: Comparison, column: int, name: str) -> Comparison:
    """The comparison with its completions ranked by one attribute, the highest rating first.

    Raises:
        RowRejected: a completion has no such rating, or there is nothing to rank.
    """
    if len(comparison.completions) < 2:
        raise RowRejected(BadRow.BAD_RANKING, f"one completion alone cannot be ranked by {name!r} (data.rank_by)")
    if comparison.attributes is None:
        raise RowRejected(BadRow.NO_RATING, f"the row has no ratings, and data.rank_by is {name!r}")
    ratings = [row[column] for row in comparison.attributes]
    if any(math.isnan(rating) for rating in ratings):
        raise RowRejected(BadRow.BAD_RANKING, f"a completion has no rating {name!r}, by which data.rank_by ranks")
    gap = abs(ratings[0] - ratings[1]) if len(ratings) == 2 else comparison.strength
    return replace(comparison, ranks=tuple(-rating for rating in ratings), strength=gap)


def validate(comparison: Comparison, *, ties: Literal["quarantine", "keep"]) -> None:
    """Check one record against the rules that need no tokenizer.

    Raises:
        RowRejected: with the first rule that the record breaks.
    """
    require(broken_by_prompt(comparison.prompt))
    _require_characters(comparison)
    for index, completion in enumerate(comparison.completions):
        require(broken_by_completion(index, completion))
    first: dict[str, int] = {}
    for index, key in enumerate(map(completion_key, comparison.completions)):
        if (same := first.setdefault(key, index)) != index:
            raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, f"completions {same} and {index} are the same text")
    _validate_judgement(comparison, ties=ties)


def _require_characters(comparison: Comparison) -> None:
    parts = {
        **{f"turn {number} of the prompt": turn for number, turn in enumerate(comparison.prompt)},
        **{f"completion {index}": completion for index, completion in enumerate(comparison.completions)},
        **{f"the critique of completion {index}": text for index, text in enumerate(comparison.critiques or ())},
        "tools": comparison.tools,
        "chat_template_kwargs": comparison.chat_template_kwargs,
    }
    for where, part in parts.items():
        for text in strings_in(part):
            require(broken_by_text(text), where)


def _validate_judgement(comparison: Comparison, *, ties: Literal["quarantine", "keep"]) -> None:
    num_completions = len(comparison.completions)
    if comparison.margin is not None and not math.isfinite(comparison.margin):
        raise RowRejected(BadRow.NON_FINITE_MARGIN, f"margin is {comparison.margin}; the rule is a finite number")
    if not (math.isfinite(comparison.weight) and comparison.weight >= 0):
        raise RowRejected(BadRow.WRONG_TYPE, f"weight is {comparison.weight}; the rule is a finite number of 0 or more")
    for name in NUMBER_COLUMNS:
        if (number := getattr(comparison, name)) is not None and not math.isfinite(number):
            raise RowRejected(BadRow.WRONG_TYPE, f"{name} is {number}; the rule is a finite number")
    if comparison.strength is not None and not 0 <= comparison.strength < math.inf:
        raise RowRejected(BadRow.NON_FINITE_MARGIN, f"strength is {comparison.strength}; the rule is a finite number of 0 or more")
    _require_moderate(comparison)
    for index, critique in enumerate(comparison.critiques or ()):
        if not critique.strip():
            raise RowRejected(BadRow.NO_CRITIQUE, f"the critique of completion {index} is empty")
    for index, labels in enumerate(comparison.step_labels or ()):
        for number, label in enumerate(labels):
            if not (math.isnan(label) or 0.0 <= label <= 1.0):
                where = f"completion {index}: the label of step {number}"
                raise RowRejected(BadRow.BAD_STEPS, f"{where} is {label:g}; the rule is 0 to 1, or null")
    ranks = comparison.ranks
    if ranks is None:
        if comparison.attributes is None and (comparison.step_labels or comparison.critiques):
            return
        if comparison.attributes is None:
            raise RowRejected(
                BadRow.MISSING_FIELD, "neither a ranking nor attribute ratings are given (data.attributes names the ratings to keep)"
            )
        if all(math.isnan(rating) for ratings in comparison.attributes for rating in ratings):
            raise RowRejected(BadRow.NO_RATING, "there is no ranking, and every rating of data.attributes is missing")
        return
    if len(ranks) != num_completions:
        raise RowRejected(BadRow.BAD_RANKING, f"{len(ranks)} ranks for {num_completions} completions; the rule is one each")
    for index, rank in enumerate(ranks):
        if not math.isfinite(rank):
            raise RowRejected(BadRow.BAD_RANKING, f"the rank of completion {index} is {rank}; the rule is a finite number")
    if num_completions < 2:
        raise RowRejected(BadRow.BAD_RANKING, f"a ranking of {num_completions} completion; the rule is two or more")
    if comparison.vote_shares is not None:
        _validate_shares(comparison.vote_shares, ranks)
    if len(set(ranks)) == 1 and ties == "quarantine":
        raise RowRejected(BadRow.TIE, "all completions are ranked equal and data.ties is 'quarantine'")


def _require_moderate(comparison: Comparison) -> None:
    # What lies far from the others of its column is only known when all rows are.
    numbers = {name: getattr(comparison, name) for name in dict.fromkeys(("margin", "strength", *NUMBER_COLUMNS))}
    numbers |= {
        f"rating {column} of completion {index}": rating
        for index, ratings in enumerate(comparison.attributes or ())
        for column, rating in enumerate(ratings)
    }
    for name, number in numbers.items():
        if number is not None and abs(number) > LARGEST_NUMBER:
            raise RowRejected(BadRow.OUTLIER, f"{name} {number:g} is beyond {LARGEST_NUMBER:g}, the largest number that a row may bring")


def _validate_shares(shares: Sequence[float], ranks: Sequence[float]) -> None:
    num_pairs = len(ranks) * (len(ranks) - 1) // 2
    if len(shares) != num_pairs:
        raise RowRejected(BadRow.BAD_RANKING, f"{len(shares)} shares of votes for {num_pairs} pairs of completions")
    if any(not 0.0 <= share <= 1.0 for share in shares):
        raise RowRejected(BadRow.BAD_RANKING, f"the shares of votes are {', '.join(f'{s:g}' for s in shares)}; the rule is 0 to 1")
    # Of more than two, the ranking is that of the means, and a single pair may well have gone the other way.
    if num_pairs == 1 and (shares[0] > 0.5, shares[0] < 0.5) != (ranks[0] < ranks[1], ranks[0] > ranks[1]):
        raise RowRejected(
            BadRow.BAD_RANKING, f"{shares[0]:g} of the votes are for the first completion, and the ranks are {ranks[0]:g} and {ranks[1]:g}"
        )


Value = TypeVar("Value")


def dump_record(comparison: Comparison) -> str:
    """The comparison as JSON, for the way between two steps."""
    return json.dumps([getattr(comparison, each.name) for each in fields(Comparison)])


def load_record(text: str) -> Comparison:
    """Inverse of `dump_record`."""
    return Comparison(*(_frozen(value) for value in json.loads(text)))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def joined(comparisons: Sequence[Comparison]) -> Comparison:
    """Unranked comparisons of one prompt as one: all completions and what is known of them, the first one's id and source, the mean weight.

    What only some of them have is missing in the whole.
    """
    first = comparisons[0]
    if len(comparisons) == 1:
        return first
    return replace(
        first,
        completions=tuple(text for c in comparisons for text in c.completions),
        attributes=_all([c.attributes for c in comparisons]),
        step_labels=_all([c.step_labels for c in comparisons]),
        critiques=_all([c.critiques for c in comparisons]),
        weight=sum(c.weight for c in comparisons) / len(comparisons),
    )


def _all(parts: Sequence[tuple[Value, ...] | None]) -> tuple[Value, ...] | None:
    return None if None in parts else tuple(value for part in parts for value in part or ())
