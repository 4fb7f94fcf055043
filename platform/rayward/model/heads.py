"""Heads: what turns the pooled hidden state into outputs, always in fp32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear


class LinearHead(nn.Linear):
    """Linear map computed in fp32 whatever the backbone's type (bf16 rewards tie: METHODS of every peer suffer from it).

    Stored under the name `score`, so that the export is a plain Transformers sequence-classification model.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, hidden] -> float32 [N, outputs]."""
        bias = None if self.bias is None else self.bias.float()
        return linear(input.float(), self.weight.float(), bias)
