"""One forward over units of many items: whatever one of them does, the others get their values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rayward.scoring.units import Unit, UnitModel, Values
from rayward.wire.items import ItemError

logger = logging.getLogger("ray.serve")

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of the units of one forward.

    Attributes:
        values: of each unit; where the device failed, the error `interrupted`, which another replica may not meet.
        failure: why this replica should be replaced, or None.
        any_good: whether the device gave values for any of them.
    """

    values: list[Values]
    failure: str | None = None
    any_good: bool = True


def interrupted(failure: str) -> ItemError:
    """The error of an item that a replica could not compute, through no fault that is known of the item."""
    return ItemError.of(INTERRUPTED, f"the replica failed while it was computed ({failure}); it is replaced")


def compute(model: UnitModel, units: Sequence[Unit]) -> Computed:
    """The values of all units in one forward; where that raises, of each in a forward of its own, once.

    A model answers for what its units do; what it raises for a single one is the device's: broken, or out of memory.
    """
    try:
        return Computed(model.forward(units))
    # Broad on purpose: the units are those of different callers.
    except Exception as exc:
        failure = type(exc).__name__
        logger.exception("%d units failed together%s", len(units), "; each is repeated alone" if len(units) > 1 else "")
    # Outside the handler: the exception holds the tensors of the failed forward.
    if len(units) == 1:
        return Computed([interrupted(failure)], failure, any_good=False)
    values: list[Values] = []
    lone_failure, any_good = None, False
    for unit in units:
        alone = compute(model, [unit])
        values += alone.values
        any_good |= alone.any_good
        lone_failure = lone_failure or alone.failure
    return Computed(values, lone_failure, any_good)
