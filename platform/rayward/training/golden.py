"""Golden scores of the training forward, and the check that training mode computes what is served. No Ray in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rayward.batch.comparison import comparison_of
from rayward.batch.layout import pack
from rayward.contract.contract import GoldenScore
from rayward.contract.encoder import Encoder
from rayward.contract.golden import golden_conversations
from rayward.contract.reading import place_of
from rayward.errors import ModelLoadError
from rayward.training.engines.optimizer import set_training_mode
from rayward.training.engines.protocol import Engine

MODE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference between two runs of one forward, relative to values above 1: kernels may add in another order."""


def golden_scores(engine: Engine, encoder: Encoder) -> tuple[GoldenScore, ...]:
    """Rewards of the golden conversations in the training forward.

    Raises:
        ContractError: the contract can hold no conversation at all.
    """
    scores = []
    contract, layout = encoder.contract, engine.reward_model.layout
    reading = contract.reading
    for golden, encoding in golden_conversations(encoder):
        batch = pack([comparison_of("golden", [encoding])], layout=layout, pad_token_id=contract.pad_token_id, read=place_of(reading))
        with torch.no_grad():
            outputs = engine.forward(batch)
        values = outputs if reading is None else reading.combine(outputs, batch.num_reads.tolist())
        scores.append(golden.model_copy(update={"reward": tuple(values[0].tolist())}))
    return tuple(scores)


def check_modes(engine: Engine, encoder: Encoder) -> None:
    """Compare the forward of training with that of scoring on the golden texts; called by all ranks.

    Raises:
        ModelLoadError: they differ; names the first module that computes something else.
    """
    model = engine.reward_model
    tolerance = MODE_TOLERANCE[next(model.parameters()).dtype]
    trained = _rewards(engine, encoder)
    try:
        model.eval()
        served = _rewards(engine, encoder)
        # Ranks that draw other numbers must not go other ways: ZeRO-3 gathers in lock step.
        if not any(engine.all_gather_object(not _close(trained, served, tolerance))):
            return
        with _sums_by_module(model) as served_sums:
            golden_scores(engine, encoder)
        set_training_mode(model)
        with _sums_by_module(model) as trained_sums:
            golden_scores(engine, encoder)
    finally:
        set_training_mode(model)
    differing = (n for (n, a), (_, b) in zip(trained_sums, served_sums, strict=False) if not _close([a], [b], tolerance))
    raise ModelLoadError(
        f"{type(model.model).__name__} computes other rewards in training than in scoring; the first module that does: "
        f"{next(differing, 'none of them alone')}",
        remedy="switch off in its configuration what draws random numbers or depends on the training mode, or use another architecture",
    )


def _rewards(engine: Engine, encoder: Encoder) -> list[float]:
    return [value for score in golden_scores(engine, encoder) for value in score.reward]


def _close(ours: Iterable[float], theirs: Iterable[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) or (math.isnan(a) and math.isnan(b)) for a, b in zip(ours, theirs, strict=True))


@contextmanager
def _sums_by_module(model: nn.Module) -> Iterator[list[tuple[str, float]]]:
    # The sum of everything that each module gives, in the order in which the modules finish.
    sums: list[tuple[str, float]] = []

    def note(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        sums.append((f"{name} ({type(module).__name__})", sum(float(tensor.double().sum()) for tensor in _tensors(output))))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, Tensor)]
