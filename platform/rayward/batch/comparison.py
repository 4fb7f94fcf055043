"""One comparison as token ids: a shared prefix, K branches, and what is known about them. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from rayward.contract.encoder import Encoding
from rayward.contract.reading import Place
from rayward.contract.rendering import common_length

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known about the K completions of one comparison.

    Attributes:
        ranks: float32 [K], lower is better, equal numbers tie; None without a ranking.
        margin: gap that the data asks of a pair; NaN when unknown.
        strength: how strong the preference of a pair is, in the data's own scale; NaN when unknown.
        weight: weight of the comparison in the loss.
        attributes: float32 [K, A] ratings, NaN where missing; None without ratings.
        step_labels: K arrays of float32, the probability that each step is right, NaN where missing; None without labels of steps.
        vote_shares: float32 [K (K - 1) / 2], for each pair (i, j), i < j, the share of the votes that find i better; None without votes.
        num_reads: how many outputs of the model each completion has; None: one.
    """

    ranks: Float32 | None = None
    margin: float = math.nan
    strength: float = math.nan
    weight: float = 1.0
    attributes: Float32 | None = None
    step_labels: tuple[Float32, ...] | None = None
    vote_shares: Float32 | None = None
    num_reads: tuple[int, ...] | None = None

    @property
    def num_completions(self) -> int:
        """K, or 0 when nothing is known."""
        known = next((value for value in (self.ranks, self.attributes, self.step_labels) if value is not None), None)
        return 0 if known is None else len(known)


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """Token ids of one comparison.

    Attributes:
        prefix_ids: int32 [P], the ids that all completions share (P may be 0).
        branch_ids: K arrays of int32; each ends with the token that is scored.
        gate_positions: of each completion, the position in its conversation that a gated head reads; None where no head does.
        text_starts: of each completion, the position from which a language-model loss teaches and outputs per token are read.
        step_ends: of each completion, the positions of the last token of every step.
    """

    id: str
    prefix_ids: Int32
    branch_ids: tuple[Int32, ...]
    labels: Labels
    gate_positions: tuple[int, ...] | None = None
    text_starts: tuple[int, ...] | None = None
    step_ends: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_completions(self) -> int:
        return len(self.branch_ids)

    def read_positions(self, place: Place) -> list[npt.NDArray[np.int64]]:
        """For each completion, the positions in its conversation where the head is read."""
        lengths = [len(self.prefix_ids) + len(branch) for branch in self.branch_ids]
        if place == "end":
            return [np.array([length - 1], dtype=np.int64) for length in lengths]
        if place == "steps":
            assert self.step_ends is not None
            return [np.array(ends, dtype=np.int64) for ends in self.step_ends]
        assert self.text_starts is not None
        return [np.arange(min(start, length - 1), length) for start, length in zip(self.text_starts, lengths, strict=True)]

    @property
    def num_tokens(self) -> int:
        """Tokens computed when the prefix is shared."""
        return len(self.prefix_ids) + sum(len(branch) for branch in self.branch_ids)

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens of K separate conversations."""
        return self.num_completions * len(self.prefix_ids) + sum(len(branch) for branch in self.branch_ids)


def shared_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix that still leaves every sequence at least one token of its own."""
    if len(sequences) == 1:
        return len(sequences[0]) - 1
    limit = min(len(sequence) for sequence in sequences) - 1
    # What the first and the last in order have in common, all have.
    ordered = sorted(map(list, sequences))
    return min(limit, common_length(ordered[0], ordered[-1]))


def comparison_of(
    name: str, encodings: Sequence[Encoding], *, prefix: int | None = None, gate_positions: tuple[int, ...] | None = None
) -> EncodedComparison:
    """Encoded conversations without labels as one comparison.

    Args:
        prefix: ids that all of them share; None: as many as there are.
    """
    import numpy as np

    shared = shared_prefix_length([encoding.ids for encoding in encodings]) if prefix is None else prefix
    steps = [encoding.step_ends for encoding in encodings]
    return EncodedComparison(
        id=name,
        prefix_ids=np.array(encodings[0].ids[:shared], dtype=np.int32),
        branch_ids=tuple(np.array(encoding.ids[shared:], dtype=np.int32) for encoding in encodings),
        labels=Labels(),
        gate_positions=gate_positions,
        text_starts=tuple(encoding.text_start for encoding in encodings),
        step_ends=None if None in steps else cast(tuple[tuple[int, ...], ...], tuple(steps)),
    )
