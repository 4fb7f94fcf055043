"""Mean and variance of numbers that are never together: parts are added up wherever they are, and join in any order. Light."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

from rayward.schema import Frozen


class Moments(Frozen):
    """Of numbers seen so far.

    Attributes:
        count: how many.
        mean: of them; 0 without any.
        squares: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of these numbers, each added on its own (Welford): no cancellation, however far they lie from zero."""
        count, mean, squares = 0, 0.0, 0.0
        for value in values:
            count += 1
            gap = value - mean
            mean += gap / count
            squares += gap * (value - mean)
        return cls(count=count, mean=mean, squares=squares)

    def plus(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque)."""
        if not self.count or not other.count:
            return other if not self.count else self
        count, gap = self.count + other.count, other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + gap * (other.count / count),
            squares=self.squares + other.squares + gap * gap * (self.count * (other.count / count)),
        )

    @property
    def deviation(self) -> float:
        """Population standard deviation; 0 without numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0
