"""Where scoring runs: one record from the command line or a configuration down to the actors. Light."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from rayward.schema import Frozen

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
HashWeights: TypeAlias = Literal["sampled", "full"]
"""What is read of weights that came without a contract, to identify them: a piece of every tensor, or every byte."""


class Placement(Frozen):
    """Where and how wide a model scores; what is asked of it is `rayward.wire.items.Asked`."""

    device: Device = "auto"
    """Where each scorer computes; `auto` takes CUDA when the actor reserves a GPU."""
    actors: int = Field(1, ge=1)
    """Copies of the model side by side, each in an actor of its own."""
    gpus_per_actor: float = Field(0.0, ge=0.0)
    """GPUs that each of them reserves."""
    tokens_per_batch: int = Field(8192, ge=64)
    """Token budget of one forward."""
    verify: bool = True
    """Check an export against its contract before it scores."""
    hash_weights: HashWeights = "full"
    """How much of the weights of a model without contract its version covers."""
    batch_invariant: bool = False
    """Bitwise the same reward whatever is scored beside it; slower."""
