"""Mixture of objectives (ArmoRM, arXiv 2406.12845): ridge regression to rated objectives, debiasing, and a gate on the prompt.

The backbone is frozen; everything here works on its hidden states. Shapes: N completions, P prompts, H hidden size, A objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import softplus

from rayward.errors import ConfigError, ModelLoadError
from rayward.metrics import spearman

Floats = npt.NDArray[np.float64]

GATING_FILE = "gating.safetensors"
ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties that are tried."""
PENALTIES = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(round(0.15 + 0.05 * i, 2) for i in range(17)))
"""Shares of the verbosity reward that are tried, in order (0 .. 0.95)."""


class Gating(nn.Module):
    """Weights of the objectives from the prompt's hidden state, and the rule that makes one score of them. All fp32.

    The score is sum_i g_i r'_i with r' = r T (T takes the verbosity out) and g = logit_scale softmax(logits / temperature), so the weights
    sum to `logit_scale`.

    Args:
        width, depth: of the hidden layers (1024, 3 in the paper).
        dropout: after each of them, while training.
    """

    transform: Tensor
    temperature: Tensor

    def __init__(
        self, hidden_size: int, num_objectives: int, *, width: int = 1024, depth: int = 3, temperature: float = 10.0, dropout: float = 0.2
    ) -> None:
        super().__init__()
        sizes = [hidden_size, *[width] * depth, num_objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("transform", torch.eye(num_objectives))
        self.register_buffer("temperature", torch.tensor(temperature))

    def coefficients(self, prompt_hidden: Tensor) -> Tensor:
        """[N, H] -> float32 [N, A], the weights of the debiased objectives."""
        values = prompt_hidden.float()
        for layer in self.layers[:-1]:
            values = self.dropout(torch.relu(layer(values)))
        logits: Tensor = self.layers[-1](values)
        return self.logit_scale * torch.softmax(logits / self.temperature, dim=-1)

    def score(self, rewards: Tensor, prompt_hidden: Tensor) -> Tensor:
        """Rewards of the objectives [N, A] -> float32 [N]."""
        return (self.coefficients(prompt_hidden) * (rewards.float() @ self.transform)).sum(dim=-1)

    def forward(self, rewards: Tensor, prompt_hidden: Tensor) -> Tensor:
        """Rewards of the objectives [N, A] -> float32 [N, A + 1]: them, and the score."""
        return torch.cat([rewards.float(), self.score(rewards, prompt_hidden)[:, None]], dim=-1)

    def save(self, directory: Path) -> None:
        """Write `gating.safetensors`, in the published names."""
        tensors = {f"gating.{name}": value.detach().float().contiguous() for name, value in self.state_dict().items()}
        tensors["reward_transform_matrix"] = tensors.pop("gating.transform")
        save_file(tensors, directory / GATING_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path) -> Gating:
        """Read what `save` wrote, or the gating tensors of a published checkpoint.

        Raises:
            ModelLoadError: the file cannot be read or lacks a tensor.
        """
        try:
            return cls.from_tensors(load_file(path))
        except (OSError, SafetensorError) as exc:
            raise ModelLoadError(f"{path} cannot be read ({exc})", remedy="restore it, or fit the mixture again") from exc

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Gating:
        """Build the gate from tensors in the published names; a missing temperature is 10.

        Raises:
            ModelLoadError: a tensor is missing or of another shape.
        """
        weights = sorted(name for name in tensors if name.startswith("gating.layers.") and name.endswith("weight"))
        if not weights:
            raise ModelLoadError("there are no gating.layers tensors", remedy="use a mixture-of-objectives checkpoint")
        shapes = [tuple(tensors[name].shape) for name in weights]
        gate = cls(shapes[0][1], shapes[-1][0], width=shapes[0][0], depth=len(shapes) - 1).eval()
        state = {name.removeprefix("gating."): value.float() for name, value in tensors.items() if name.startswith("gating.")}
        if "reward_transform_matrix" in tensors:
            state["transform"] = tensors["reward_transform_matrix"].float()
        state["logit_scale"] = state.get("logit_scale", torch.ones(1)).reshape(1)
        state.setdefault("temperature", gate.temperature)
        try:
            gate.load_state_dict(state)
        except RuntimeError as exc:
            raise ModelLoadError(f"the gating tensors do not fit each other: {exc}", remedy="use an unchanged checkpoint") from exc
        return gate


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
    x, y, out = np.asarray(features, dtype=np.float64), np.asarray(ratings, dtype=np.float64), np.asarray(held_out, dtype=bool)
    weights, chosen, errors, counts = [], [], [], []
    for column in range(y.shape[1]):
        known = ~np.isnan(y[:, column])
        train, test = known & ~out, known & out
        if not train.any() or not test.any():
            raise ConfigError(
                f"objective {column} has {train.sum()} ratings to fit and {test.sum()} to choose the penalty by; the rule is one of each",
                remedy="leave it out, or give more rated rows",
            )
        values, vectors = np.linalg.eigh(x[train].T @ x[train])
        projected = vectors.T @ (x[train].T @ y[train, column])
        candidates = [vectors @ (projected / (np.maximum(values, 0.0) + alpha)) for alpha in alphas]
        mse = [float(np.mean((x[test] @ w - y[test, column]) ** 2)) for w in candidates]
        best = int(np.argmin(mse))
        weights.append(candidates[best])
        chosen.append(float(alphas[best]))
        errors.append(mse[best])
        counts.append(int(known.sum()))
    return RidgeFit(np.stack(weights), tuple(chosen), tuple(errors), tuple(counts))


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
) -> list[float]:
    """Train the gate with the Bradley-Terry loss of the debiased score; returns the loss of every step.

    AdamW without decay, cosine to zero. The transform is applied in training as in scoring (the released script leaves it out in training).

    Args:
        prompts: [P, H] hidden state of the prompt of each pair.
        better, worse: [P, A] rewards of the objectives.
    """
    optimizer = torch.optim.AdamW(gate.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    gate.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global generator
        for _ in range(steps):
            chosen = torch.randint(len(prompts), (min(batch_size, len(prompts)),), generator=generator)
            # One forward for both: the same prompt must see the same dropout.
            weights = gate.coefficients(prompts[chosen])
            gap = (weights * ((better[chosen] - worse[chosen]) @ gate.transform)).sum(dim=-1)
            loss = softplus(-gap).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    gate.eval()
    return losses
