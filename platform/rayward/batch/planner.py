"""Who computes what: the comparisons of a step over ranks and micro-batches, and groups under a token budget. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayward.batch.comparison import EncodedComparison
from rayward.batch.layout import Layout
from rayward.errors import ConfigError


def microbatch_tokens(comparisons: Sequence[EncodedComparison], layout: Layout) -> int:
    """Tokens that one micro-batch of these comparisons computes, padding included."""
    if layout == "packed":
        return sum(c.num_tokens for c in comparisons)
    width = max((len(c.prefix_ids) + max(len(b) for b in c.branch_ids) for c in comparisons), default=0)
    return width * sum(c.num_completions for c in comparisons)


def plan_step(
    comparisons: Sequence[EncodedComparison], *, world_size: int, tokens_per_microbatch: int, layout: Layout = "packed"
) -> list[list[list[int]]]:
    """Split the comparisons of one optimizer step over ranks and micro-batches.

    Every rank gets the same number of micro-batches (ZeRO-3 runs in lock step); the i-th micro-batches of all ranks
    are of similar cost; no comparison is split; no micro-batch is over budget. The result depends on the arguments alone.

    Returns:
        plan[rank][microbatch] = indices into `comparisons` (a micro-batch may be empty).

    Raises:
        ConfigError: one comparison alone exceeds the budget.
    """
    costs = [microbatch_tokens([c], layout) for c in comparisons]
    for comparison, cost in zip(comparisons, costs, strict=True):
        if cost > tokens_per_microbatch:
            raise ConfigError(
                f"comparison {comparison.id} takes {cost} tokens; training.tokens_per_microbatch is {tokens_per_microbatch}, "
                "and a comparison is never split",
                remedy=f"set training.tokens_per_microbatch to at least {cost}, or lower model.max_tokens",
            )
    order = sorted(range(len(comparisons)), key=lambda i: (-costs[i], i))
    rounds = max(1, math.ceil(sum(costs) / (tokens_per_microbatch * world_size)))
    while True:
        bins = _fill(comparisons, costs, order, rounds * world_size, tokens_per_microbatch, layout)
        if bins is not None:
            break
        rounds += 1
    bins.sort(key=lambda members: (-sum(costs[i] for i in members), members))
    plan: list[list[list[int]]] = [[] for _ in range(world_size)]
    for start in range(0, len(bins), world_size):
        lane = bins[start : start + world_size]
        # Alternate the direction, so that no rank always gets the heaviest micro-batch.
        for rank, members in enumerate(lane if (start // world_size) % 2 == 0 else reversed(lane)):
            plan[rank].append(sorted(members))
    return plan


def _fill(
    comparisons: Sequence[EncodedComparison], costs: list[int], order: list[int], num_bins: int, budget: int, layout: Layout
) -> list[list[int]] | None:
    # Packed: largest first into the emptiest bin. Padded: runs of similar length, so that little is padding.
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    if layout == "packed":
        loads = [0] * num_bins
        for index in order:
            target = min(range(num_bins), key=lambda b: (loads[b], b))
            if loads[target] + costs[index] > budget:
                return None
            bins[target].append(index)
            loads[target] += costs[index]
        return bins
    by_width = sorted(order, key=lambda i: (-len(comparisons[i].prefix_ids) - max(len(b) for b in comparisons[i].branch_ids), i))
    share, done, target = sum(costs) / num_bins, 0, 0
    for index in by_width:
        over = microbatch_tokens([comparisons[i] for i in [*bins[target], index]], layout) > budget
        if bins[target] and (over or done >= share * (target + 1)):
            target += 1
            if target == num_bins:
                return None
        bins[target].append(index)
        done += costs[index]
    return bins


def group_by_budget(comparisons: Sequence[EncodedComparison], *, tokens_per_microbatch: int, layout: Layout = "packed") -> list[list[int]]:
    """Groups of indices for scoring: similar lengths together, each within the budget (a larger one stands alone)."""
    costs = [microbatch_tokens([c], layout) for c in comparisons]
    groups: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(comparisons)), key=lambda i: (-costs[i], i)):
        if current and microbatch_tokens([comparisons[i] for i in [*current, index]], layout) > tokens_per_microbatch:
            groups.append(current)
            current = []
        current.append(index)
    if current:
        groups.append(current)
    return groups
