"""Tokenized comparisons for tests, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayward.batch.comparison import EncodedComparison, Labels

VOCAB_SIZE = 97
END_TOKEN_ID = 2


def make_comparison(name: str, prefix: int, branches: Sequence[int], *, seed: int = 0, labels: Labels | None = None) -> EncodedComparison:
    """Random ids in the given lengths; every branch ends with the end token. Ranks are 0, 1, 2, … unless given."""
    generator = np.random.default_rng([seed, *name.encode()])

    def ids(length: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return generator.integers(3, VOCAB_SIZE, length).astype(np.int32)

    tails = []
    for length in branches:
        tail = ids(length)
        tail[-1] = END_TOKEN_ID
        tails.append(tail)
    return EncodedComparison(
        id=name,
        prefix_ids=ids(prefix),
        branch_ids=tuple(tails),
        labels=labels or Labels(ranks=np.arange(len(branches), dtype=np.float32)),
        text_starts=tuple(int(generator.integers(0, prefix + length)) for length in branches),
        step_ends=tuple(
            (*sorted(generator.integers(0, prefix + length, int(generator.integers(0, 3))).tolist()), prefix + length - 1)
            for length in branches
        ),
    )


def random_comparisons(number: int, *, seed: int, longest: int = 40, most: int = 3) -> list[EncodedComparison]:
    """Comparisons of 2 to `most` completions with prefix and branches of up to `longest` tokens."""
    generator = np.random.default_rng(seed)
    result = []
    for index in range(number):
        branches = generator.integers(1, longest + 1, int(generator.integers(2, most + 1)))
        result.append(make_comparison(f"c{index}", int(generator.integers(0, longest + 1)), branches.tolist(), seed=seed))
    return result
