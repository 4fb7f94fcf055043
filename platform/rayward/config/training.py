"""The `training:`, `checkpoint:` and `tracking:` blocks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rayward.schema import Frozen


class TrainingConfig(Frozen):
    num_workers: int | tuple[int, int] = 1
    """Train workers: a number, or [min, max] for elastic training."""
    comparisons_per_step: int = Field(64, ge=1)
    """Comparisons in one optimizer step, over all workers."""
    tokens_per_microbatch: int = Field(4096, ge=8)
    """Token budget of one forward and backward on one worker; shared prefixes count once."""
    num_epochs: int = Field(1, ge=1)
    """More than one over-fits reward models (arXiv 2203.02155, 2307.09288): a warning is printed."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps; the schedule ends there too."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.03, ge=0.0, le=1.0)
    """Share of the steps with linear warm-up."""
    min_lr_fraction: float = Field(0.1, ge=0.0, le=1.0)
    """The cosine ends at this share of `learning_rate`."""
    weight_decay: float = Field(0.1, ge=0.0)
    """For matrices only; biases, norms and embeddings' one-dimensional parameters do not decay."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """AdamW decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """AdamW decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0.0)
    """AdamW term added to the root of the second moment."""
    clip_norm: float = Field(1.0, gt=0.0)
    """Global gradient norm is clipped to this."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant)."""
    router_coefficient: float = Field(0.0, ge=0.0)
    """Of mixtures of experts: adds this times the load-balancing loss of the routers over all tokens of the step (arXiv 2101.03961;
    OpenRLHF's `aux_loss_coef`). Above 0 every step costs one more forward."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain single-worker engine, for comparison and tests."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between two metric lines."""
    evaluate_every_steps: int | None = Field(None, ge=1)
    """Steps between two validations; None: only at the end."""
    max_failures: int = Field(3, ge=-1)
    """Worker-group failures tolerated before the run is given up; -1: any number."""
    cpus_per_worker: float = Field(0.5, gt=0.0)
    """Logical CPUs that Ray reserves for a worker (not threads); at least one must be left for the data stream."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """0 trains on CPU in fp32; 1 or more trains on CUDA in bf16."""
    threads_per_worker: int = Field(1, ge=1)
    """OMP_NUM_THREADS of every worker."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        low, high = self.worker_range
        if low < 1 or high < low:
            raise ValueError(f"training.num_workers is {self.num_workers}; the rule is 1 <= min <= max; correct the range")
        if self.engine == "torch" and high > 1:
            raise ValueError(f"training.engine is torch with {high} workers; the plain engine runs on one; use engine: deepspeed")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers


class CheckpointConfig(Frozen):
    every_steps: int = Field(100, ge=1)
    """Optimizer steps between two committed checkpoints; the last step is always committed."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; the one with the best validation accuracy is kept besides."""


class TrackingConfig(Frozen):
    tensorboard: bool = True
    """Write TensorBoard events beside the JSON lines."""
