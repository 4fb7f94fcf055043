"""`rayward normalise`: statistics of a reference set beside a model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayward.config.placement import Placement
from rayward.errors import DataError
from rayward.workflows.score import score_lines

if TYPE_CHECKING:
    from rayward.contract.contract import Normaliser


def normalise_pipeline(model: str, items: Iterable[str], *, reference: str, placement: Placement = Placement()) -> Normaliser:
    """Mean and deviation of the rewards of a reference set, stored in the model's contract (the model's version stays).

    Raises:
        DataError: a line has no reward, or fewer than two are left.
    """
    rewards: list[float] = []
    for number, result in enumerate(score_lines(model, items, placement=placement), 1):
        if "error" in result:
            raise DataError(f"item {number} of {reference} has no reward: {result['error']['message']}", remedy="correct or remove it")
        rewards += result["rewards"]
    return store_normaliser(Path(model), rewards, reference)


def store_normaliser(model: Path, rewards: Sequence[float], reference: str) -> Normaliser:
    from rayward.contract.contract import Contract, Normaliser
    from rayward.scoring.combining import rule_kind

    std = statistics.pstdev(rewards) if rewards else 0.0
    if not std > 0:
        raise DataError(
            f"{reference} gives {len(rewards)} rewards without spread; the rule is two different ones", remedy="use a larger reference set"
        )
    normaliser = Normaliser(mean=statistics.fmean(rewards), std=std, num_rewards=len(rewards), reference=reference)
    kind = rule_kind(model) or Contract
    kind.load(model).model_copy(update={"normaliser": normaliser}).save(model)
    return normaliser


def normalise_by_evaluation(model: Path, evaluation: Path) -> None:
    # Bradley-Terry rewards have no zero of their own: every trained model leaves with statistics of its held-out completions.
    from rayward.evaluation.run import SCORES_FILE, read_scores

    rewards = [reward for record in read_scores(evaluation / SCORES_FILE) for reward in record.rewards or ()]
    if len(set(rewards)) > 1:
        store_normaliser(model, rewards, "completions of the held-out rows")
