"""The training loop: next share -> micro-batches -> step -> report. No Ray in here.

Loss and metrics are sums divided by global counts, so neither the number of workers nor the micro-batch budget changes
the trajectory beyond floating-point summation order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rayward.batch.layout import LanguageLossTokens, PackedBatch
from rayward.data.stream.shares import StepShare
from rayward.errors import NonFiniteError, StreamOrderError
from rayward.model.routers import expert_load
from rayward.objectives.sums import METRIC_SUMS, ranking_metrics
from rayward.objectives.table import Objective
from rayward.training.engines.protocol import Engine

NUM_IDS_IN_MESSAGE = 8


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then cosine to a floor; a pure function of the step."""

    learning_rate: float
    total_steps: int
    warmup_fraction: float
    min_lr_fraction: float

    def at(self, step: int) -> float:
        """Learning rate of the 0-based optimizer step; the last step has the floor."""
        warmup = math.ceil(self.warmup_fraction * self.total_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup + 1) / max(1, self.total_steps - warmup)
        floor = self.min_lr_fraction
        return self.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True, slots=True)
class _Losses:
    """Loss sums of a micro-batch: of the objective, of the language-loss tokens, and of the routers."""

    reward: torch.Tensor
    language: torch.Tensor
    router: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Counts:
    """What the loss sums of a step are divided by."""

    reward: float
    language: float

    @classmethod
    def of(cls, totals: torch.Tensor) -> _Counts:
        reward, language = totals.tolist()
        return cls(reward if reward > 0 else 1.0, language if language > 0 else 1.0)


@dataclass(slots=True)
class _Sums:
    """Local sums of one step, reduced over ranks in one collective."""

    values: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> _Sums:
        return cls(torch.zeros(7 + len(METRIC_SUMS), dtype=torch.float64, device=device))

    def add(self, batch: PackedBatch, losses: _Losses, metrics: torch.Tensor) -> None:
        counts = [
            len(batch.comparisons),
            batch.num_computed_tokens if batch.comparisons else 0,
            batch.num_real_tokens,
            sum(c.num_tokens_unshared for c in batch.comparisons),
        ]
        head = torch.tensor(counts, dtype=torch.float64, device=self.values.device)
        sums = torch.stack([value.detach().double() for value in (losses.reward, losses.language, losses.router)])
        self.values += torch.cat([sums, head, metrics.to(self.values.device)])

    def named(self, counts: _Counts, coefficient: float, router_coefficient: float = 0.0) -> dict[str, float]:
        reward, language, router, comparisons, computed, real, unshared, *ranking = self.values.tolist()
        loss, parts = reward / counts.reward, dict[str, float]()
        if coefficient:
            parts["language_loss"] = language / counts.language
        if router_coefficient:
            parts["router_loss"] = router
        named = {"loss": loss + coefficient * language / counts.language + router_coefficient * router}
        if parts:
            named |= {"reward_loss": loss, **parts}
        return {
            **named,
            **ranking_metrics(ranking),
            "comparisons": comparisons,
            "tokens": real,
            "padding_fraction": 1.0 - real / max(computed, 1.0),
            "tokens_saved_fraction": 1.0 - real / max(unshared, 1.0),
        }


def _counts(batch: PackedBatch, tokens: LanguageLossTokens | None, objective: Objective) -> torch.Tensor:
    weights = 0.0 if tokens is None else float(tokens.weight.sum(dtype="float64"))
    return torch.tensor([objective.count(batch.labels), weights], dtype=torch.float64)


def _losses(
    engine: Engine, batch: PackedBatch, tokens: LanguageLossTokens | None, objective: Objective, load: torch.Tensor | None = None
) -> tuple[_Losses, torch.Tensor]:
    language = router = torch.zeros((), device=engine.device)
    if load is not None:
        outputs, language, routing = engine.forward_with_routing(batch, tokens)
        router = (load * routing[1]).sum()
    elif tokens is None:
        outputs = engine.forward(batch)
    else:
        outputs, language = engine.forward_with_language_loss(batch, tokens)
    out = objective.loss(outputs, batch.labels)
    return _Losses(out.loss_sum, language, router), out.metrics


def _expert_load(engine: Engine, batches: Sequence[PackedBatch]) -> torch.Tensor:
    # The loss is a product of two means over the step: one of them must be known before the first backward.
    with torch.no_grad():
        sums = torch.stack([engine.forward_with_routing(batch, None)[2].double() for batch in batches]).sum(dim=0)
    return expert_load(engine.all_reduce(sums))


def train_step(
    engine: Engine, share: StepShare, objective: Objective, learning_rate: float, *, router_coefficient: float = 0.0
) -> dict[str, float]:
    """One optimizer step on this rank's share; called by all ranks together.

    Args:
        router_coefficient: of the routers' load-balancing loss, which is that of the whole step whatever its micro-batches and ranks.

    Returns:
        metrics over the whole step, the same on every rank.

    Raises:
        NonFiniteError: on every rank, when a loss or gradient of any rank is NaN or Inf. The weights in memory must not
            be saved afterwards.
    """
    batches, coefficient = (
        [(batch, objective.language_tokens(batch)) for batch in share.microbatches],
        objective.config.language_coefficient,
    )
    local = sum((_counts(*each, objective) for each in batches), torch.zeros(2, dtype=torch.float64))
    counts = _Counts.of(engine.all_reduce(local))
    load = _expert_load(engine, share.microbatches) if router_coefficient else None
    sums = _Sums.zeros(engine.device)
    totals = []
    last = len(batches) - 1
    for index, (batch, tokens) in enumerate(batches):
        losses, metrics = _losses(engine, batch, tokens, objective, load)
        loss = losses.reward / counts.reward
        if coefficient:
            loss = loss + coefficient * losses.language / counts.language
        if load is not None:
            loss = loss + router_coefficient * losses.router
        engine.backward(loss, is_last=index == last)
        totals.append(loss.detach())
        sums.add(batch, losses, metrics)
    sums.values = engine.all_reduce(sums.values)
    if not torch.isfinite(sums.values[:3]).all():
        judged = zip(share.microbatches, totals, strict=True)
        suspects = [c.id for batch, loss in judged if not torch.isfinite(loss) for c in batch.comparisons]
        raise _non_finite(engine, "loss", share.step, suspects)
    norm = engine.step(learning_rate)
    if not math.isfinite(norm):
        raise _non_finite(engine, "gradient", share.step, list(share.comparison_ids))
    return {**sums.named(counts, coefficient, router_coefficient), "gradient_norm": norm, "learning_rate": learning_rate}


def _non_finite(engine: Engine, what: str, step: int, suspects: list[str]) -> NonFiniteError:
    ids = [name for per_rank in engine.all_gather_object(suspects) for name in per_rank]
    shown = ", ".join(ids[:NUM_IDS_IN_MESSAGE]) + (f" and {len(ids) - NUM_IDS_IN_MESSAGE} more" if len(ids) > NUM_IDS_IN_MESSAGE else "")
    return NonFiniteError(
        f"the {what} of step {step} is not finite; comparisons in the micro-batches concerned: {shown}",
        remedy="the last checkpoint is good: lower training.learning_rate, raise training.warmup_fraction, or look at these rows",
        step=step,
        comparison_ids=tuple(ids),
    )


@torch.no_grad()
def validate(engine: Engine, shares: Iterable[StepShare], objective: Objective) -> dict[str, float]:
    """Loss and ranking metrics over all validation comparisons, the same on every rank."""
    sums = _Sums.zeros(engine.device)
    local = torch.zeros(2, dtype=torch.float64)
    for share in shares:
        for batch in share.microbatches:
            tokens = objective.language_tokens(batch)
            sums.add(batch, *_losses(engine, batch, tokens, objective))
            local += _counts(batch, tokens, objective)
    sums.values = engine.all_reduce(sums.values)
    named = sums.named(_Counts.of(engine.all_reduce(local)), objective.config.language_coefficient)
    return {key: value for key, value in named.items() if key not in ("tokens", "padding_fraction", "tokens_saved_fraction")}


StepCallback = Callable[[int, dict[str, float]], None]


def run_steps(
    engine: Engine,
    shares: Iterator[StepShare],
    *,
    objective: Objective,
    schedule: Schedule,
    first_step: int,
    stop_step: int,
    on_step: StepCallback,
    epoch_start: int = 0,
    router_coefficient: float = 0.0,
) -> None:
    """Train on the shares of steps first_step .. stop_step - 1, in order.

    Args:
        on_step: called on every rank after each step with (steps done, metrics).
        epoch_start: step that the epoch began with; the stream of an epoch counts its steps from 0.
        router_coefficient: as for `train_step`.

    Raises:
        StreamOrderError: a share is not the one that is due, or the stream ends early.
        NonFiniteError: see `train_step`.
    """
    for step in range(first_step, stop_step):
        started = time.perf_counter()
        share = next(shares, None)
        waited_s = time.perf_counter() - started
        found = None if share is None else (epoch_start + share.step, share.rank, share.world_size)
        if share is None or found != (step, engine.data_parallel_rank, engine.data_parallel_size):
            raise StreamOrderError(
                f"data-parallel rank {engine.data_parallel_rank} of {engine.data_parallel_size} waits for step {step} "
                f"and the stream has {found or 'ended'}",
                remedy="the run restarts from its last checkpoint; if it happens again, report it with the Ray version",
            )
        metrics = train_step(engine, share, objective, schedule.at(step), router_coefficient=router_coefficient)
        elapsed_s = time.perf_counter() - started
        on_step(
            step + 1,
            {
                **metrics,
                "step_s": elapsed_s,
                "data_wait_s": waited_s,
                "tokens_per_s": metrics["tokens"] / elapsed_s,
                "comparisons_per_s": metrics["comparisons"] / elapsed_s,
            },
        )
