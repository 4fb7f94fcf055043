"""What a `config.json` asks for, compared with the weights beside it before anything is built: a number in a file must not hang a start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayward.errors import ModelLoadError
from rayward.model.capabilities import UNSUITABLE

COUNTS = re.compile(r"(layer|block|expert|group|depth)s?(_|$)")
"""Fields of a config that say how often something is built."""
MOST_COUNTED = 1024
"""Of anything that a model with fewer tensors may ask for."""
SPARE_ELEMENTS = 1 << 26
"""Of parameters that are not stored: a head that starts anew, a vocabulary that has grown."""
SPARE_BUFFERS = 1 << 30
"""Elements of buffers, which are computed and not stored."""


def refuse_absurd_counts(directory: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Check how many layers, experts and the like a config asks for.

    Raises:
        ModelLoadError: one number is larger than the number of stored tensors, and than 1,024.
    """
    most = max(num_tensors, MOST_COUNTED)
    for name, number in _counts(config):
        if number > most:
            raise ModelLoadError(
                f"{directory}/config.json asks for {name}={number}, and the weights beside it have {num_tensors} tensors",
                remedy="restore the config.json that belongs to the weights",
            )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int) and COUNTS.search(name):
            yield name, value


def refuse_absurd_sizes(directory: Path, shapes: Mapping[str, tuple[int, ...]], build: Callable[[], nn.Module]) -> None:
    """Check the sizes of a model on a device that holds no values.

    Args:
        shapes: of the stored tensors.
        build: the model as it would be built.

    Raises:
        ModelLoadError: it needs far more parameters than are stored, or more buffers.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    remedy = "restore the config.json that belongs to the weights"
    try:
        with torch.device("meta"):
            model = build()
    except (*UNSUITABLE, RuntimeError, RecursionError) as exc:
        raise ModelLoadError(f"no model can be built from {directory}/config.json: {type(exc).__name__}: {exc}", remedy=remedy) from exc
    for kind, tensors, spare in (("parameters", model.parameters(), SPARE_ELEMENTS), ("buffers", model.buffers(), SPARE_BUFFERS)):
        asked = sum(tensor.numel() for tensor in tensors)
        if asked > 2 * stored + spare:
            raise ModelLoadError(
                f"{directory}/config.json describes a model with {asked} elements in its {kind}, and the weights beside it have {stored}",
                remedy=remedy,
            )
