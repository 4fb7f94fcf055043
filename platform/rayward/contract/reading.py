"""Where the outputs of a completion are read when it is not its end alone, and how the readings become one reward.

Light to import: torch is loaded by the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayward.schema import Frozen

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_SEPARATOR = "\n\n"
"""Between two steps, where the settings name nothing else."""

Place = Literal["end", "steps", "tokens"]
Aggregate = Literal["last", "mean", "minimum", "product", "mean_logit"]


class RewardReadout(Frozen):
    """Of an outcome or process reward model: every reading is the logit of a probability; the reward is one probability.

    Attributes:
        at: the last token of every step, or every token of the completion.
        separator: text between two steps.
        aggregate: `last`, `mean`, `minimum` or `product` of the probabilities, or the probability of the mean logit.
    """

    at: Literal["steps", "tokens"]
    separator: str | None = None
    aggregate: Aggregate

    def combine(self, logits: Tensor, num_reads: Sequence[int]) -> Tensor:
        """Rewards, float32 [N, 1], of N completions with so many readings each, from all their logits, float32 [sum, 1]."""
        import torch

        return (
            torch.stack([self._one(values) for values in torch.split(logits[:, 0], list(num_reads))])[:, None] if num_reads else logits[:0]
        )

    def along(self, logits: Tensor) -> Tensor:
        """What `combine` gives of the first reading, of the first two, and so on, float32 [N], of the logits [N] of one completion."""
        import torch

        return torch.stack([self._one(logits[:stop]) for stop in range(1, len(logits) + 1)])

    def _one(self, logits: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        match self.aggregate:
            case "last":
                return logits[-1].sigmoid()
            case "mean":
                return logits.sigmoid().mean()
            case "minimum":
                return logits.min().sigmoid()
            case "product":
                return logsigmoid(logits).sum().exp()
            case _:
                return logits.mean().sigmoid()


def place_of(reading: RewardReadout | None) -> Place:
    """Where the head is read."""
    return "end" if reading is None else reading.at
