"""Comparisons as text on the way between two steps of `prepare`, and several of one prompt as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from rayward.data.comparison import Comparison


def dump_record(comparison: Comparison) -> str:
    """The comparison as JSON, for the way between two steps."""
    fields = (comparison.id, comparison.source, comparison.prompt, comparison.completions, comparison.ranks)
    return json.dumps([*fields, comparison.margin, comparison.strength, comparison.weight, comparison.attributes])


def load_record(text: str) -> Comparison:
    """Inverse of `dump_record`."""
    name, source, prompt, completions, ranks, margin, strength, weight, attributes = json.loads(text)
    return Comparison(
        id=name,
        source=source,
        prompt=tuple(prompt),
        completions=tuple(completions),
        ranks=None if ranks is None else tuple(ranks),
        margin=margin,
        strength=strength,
        weight=weight,
        attributes=None if attributes is None else tuple(tuple(ratings) for ratings in attributes),
    )


def joined(comparisons: Sequence[Comparison]) -> Comparison:
    """Unranked comparisons of one prompt as one: all completions with their ratings, the first one's id and source, the mean weight."""
    first = comparisons[0]
    if len(comparisons) == 1:
        return first
    return replace(
        first,
        completions=tuple(text for c in comparisons for text in c.completions),
        attributes=tuple(ratings for c in comparisons for ratings in c.attributes or ()),
        weight=sum(c.weight for c in comparisons) / len(comparisons),
    )
