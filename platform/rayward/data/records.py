"""Comparisons as text on the way between two steps of `prepare`, and several of one prompt as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rayward.data.comparison import Comparison

Value = TypeVar("Value")


def dump_record(comparison: Comparison) -> str:
    """The comparison as JSON, for the way between two steps."""
    fields = (comparison.id, comparison.source, comparison.prompt, comparison.completions, comparison.ranks)
    numbers = (comparison.margin, comparison.strength, comparison.weight, comparison.attributes, comparison.step_labels)
    return json.dumps([*fields, *numbers, comparison.critiques])


def load_record(text: str) -> Comparison:
    """Inverse of `dump_record`."""
    name, source, prompt, completions, ranks, margin, strength, weight, *others = json.loads(text)
    attributes, step_labels, critiques = others
    return Comparison(
        id=name,
        source=source,
        prompt=tuple(prompt),
        completions=tuple(completions),
        ranks=None if ranks is None else tuple(ranks),
        margin=margin,
        strength=strength,
        weight=weight,
        attributes=_rows(attributes),
        step_labels=_rows(step_labels),
        critiques=None if critiques is None else tuple(critiques),
    )


def _rows(values: list[list[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if values is None else tuple(tuple(row) for row in values)


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
