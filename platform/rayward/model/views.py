"""Tensors that are read box by box: what a checkpoint stores, and what is put together from it without reading it whole.

A box is a half-open range in every dimension. A view answers any box of its shape in fp32, and reads just the parts below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Box = tuple[tuple[int, int], ...]
T = TypeVar("T")


class View(Protocol):
    """A tensor that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, box: Box) -> Tensor:
        """The values of a box that is not empty, fp32, in the shape of the box."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a safetensors file; `open_slice` gives the library's slice of it."""

    shape: tuple[int, ...]
    open_slice: Callable[[], Any]

    def read(self, box: Box) -> Tensor:
        values: Tensor = self.open_slice()[tuple(slice(*bounds) for bounds in box) if box else ...]
        return values.float()


@dataclass(frozen=True, slots=True)
class Joined:
    """Views one after the other in a dimension."""

    parts: Sequence[View]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return _with(self.parts[0].shape, self.dim, sum(part.shape[self.dim] for part in self.parts))

    def read(self, box: Box) -> Tensor:
        start, stop = box[self.dim]
        pieces, offset = [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                pieces.append(part.read(_with(box, self.dim, (first, last))))
            offset += size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Views of one shape in a new dimension."""

    parts: Sequence[View]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        return (*shape[: self.dim], len(self.parts), *shape[self.dim :])

    def read(self, box: Box) -> Tensor:
        below = (*box[: self.dim], *box[self.dim + 1 :])
        return torch.stack([part.read(below) for part in self.parts[slice(*box[self.dim])]], dim=self.dim)


@dataclass(frozen=True, slots=True)
class Part:
    """The range [start, stop) of a view in a dimension."""

    whole: View
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return _with(self.whole.shape, self.dim, self.stop - self.start)

    def read(self, box: Box) -> Tensor:
        first, last = box[self.dim]
        return self.whole.read(_with(box, self.dim, (first + self.start, last + self.start)))


@dataclass(frozen=True, slots=True)
class Transposed:
    """A view with two dimensions exchanged."""

    whole: View
    dims: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return _exchanged(self.whole.shape, self.dims)

    def read(self, box: Box) -> Tensor:
        return self.whole.read(_exchanged(box, self.dims)).transpose(*self.dims)


@dataclass(frozen=True, slots=True)
class Zeros:
    """Nothing but zeros."""

    shape: tuple[int, ...]

    def read(self, box: Box) -> Tensor:
        return torch.zeros([last - first for first, last in box])


def read_flat(view: View, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened tensor."""
    if stop <= start:
        return torch.zeros(0)
    pieces = [view.read(box).reshape(-1) for box in boxes(view.shape, start, stop)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that hold elements [start, stop) of a flattened tensor, in order; the range is not empty."""
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _in_row(shape, last, start % row, stop % row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if stop % row:
        yield from _in_row(shape, last, 0, stop % row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, stop):
        yield ((index, index + 1), *box)


def _with(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _exchanged(values: tuple[T, ...], dims: tuple[int, int]) -> tuple[T, ...]:
    result = list(values)
    result[dims[0]], result[dims[1]] = values[dims[1]], values[dims[0]]
    return tuple(result)
