"""`rayward normalise`: a model with the statistics of a reference set, as a new directory beside the model."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayward.config.placement import Placement
from rayward.errors import DataError
from rayward.workflows.score import score_lines

if TYPE_CHECKING:
    from rayward.contract.contract import Normaliser


def default_output(model: str) -> Path:
    """`<MODEL>-normalised`, beside the model."""
    path = Path(os.path.abspath(model))
    return path.with_name(f"{path.name}-normalised")


def normalise_pipeline(model: str, items: Iterable[str], *, output: Path, reference: str, placement: Placement = Placement()) -> Normaliser:
    """Write the model again with mean and deviation of the rewards of a reference set; its version stays.

    Args:
        output: a directory that does not exist yet. `model` does not change, nor do its servers.

    Raises:
        ConfigError: `output` exists.
        ContractError: `model` has no contract to put them in.
        DataError: a line has no reward, or fewer than two are left.
    """
    from rayward.artifacts.staging import staged
    from rayward.artifacts.writer import ModelWriter
    from rayward.contract.contract import Contract
    from rayward.scoring.combining import rule_kind

    source = Path(model)
    kind = rule_kind(source)
    stored = Contract.load(source) if kind is None else kind.load(source).moved(source, output)
    with staged(output, replace=False) as directory:
        rewards: list[float] = []
        for number, result in enumerate(score_lines(model, items, placement=placement), 1):
            if "error" in result:
                raise DataError(f"item {number} of {reference} has no reward: {result['error']['message']}", remedy="correct or remove it")
            rewards += result["rewards"]
        normaliser = normaliser_of(rewards, reference)
        revised = stored.model_copy(update={"normaliser": normaliser})
        if isinstance(revised, Contract):
            ModelWriter(directory).finish_revision(source, revised)
        else:
            revised.save(directory)
    return normaliser


def normaliser_of(rewards: Sequence[float], reference: str) -> Normaliser:
    """Mean and population deviation of rewards.

    Raises:
        DataError: there are no two different ones.
    """
    from rayward.contract.contract import Normaliser

    std = statistics.pstdev(rewards) if rewards else 0.0
    if not std > 0:
        raise DataError(
            f"{reference} gives {len(rewards)} rewards without spread; the rule is two different ones", remedy="use a larger reference set"
        )
    return Normaliser(mean=statistics.fmean(rewards), std=std, num_rewards=len(rewards), reference=reference)


def normaliser_of_evaluation(evaluation: Path) -> Normaliser | None:
    """Statistics of the held-out completions, or None where they have no spread.

    Bradley-Terry rewards have no zero of their own: every trained model leaves with one.
    """
    from rayward.evaluation.run import SCORES_FILE, read_scores

    rewards = [reward for record in read_scores(evaluation / SCORES_FILE) for reward in record.rewards or ()]
    return normaliser_of(rewards, "completions of the held-out rows") if len(set(rewards)) > 1 else None
