"""Pairs whose two completions carry scores, under the names that public data gives them: the order, ties and strength of the pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayward.data.formats.values import Row, as_number, missing, optional
from rayward.data.record import BadRow, RowRejected

_WORDS = ("score", "rating", "avg_rating", "reward", "quality")


def score_columns(chosen_key: str = "chosen", rejected_key: str = "rejected") -> tuple[tuple[str, str], ...]:
    """The pairs of columns that may hold the scores of the two completions."""
    keys = {(chosen_key, rejected_key), ("chosen", "rejected")}
    named = [(f"{word}_{a}", f"{word}_{b}") for a, b in sorted(keys) for word in _WORDS]
    named += [(f"{a}{mark}{word}", f"{b}{mark}{word}") for a, b in sorted(keys) for word in _WORDS for mark in "_-"]
    return tuple(named)


_PLAIN_COLUMNS = score_columns()


def judged(row: Row, chosen_key: str = "chosen", rejected_key: str = "rejected") -> dict[str, Any]:
    """Ranks, strength and margin of a pair: by its scores where it has them (equal is a tie), else the first is better.

    The strength is the column `strength`, else the gap of the scores.

    Raises:
        RowRejected: the chosen one has the lower score, or two pairs of columns hold scores.
    """
    strength, margin = optional(row, "strength"), optional(row, "margin")
    gap = _gap(row, chosen_key, rejected_key)
    if gap is None:
        return {"ranks": (0.0, 1.0), "strength": strength, "margin": margin}
    return {"ranks": (0.0, float(gap != 0)), "strength": gap if strength is None else strength, "margin": margin}


def _gap(row: Row, chosen_key: str, rejected_key: str) -> float | None:
    pairs = _PLAIN_COLUMNS if (chosen_key, rejected_key) == ("chosen", "rejected") else score_columns(chosen_key, rejected_key)
    found = [(a, b) for a, b in pairs if not missing(row.get(a)) and not missing(row.get(b))]
    if len(found) > 1:
        listed = " and ".join(f"{a}, {b}" for a, b in found)
        raise RowRejected(BadRow.BAD_RANKING, f"two pairs of columns hold scores: {listed}; leave one out with data.ignore")
    if not found:
        return _gap_of_generations(row, chosen_key, rejected_key)
    ((a, b),) = found
    gap = as_number(row[a], a) - as_number(row[b], b)
    if gap < 0:
        raise RowRejected(BadRow.BAD_RANKING, f"{a} {row[a]} is below {b} {row[b]}")
    return gap


def _gap_of_generations(row: Mapping[str, Any], chosen_key: str, rejected_key: str) -> float | None:
    # distilabel keeps the judge's ratings beside the generations in the order that the judge saw them.
    generations, ratings = row.get("generations"), row.get("ratings", row.get("rating"))
    if not (isinstance(generations, list) and isinstance(ratings, list) and len(generations) == len(ratings)):
        return None
    if not (row.get(chosen_key) in generations and row.get(rejected_key) in generations):
        return None
    better, worse = (ratings[generations.index(row[key])] for key in (chosen_key, rejected_key))
    if missing(better) or missing(worse):
        return None
    gap = as_number(better, "rating") - as_number(worse, "rating")
    if gap < 0:
        raise RowRejected(BadRow.BAD_RANKING, f"the rating {better} of {chosen_key} is below the rating {worse} of {rejected_key}")
    return gap
