"""The gate of a mixture of objectives: a score from the outputs of a head, by the prompt (ArmoRM, arXiv 2406.12845)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayward.errors import ModelLoadError

GATING_FILE = "gating.safetensors"


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
