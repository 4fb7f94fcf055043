"""Units through a model: prefixes shared across them, micro-batches under the token budget, and each unit's own values back. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout
from rayward.batch.planner import group_by_budget
from rayward.batch.sharing import Merged, merge
from rayward.scoring.isolation import together
from rayward.scoring.units import UnitValues, Values
from rayward.wire.items import ItemError

Run: TypeAlias = "Callable[[Sequence[EncodedComparison]], list[torch.Tensor]]"
"""One micro-batch through the model: for each comparison its outputs on the CPU, completion by completion, float32 [readings, ...]."""

Readings: TypeAlias = "Callable[[EncodedComparison], list[int]]"


@dataclass(frozen=True, slots=True)
class Forward:
    """How comparisons become micro-batches of one model.

    Attributes:
        tokens_per_batch: token budget of one forward.
        alone: every comparison in a forward of its own, so that its values are bitwise the same in any company.
    """

    layout: Layout
    device: torch.device
    tokens_per_batch: int
    alone: bool = False

    def shared(self, comparisons: Sequence[EncodedComparison], run: Run, num_reads: Readings) -> list[Values]:
        """The values of each comparison; what several of them begin with is computed once.

        Args:
            num_reads: readings of each completion of a comparison.

        Raises:
            Exception: the device is broken, or out of memory for a single comparison.
        """
        if self.alone or self.layout == "padded":
            return [self._valued(*each) for each in zip(comparisons, self.separate(comparisons, run), strict=True)]
        merged = merge(comparisons, tokens_per_microbatch=self.tokens_per_batch)
        found: dict[int, Values] = {}
        failed: list[int] = []
        for group, outputs in zip(merged, self.separate([each.comparison for each in merged], run), strict=True):
            charges = group.charges()
            if len(charges) > 1 and not is_finite(outputs):
                # What is wrong with one of them must not be wrong with the others.
                failed += charges
            elif isinstance(outputs, ItemError):
                found |= dict.fromkeys(charges, outputs)
            else:
                found |= {index: UnitValues(values, charges[index]) for index, values in _parted(group, outputs, num_reads).items()}
        again = self.separate([comparisons[index] for index in failed], run)
        found |= {index: self._valued(comparisons[index], outputs) for index, outputs in zip(failed, again, strict=True)}
        return [found[index] for index in range(len(comparisons))]

    def separate(self, comparisons: Sequence[EncodedComparison], run: Run) -> list[torch.Tensor | ItemError]:
        """The outputs of each comparison as it is; raises as `shared`."""
        found: list[torch.Tensor | ItemError | None] = [None] * len(comparisons)
        for group in self._groups(comparisons):
            outputs = together([comparisons[index] for index in group], run, device=self.device, good=is_finite)
            for index, values in zip(group, outputs, strict=True):
                found[index] = values
        return cast("list[torch.Tensor | ItemError]", found)

    def _groups(self, comparisons: Sequence[EncodedComparison]) -> list[list[int]]:
        if self.alone:
            return [[index] for index in range(len(comparisons))]
        return group_by_budget(comparisons, tokens_per_microbatch=self.tokens_per_batch, layout=self.layout)

    def _valued(self, comparison: EncodedComparison, outputs: torch.Tensor | ItemError) -> Values:
        if isinstance(outputs, ItemError):
            return outputs
        return UnitValues(outputs, comparison.num_tokens_unshared if self.layout == "padded" else comparison.num_tokens)


def _parted(merged: Merged, outputs: torch.Tensor, num_reads: Readings) -> dict[int, torch.Tensor]:
    # By comparison that was merged, its own rows, in the order of its branches.
    if len(merged.sources) == 1 or all(index == merged.sources[0][0] for index, _ in merged.sources):
        return {merged.sources[0][0]: outputs}
    rows: dict[int, list[torch.Tensor]] = {}
    for (index, _), values in zip(merged.sources, torch.split(outputs, num_reads(merged.comparison)), strict=True):
        rows.setdefault(index, []).append(values)
    return {index: torch.cat(values) for index, values in rows.items()}


def is_finite(values: torch.Tensor | ItemError) -> bool:
    """Whether there are values, and all of them are numbers."""
    return not isinstance(values, ItemError) and bool(torch.isfinite(values).all())
