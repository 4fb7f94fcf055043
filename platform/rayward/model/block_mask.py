"""The block mask of a packed row for FlexAttention, made from the table of its spans.

`create_block_mask` would evaluate the rule for every pair of tokens, on the GPU, for every batch: quadratic in the row, and gigabytes for
long ones. Whole blocks of 128 x 128 are decided here from the spans, on the CPU; the rule itself is evaluated inside of those blocks that
are visible in part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = 128


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Which blocks of a row see which; B = ceil(T / 128) blocks.

    Attributes:
        partial: bool [B, B], from a block of queries (row) to one of keys (column): some pair may be visible, but not surely every one.
        full: bool [B, B], every pair is visible. No other pair of blocks has a visible pair of tokens.
        comparison, branch: int32 [T], of every token; branch 0 is the prefix.
    """

    partial: npt.NDArray[np.bool_]
    full: npt.NDArray[np.bool_]
    comparison: npt.NDArray[np.int32]
    branch: npt.NDArray[np.int32]


def block_table(segments: npt.NDArray[np.int64], num_tokens: int) -> BlockTable:
    """Decide the blocks of a row.

    Args:
        segments: int64 [S, 4], the `PackedBatch.segments` table.
        num_tokens: T.
    """
    lengths: list[int] = []
    owners: list[int] = []
    branches: list[int] = []
    previous = None
    for index, (start, prefix, _, length) in enumerate(segments.tolist()):
        if start != previous:
            previous = start
            lengths.append(prefix)
            owners.append(owners[-1] + 1 if owners else 0)
            branches.append(0)
        lengths.append(length)
        owners.append(owners[-1])
        branches.append(index + 1)
    owner, branch = np.array(owners, dtype=np.int32), np.array(branches, dtype=np.int32)
    span = np.repeat(np.arange(len(lengths)), lengths)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    block = np.arange(num_tokens) // BLOCK_SIZE
    holds = np.zeros((num_blocks, len(lengths)), dtype=np.float32)
    holds[block, span] = 1.0
    of_comparison = np.zeros((num_blocks, int(owner[-1]) + 1), dtype=np.float32)
    of_prefix = of_comparison.copy()
    of_comparison[block, owner[span]] = 1.0
    in_prefix = branch[span] == 0
    of_prefix[block[in_prefix], owner[span[in_prefix]]] = 1.0
    earlier = np.tri(num_blocks, dtype=bool)
    visible = earlier & ((holds @ holds.T > 0) | (of_comparison @ of_prefix.T > 0))
    # One span and no end of the row inside: such blocks see each other whole, or not at all.
    uniform = holds.sum(axis=1) == 1
    uniform[-1] &= num_tokens % BLOCK_SIZE == 0
    only = holds.argmax(axis=1)
    prefix_of = (branch[only] == 0)[None, :] & (owner[only][:, None] == owner[only][None, :])
    full = earlier & ~np.eye(num_blocks, dtype=bool) & uniform[:, None] & uniform[None, :] & ((only[:, None] == only[None, :]) | prefix_of)
    return BlockTable(visible & ~full, full, owner[span], branch[span])


def flex_mask(segments: Tensor, num_tokens: int, device: torch.device) -> BlockMask:
    """The rule of packed attention as a FlexAttention block mask on a device.

    Args:
        segments: int64 [S, 4] on the CPU.
        num_tokens: T.
    """
    table = block_table(segments.numpy(), num_tokens)
    owner, branch = (torch.from_numpy(array).to(device, non_blocking=True) for array in (table.comparison, table.branch))

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (owner[q] == owner[k]) & ((branch[k] == 0) | (branch[q] == branch[k]))
        return same & (k <= q)

    return BlockMask.from_kv_blocks(
        *_listed(table.partial, device),
        *_listed(table.full, device),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(blocks: npt.NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    # As FlexAttention wants them: how many blocks of keys each block of queries sees, and which, these first.
    number = blocks.sum(axis=1, dtype=np.int32)[None, None]
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)[None, None]
    return torch.from_numpy(number).to(device, non_blocking=True), torch.from_numpy(order).to(device, non_blocking=True)
