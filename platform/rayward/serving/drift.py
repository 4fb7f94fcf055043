"""How far a shadow version's rewards are from those of the current one: the sums of every ingress, put together."""

from __future__ import annotations

from collections.abc import Iterable

from rayward.schema import Frozen
from rayward.serving import shadow
from rayward.serving.calls import Stats


class Drift(Frozen):
    """Two versions on the same items, since the ingresses that run now were started."""

    current: str
    """The version that the shadow is compared with."""
    num_completions: int
    """Completions that both gave a reward."""
    mean_difference: float
    """Shadow less current."""
    mean_abs_difference: float
    max_abs_difference: float
    num_pairs: int
    """Pairs of completions of one prompt that the current version does not tie."""
    rank_agreement: float | None
    """Share of these that both put in one order; None where there is no such pair."""
    num_uncompared: int
    """Items that were not compared: too many at a time, the call failed, or one of the two had no reward."""


def drift_of(stats: Iterable[Stats], *, model: str, current: str, version: str) -> Drift | None:
    """None where nothing was compared."""
    wanted = {("model", model), ("current", current), ("shadow", version)}
    sums: dict[str, float] = {}
    for each in stats:
        for (name, labels), value in (*each.counters.items(), *each.gauges.items()):
            if wanted <= set(labels):
                sums[name] = max(sums.get(name, 0.0), value) if name == shadow.MAX_DIFFERENCE else sums.get(name, 0.0) + value
    num = sums.get(shadow.COMPLETIONS, 0.0)
    if not num:
        return None
    pairs = sums.get(shadow.PAIRS, 0.0)
    return Drift(
        current=current,
        num_completions=int(num),
        mean_difference=sums.get(shadow.DIFFERENCE, 0.0) / num,
        mean_abs_difference=sums.get(shadow.ABS_DIFFERENCE, 0.0) / num,
        max_abs_difference=sums.get(shadow.MAX_DIFFERENCE, 0.0),
        num_pairs=int(pairs),
        rank_agreement=sums.get(shadow.AGREEING_PAIRS, 0.0) / pairs if pairs else None,
        num_uncompared=int(sums.get(shadow.UNCOMPARED, 0.0)),
    )
