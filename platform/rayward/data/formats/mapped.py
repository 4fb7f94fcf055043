"""A source whose columns are mapped by its settings: what `data.sources[]` says by standard names becomes a comparison.

No Ray and no tokenizer here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from rayward.config.sources import JudgementConfig, word_of
from rayward.contract.conversation import Message
from rayward.data.formats.cells import Cells, find, gather, shown
from rayward.data.formats.columns import COMMON_COLUMNS, present
from rayward.data.formats.fields import (
    Row,
    SourceOptions,
    as_completion,
    as_messages,
    as_prompt,
    build_comparison,
    require_answer,
    shared_turns,
)
from rayward.data.formats.values import as_list, parsed
from rayward.data.record import BadRow, Comparison, RowRejected
from rayward.data.votes import VoteRule, judgement

MAPPED = "mapped"
"""Name of the format of a source whose columns say by standard names what they are."""


def mapped(row: Row, options: SourceOptions) -> Comparison:
    """The comparison that the settings of a source make of a row."""
    source = options.mapping
    assert source is not None
    cells = Cells(row, source)
    values, keys = _answers(cells)
    prompt, texts = _texts(cells, values, keys)
    ranks, strength, shares, scores = _Judge(cells, len(texts), options.votes).judged()
    ratings = _ratings(cells, len(texts), scores)
    given = cells["critiques"]
    critiques = None if given is None else given if isinstance(given, list) and len(texts) > 1 else [given]
    margin, told = cells.number("margin"), cells.number("strength")
    weight = cells.number("weight")
    whole = {name: cells[name] for name in COMMON_COLUMNS} | {"weight": weight}
    if source.system is not None and not present(whole.get("system")) and not (prompt and prompt[0]["role"] == "system"):
        whole["system"] = source.system
    return build_comparison(
        whole,
        options,
        prompt,
        texts,
        ranks=ranks,
        margin=margin,
        strength=strength if told is None else abs(told),
        ratings=ratings,
        critiques=critiques,
        vote_shares=shares,
    )


def _answers(cells: Cells) -> tuple[list[Any], list[str]]:
    """The values of the answers in their order, and what to call them."""
    given = set(cells.source.mapped_names)
    if "best" in given:
        best, losers = (_several(cells.required(name)) for name in ("best", "losers"))
        return [*best, *losers], [*(["best"] * len(best)), *(f"losers[{index}]" for index in range(len(losers)))]
    for pair in (("chosen", "rejected"), ("first", "second")):
        if pair[0] in given:
            return [cells.required(name) for name in pair], [cells.where(name) for name in pair]
    if "completion" in given:
        return [cells.required("completion")], [cells.where("completion")]
    values = as_list(cells.required("completions"), cells.where("completions"))
    if not values:
        raise RowRejected(BadRow.EMPTY_COMPLETION, f"{cells.where('completions')} is an empty list")
    return values, [f"completions[{index}]" for index in range(len(values))]


def _several(value: Any) -> list[Any]:
    # One answer, or a list of answers; a list of turns is one answer.
    turns = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return value if isinstance(value, list) and not turns else [value]


def _texts(cells: Cells, values: Sequence[Any], keys: Sequence[str]) -> tuple[tuple[Message, ...], list[Any]]:
    # One turn may stand without a list around it.
    turned = [[value] if isinstance(value, dict) else parsed(value) for value in values]
    for value, key in zip(turned, keys, strict=True):
        if value is None:
            raise RowRejected(BadRow.MISSING_FIELD, f"{key} is null or missing")
    prompt = _prompt(cells)
    if prompt is not None:
        return prompt, [as_completion(value, key, prompt) for value, key in zip(turned, keys, strict=True)]
    conversations = [as_messages(value, key) for value, key in zip(turned, keys, strict=True) if isinstance(value, list)]
    if not conversations:
        raise RowRejected(
            BadRow.NO_SHARED_PROMPT, "the answers are texts, and there is no prompt; map columns.prompt or set prompt_template"
        )
    if len(conversations) == len(turned):
        shared, found = shared_turns(conversations, keys)
        return shared, list(found)
    # A whole conversation beside answers that are only texts: it brings the prompt.
    index = next(index for index, value in enumerate(turned) if isinstance(value, list))
    require_answer(conversations[0], keys[index])
    prompt = conversations[0][:-1]
    return prompt, [as_completion(value, key, prompt) for value, key in zip(turned, keys, strict=True)]


def _prompt(cells: Cells) -> tuple[Message, ...] | None:
    template = cells.source.prompt_template
    given = cells.template(template) if template is not None else cells["prompt"]
    if isinstance(given, dict):
        given = [given]
    before = tuple(_history(cells))
    if given is None:
        if "prompt" in cells.source.mapped_names:
            raise RowRejected(BadRow.MISSING_FIELD, f"{cells.where('prompt')} is null or missing")
        return before or None
    turns = as_prompt(given, "prompt")
    first = int(bool(before) and turns[0]["role"] == "system")
    return (*turns[:first], *before, *turns[first:])


def _history(cells: Cells) -> Iterator[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    given = cells["history"]
    if not present(given):
        return
    turns = as_list(parsed(given), "history")
    if all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        pairs = [text for turn in turns for text in zip(("user", "assistant"), turn, strict=True)]
        turns = [{"role": role, "content": text} for role, text in pairs]
    yield from as_messages(turns, "history")


def _ratings(cells: Cells, num_completions: int, scores: Sequence[float] | None) -> Sequence[Mapping[str, Any]] | None:
    """One mapping from attribute to rating per completion."""
    ratings = cells.source.ratings
    found: list[dict[str, float | None]] = [{} for _ in range(num_completions)]
    columns: dict[str, Any]
    if isinstance(ratings, str):
        given = find(cells.row, ratings)
        objects = given if isinstance(given, list) else [given]
        names = {name for each in objects if isinstance(each, dict) for name in each}
        columns = {name: [each.get(name) if isinstance(each, dict) else None for each in objects] for name in sorted(names)}
    else:
        columns = {name: gather(cells.row, path) for name, path in ratings.items()}
    for name, value in columns.items():
        each = value if isinstance(value, list) else [value]
        if len(each) != num_completions:
            raise RowRejected(BadRow.BAD_RATING, f"ratings.{name}: {len(each)} values for {num_completions} completions")
        for index, rating in enumerate(each):
            found[index][name] = cells.as_number(rating, f"ratings.{name}")
    for index, score in enumerate(scores or ()):
        found[index].setdefault("label" if num_completions == 1 else "score", score)
    return found if columns or scores is not None else None


class _Judge:
    """The ranking of one row by what the mapping says."""

    def __init__(self, cells: Cells, num_completions: int, rule: VoteRule) -> None:
        self.cells = cells
        self.num = num_completions
        self.rule: VoteRule = rule
        self.settings: JudgementConfig = cells.source.judgement

    def judged(self) -> tuple[tuple[float, ...] | None, float | None, tuple[float, ...] | None, list[float] | None]:
        """Ranks, strength, shares of votes, and scores that may serve as ratings."""
        given = set(self.cells.source.mapped_names)
        if "chosen" in given:
            return (0.0, 1.0), None, None, None
        if "best" in given:
            losers = len(_several(self.cells.required("losers")))
            return (0.0,) * (self.num - losers) + (1.0,) * losers, None, None, None
        if "completion" in given:
            value = self.cells.required("label") if "label" in given else None
            number = None if value is None else self.cells.as_number(value, self.cells.where("label"))
            return None, None, None, None if number is None else [number]
        if "votes" in given:
            ranks, shares = self._votes()
            return ranks, None, shares, None
        if "label" in given:
            return *self._label(), None, None
        if "comparisons" in given:
            return self._comparisons(), None, None, None
        for name in ("ranks", "scores"):
            if name in given:
                return self._numbers(name)
        return None, None, None, None

    def _numbers(self, name: str) -> tuple[tuple[float, ...], float | None, None, list[float] | None]:
        where = self.cells.where(name)
        values = as_list(self.cells.required(name), where)
        if len(values) != self.num:
            raise RowRejected(BadRow.BAD_RANKING, f"{where}: {len(values)} values for {self.num} completions")
        numbers: list[float] = []
        for index, value in enumerate(values):
            number = self.cells.as_number(value, f"{where}[{index}]")
            if number is None:
                raise RowRejected(BadRow.BAD_RANKING, f"{where}: completion {index} has none")
            numbers.append(number)
        low_first = name == "ranks" or self.settings.lower_is_better
        ranks = tuple(number if low_first else -number for number in numbers)
        strength = abs(numbers[0] - numbers[1]) if self.num == 2 and name == "scores" else None
        return ranks, strength, None, numbers if name == "scores" else None

    def side(self, value: Any, where: str) -> int:
        """What a label says: -1 the first is better, 1 the second, 0 a tie."""
        word = None if value is None or isinstance(value, dict | list) else word_of(value)
        if word is not None and word in self.settings.sides:
            return self.settings.sides[word]
        for side, name in ((-1, "first_name"), (1, "second_name")):
            told = self.cells[name] if name in self.cells.source.columns else None
            if word and told is not None and word == word_of(told):
                return side
        rule = "; ".join(
            f"{name} {', '.join(map(repr, words))}"
            for name, words in (("first", self.settings.first), ("second", self.settings.second), ("tie", self.settings.tie))
            if words
        )
        raise RowRejected(BadRow.BAD_RANKING, f"{where} is {shown(value)}; the rule (judgement) is {rule or 'a name of an answer'}")

    def _label(self) -> tuple[tuple[float, ...], float | None]:
        value, where = self.cells["label"], self.cells.where("label")
        if "completions" in self.cells.source.mapped_names:
            return self._best(value, where), None
        if isinstance(self.cells.source.columns["label"], tuple):
            return self._flags(value, where), None
        if self.settings.middle is not None:
            number = self.cells.as_number(value, where)
            if number is None:
                raise RowRejected(BadRow.BAD_RANKING, f"{where} is {shown(value)}; the rule (judgement.middle) is a number")
            gap = number - self.settings.middle
            side = 0 if gap == 0 else -1 if (gap > 0) == (self.settings.above == "first") else 1
            return _ranks_of(side), abs(gap)
        side = self.side(value, where)
        strengths = self.settings.strength_of
        return _ranks_of(side), 0.0 if strengths and side == 0 else strengths.get(word_of(value))

    def _best(self, value: Any, where: str) -> tuple[float, ...]:
        number = self.cells.as_number(value, where)
        place = None if number is None else number - self.settings.counted_from
        if place is None or place not in range(self.num):
            rule = f"the place of one of {self.num} completions, counted from {self.settings.counted_from}"
            raise RowRejected(BadRow.BAD_RANKING, f"{where} is {shown(value)}; the rule is {rule}")
        return tuple(float(index != place) for index in range(self.num))

    def _flags(self, values: Sequence[Any], where: str) -> tuple[float, ...]:
        # One column for each outcome: first, second and, if given, tie.
        flags = [self.cells.as_number(value, where) for value in values]
        if len(flags) not in (2, 3) or any(flag not in (0.0, 1.0) for flag in flags) or sum(flag or 0.0 for flag in flags) != 1.0:
            raise RowRejected(BadRow.BAD_RANKING, f"{where}: the flags are {flags}; the rule is one 1 and else 0, for first, second[, tie]")
        return _ranks_of((-1, 1, 0)[flags.index(1.0)])

    def _votes(self) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        value, where = self.cells.required("votes"), self.cells.where("votes")
        if self.num == 2 and not isinstance(value, list | dict):
            share = self.cells.as_number(value, where)
            if share is None or not 0.0 <= share <= 1.0:
                raise RowRejected(BadRow.BAD_RANKING, f"{where} is {shown(value)}; the rule is labels, counts, or a share from 0 to 1")
            counts = [share, 1.0 - share]
        elif self.num == 2 and (isinstance(value, dict) or self.settings.names_values):
            by_side = dict.fromkeys((-1, 1, 0), 0.0)
            votes = value.items() if isinstance(value, dict) else [(vote, 1.0) for vote in as_list(value, where)]
            for vote, count in votes:
                by_side[self.side(vote, where)] += self.cells.as_number(count, where) or 0.0
            counts = list(by_side.values())
        else:
            given = [self.cells.as_number(each, where) for each in as_list(value, where)]
            if len(given) not in (self.num, self.num + (self.num == 2)) or None in given:
                raise RowRejected(BadRow.BAD_RANKING, f"{where}: {len(given)} counts for {self.num} completions, or one is missing")
            counts = [count or 0.0 for count in given]
        found = judgement(counts[: self.num], self.rule, equal=sum(counts[self.num :]))
        return found.ranks, found.vote_shares

    def _comparisons(self) -> tuple[float, ...]:
        where = self.cells.where("comparisons")
        values = as_list(self.cells.required("comparisons"), where)
        pairs = [(a - 1, b - 1) for a, b in self.settings.pairs] or list(combinations(range(self.num), 2))
        if len(values) != len(pairs) or any(max(pair) >= self.num for pair in pairs):
            raise RowRejected(BadRow.BAD_RANKING, f"{where}: {len(values)} comparisons of {len(pairs)} pairs of {self.num} completions")
        sides = [self.side(value, f"{where}[{index}]") for index, value in enumerate(values)]
        wins, games = [0.0] * self.num, [0] * self.num
        for (a, b), side in zip(pairs, sides, strict=True):
            wins[a], wins[b] = wins[a] + (1 - side) / 2, wins[b] + (1 + side) / 2
            games[a], games[b] = games[a] + 1, games[b] + 1
        if 0 in games:
            raise RowRejected(BadRow.BAD_RANKING, f"{where}: completion {games.index(0) + 1} stands in no comparison")
        ranks = tuple(-win / game for win, game in zip(wins, games, strict=True))
        for (a, b), side in zip(pairs, sides, strict=True):
            found = (ranks[a] > ranks[b]) - (ranks[a] < ranks[b])
            if found != side and self.settings.contradictions == "quarantine":
                raise RowRejected(
                    BadRow.BAD_RANKING,
                    f"{where}: no order of the completions agrees with all comparisons, for example {a + 1} and {b + 1} "
                    "(judgement.contradictions=wins orders by wins)",
                )
        return ranks


def _ranks_of(side: int) -> tuple[float, ...]:
    return (float(side > 0), float(side < 0))
