"""The configuration of a Serve application."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from rayward.config.placement import Device, HashWeights, Placement
from rayward.schema import Frozen
from rayward.wire.rules import Limits


class ScoringConfig(Frozen):
    """Configuration of one Serve application; the `args:` block of `serve/*.yaml`."""

    model: str = "model"
    """Directory of an exported model (or of any Hugging Face sequence-classification reward model)."""
    model_name: str | None = None
    """Name in replies; default: the last part of `model`."""
    device: Device = "auto"
    """Where a replica computes; `auto` takes CUDA when a replica reserves a GPU."""
    tokens_per_batch: int = Field(8192, ge=64)
    """Token budget of one forward pass over the requests that wait."""
    batch_wait_s: float = Field(0.005, ge=0.0)
    """How long a batch waits for company."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests one replica works on; Serve's default of 5 would cap batching at 5."""
    max_queued_requests: int = Field(2048, ge=1)
    """Requests that may wait; more are refused with 503."""
    min_replicas: int = Field(1, ge=0)
    """Replicas that always run."""
    max_replicas: int = Field(1, ge=1)
    """Replicas at most; more than min_replicas scales with the load."""
    target_ongoing_requests: float = Field(32.0, gt=0.0)
    """Requests per replica that autoscaling aims at."""
    cpus_per_replica: float = Field(1.0, gt=0.0)
    """Logical CPUs that Ray reserves for a replica."""
    gpus_per_replica: float = Field(0.0, ge=0.0)
    """GPUs that Ray reserves for a replica."""
    threads_per_replica: int = Field(1, ge=1)
    """Compute threads of a replica on CPU."""
    max_items_per_request: int = Field(1024, ge=1)
    """More items are refused with 413."""
    max_completions_per_item: int = Field(256, ge=1)
    """More completions of one item are refused with 413."""
    max_chars_per_text: int = Field(200_000, ge=1)
    """A longer prompt turn or completion is refused with 413, before it is tokenized."""
    max_critiques: int = Field(16, ge=1)
    """More `n_critiques` than these are refused with 422."""
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    """A larger request body is refused with 413, before it is parsed."""
    verify_golden: bool = True
    """Check files, head and golden scores against the contract at start and refuse to serve when they differ."""
    hash_weights: HashWeights = "sampled"
    """What the version of a model without contract covers of its weights: sizes, headers and a piece of every tensor, or every byte."""

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; the rule is min <= max")
        return self

    @property
    def placement(self) -> Placement:
        """Where each replica scores; the replicas are Serve's."""
        return Placement(
            device=self.device,
            gpus_per_actor=self.gpus_per_replica,
            tokens_per_batch=self.tokens_per_batch,
            verify=self.verify_golden,
            hash_weights=self.hash_weights,
        )

    @property
    def limits(self) -> Limits:
        """What one request may hold."""
        return Limits(
            max_items=self.max_items_per_request,
            max_completions_per_item=self.max_completions_per_item,
            max_chars_per_text=self.max_chars_per_text,
            max_body_bytes=self.max_body_bytes,
            max_critiques=self.max_critiques,
        )
