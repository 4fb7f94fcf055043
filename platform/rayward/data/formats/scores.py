"""Pairs whose two completions carry scores, under the names that public data gives them: the order, ties and strength of the pair."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rayward.data.formats.columns import ignored
from rayward.data.formats.fields import SourceOptions
from rayward.data.formats.values import Row, as_number, missing, optional
from rayward.data.record import BadRow, RowRejected

_WORDS = ("score", "rating", "avg_rating", "reward")


@lru_cache(maxsize=256)
def score_columns(chosen_key: str, rejected_key: str) -> tuple[tuple[str, str], ...]:
    """The pairs of columns that may hold the scores of the two completions: `score_chosen`, `chosen_score`, `chosen-rating` and so on."""
    named = [(f"{word}_{chosen_key}", f"{word}_{rejected_key}") for word in _WORDS]
    named += [(f"{chosen_key}{mark}{word}", f"{rejected_key}{mark}{word}") for word in _WORDS for mark in "_-"]
    return tuple(named)


@lru_cache(maxsize=256)
def _pairs(chosen_key: str, rejected_key: str) -> tuple[tuple[str, str], ...]:
    own = score_columns(chosen_key, rejected_key)
    return own if chosen_key == "chosen" else own + score_columns("chosen", "rejected")


@lru_cache(maxsize=256)
def _names(chosen_key: str, rejected_key: str) -> frozenset[str]:
    return frozenset(name for pair in _pairs(chosen_key, rejected_key) for name in pair)


SCORE_COLUMNS = frozenset(name for names in score_columns("chosen", "rejected") for name in names)
"""All the names, for completions called chosen and rejected."""


def judged(row: Row, options: SourceOptions, chosen_key: str = "chosen", rejected_key: str = "rejected") -> dict[str, Any]:
    """Ranks, strength and margin of a pair: by its scores where it has them (equal is a tie), else the first is better.

    The strength is the column `strength`, else the gap of the scores.

    Raises:
        RowRejected: the chosen one has the lower score, one column of a pair is not there, or two pairs of columns hold scores.
    """
    strength, margin = optional(row, "strength"), optional(row, "margin")
    gap = _gap(row, options, chosen_key, rejected_key)
    if gap is None:
        return {"ranks": (0.0, 1.0), "strength": strength, "margin": margin}
    return {"ranks": (0.0, float(gap != 0)), "strength": gap if strength is None else strength, "margin": margin}


def _gap(row: Row, options: SourceOptions, chosen_key: str, rejected_key: str) -> float | None:
    if "generations" not in row and _names(chosen_key, rejected_key).isdisjoint(row):
        return None
    kept = [(a, b) for a, b in _pairs(chosen_key, rejected_key) if not (ignored(a, options.ignore) or ignored(b, options.ignore))]
    found = [(a, b) for a, b in kept if not missing(row.get(a)) and not missing(row.get(b))]
    if len(found) > 1:
        told = " and ".join(f"{a}, {b}" for a, b in found)
        raise RowRejected(BadRow.BAD_RANKING, f"two pairs of columns hold scores: {told}; list one of them in data.ignore")
    if found:
        a, b = found[0]
        return _difference(row[a], row[b], a, b)
    gap = _gap_of_generations(row, chosen_key, rejected_key)
    for a, b in kept:
        if gap is None and (a in row) != (b in row) and not missing(row.get(a, row.get(b))):
            given, absent = (a, b) if a in row else (b, a)
            raise RowRejected(BadRow.BAD_RANKING, f"{given} is given and {absent} is not; add it, or list {given} in data.ignore")
    return gap


def _gap_of_generations(row: Row, chosen_key: str, rejected_key: str) -> float | None:
    # distilabel keeps the judge's ratings beside the generations in the order that the judge saw them.
    generations, ratings = row.get("generations"), row.get("ratings", row.get("rating"))
    if not (isinstance(generations, list) and isinstance(ratings, list) and len(generations) == len(ratings)):
        return None
    if not (row.get(chosen_key) in generations and row.get(rejected_key) in generations):
        return None
    better, worse = (ratings[generations.index(row[key])] for key in (chosen_key, rejected_key))
    if missing(better) or missing(worse):
        return None
    return _difference(better, worse, f"the rating of {chosen_key}", f"the rating of {rejected_key}")


def _difference(better: Any, worse: Any, better_key: str, worse_key: str) -> float:
    gap = as_number(better, better_key) - as_number(worse, worse_key)
    if gap < 0:
        raise RowRejected(BadRow.BAD_RANKING, f"{better_key} {better} is below {worse_key} {worse}")
    return gap
