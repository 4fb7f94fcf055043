"""The two fits of a mixture of objectives: ridge regression to ratings, and the gate on the prompt (ArmoRM, arXiv 2406.12845)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rayward.errors import ConfigError
from rayward.evaluation.statistics import spearman
from rayward.model.gate import Gating

SLICE = 8192
"""Rows that are in memory at once."""

Floats = npt.NDArray[np.float64]
ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties that are tried."""

PENALTIES = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(round(0.15 + 0.05 * i, 2) for i in range(17)))
"""Shares of the verbosity reward that are tried, in order (0 .. 0.95)."""


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """Result of `ridge`.

    Attributes:
        weights: float64 [A, H].
        alphas: the penalty chosen for each objective.
        validation_mse: of each objective with it.
        num_ratings: rows that had a rating of each objective.
    """

    weights: Floats
    alphas: tuple[float, ...]
    validation_mse: tuple[float, ...]
    num_ratings: tuple[int, ...]


def ridge(features: npt.ArrayLike, ratings: npt.ArrayLike, held_out: npt.ArrayLike, alphas: Sequence[float] = ALPHAS) -> RidgeFit:
    """Ridge regression without intercept for each objective, the penalty chosen by the squared error on the held-out rows.

    Args:
        features: [N, H].
        ratings: [N, A], NaN where missing.
        held_out: bool [N].

    Raises:
        ConfigError: an objective has no rating on one of the two sides.
    """
    # Features may be mapped from a file: a slice of them is in memory at a time.
    x, y, out = np.asarray(features), np.asarray(ratings, dtype=np.float64), np.asarray(held_out, dtype=bool)
    weights, chosen, errors, counts = [], [], [], []
    for column in range(y.shape[1]):
        known = ~np.isnan(y[:, column])
        train, test = known & ~out, known & out
        if not train.any() or not test.any():
            raise ConfigError(
                f"objective {column} has {train.sum()} ratings to fit and {test.sum()} to choose the penalty by; the rule is one of each",
                remedy="leave it out, or give more rated rows",
            )
        gram, moment = np.zeros((x.shape[1], x.shape[1])), np.zeros(x.shape[1])
        for part, target in _slices(x, y[:, column], train):
            gram += part.T @ part
            moment += part.T @ target
        values, vectors = np.linalg.eigh(gram)
        projected = vectors.T @ moment
        candidates = np.stack([vectors @ (projected / (np.maximum(values, 0.0) + alpha)) for alpha in alphas])
        squares = np.zeros(len(alphas))
        for part, target in _slices(x, y[:, column], test):
            squares += ((part @ candidates.T - target[:, None]) ** 2).sum(axis=0)
        mse = [float(value) for value in squares / int(test.sum())]
        best = int(np.argmin(mse))
        weights.append(candidates[best])
        chosen.append(float(alphas[best]))
        errors.append(mse[best])
        counts.append(int(known.sum()))
    return RidgeFit(np.stack(weights), tuple(chosen), tuple(errors), tuple(counts))


def _slices(x: npt.NDArray[Any], y: Floats, wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[Floats, Floats]]:
    for start in range(0, len(x), SLICE):
        kept = wanted[start : start + SLICE]
        if kept.any():
            yield np.asarray(x[start : start + SLICE][kept], dtype=np.float64), y[start : start + SLICE][kept]


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """A tensor over the memory of an array that is only read, mapped or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def debiasing(rewards: npt.ArrayLike, verbosity: int, limit: float = 0.03) -> Floats:
    """The matrix T [A, A] with r' = r T: of each objective as small a share of verbosity is taken that its rank correlation with
    verbosity falls to `limit`; the whole of it where no share suffices, and of verbosity itself everything.

    Args:
        rewards: [N, A] on a reference set.
        verbosity: index of the verbosity objective.
        limit: largest accepted Spearman correlation.
    """
    r = np.asarray(rewards, dtype=np.float64)
    transform = np.eye(r.shape[1])
    for column in range(r.shape[1]):
        penalty = 1.0
        if column != verbosity:
            shares = (share for share in PENALTIES if spearman(r[:, column] - share * r[:, verbosity], r[:, verbosity]) <= limit)
            penalty = next(shares, 1.0)
        transform[verbosity, column] -= penalty
    return transform


def fit_gate(
    gate: Gating,
    prompts: Tensor,
    better: Tensor,
    worse: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
    rows: Tensor | None = None,
) -> list[float]:
    """Train the gate with the Bradley-Terry loss of the debiased score; returns the loss of every step.

    AdamW without decay, cosine to zero. The transform is applied in training as in scoring (the released script leaves it out in training).

    Args:
        prompts: hidden state of the prompt of each pair, [P, H]; or [N, H], with `rows`.
        better, worse: [P, A] rewards of the objectives.
        rows: [P], where the prompt of each pair stands in `prompts`, which may be mapped from a file; None: at its own place.
    """
    optimizer = torch.optim.AdamW(gate.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    gate.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        for _ in range(steps):
            chosen = torch.randint(len(better), (min(batch_size, len(better)),), generator=generator)
            # One forward for both: the same prompt must see the same dropout.
            weights = gate.coefficients(prompts[chosen if rows is None else rows[chosen]])
            gap = (weights * ((better[chosen] - worse[chosen]) @ gate.transform)).sum(dim=-1)
            loss = softplus(-gap).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    gate.eval()
    return losses
