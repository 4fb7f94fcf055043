"""`rayward normalise`: a model with the statistics of a reference set, as a new directory beside the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rayward import storage
from rayward.config.placement import Placement
from rayward.config.scoring import ScoringConfig
from rayward.errors import DataError
from rayward.scoring.lines import chunks, numbered, read_lines
from rayward.scoring.moments import Moments
from rayward.wire.items import ItemResult
from rayward.workflows.score import STREAM, Inputs, ScoreOptions, check, find_inputs, run_scores, scored_files, scored_lines

if TYPE_CHECKING:
    from rayward.contract.contract import Normaliser


def default_output(model: str) -> Path:
    """`<MODEL>-normalised`, beside the model."""
    path = Path(os.path.abspath(model))
    return path.with_name(f"{path.name}-normalised")


def normalise_files(model: str, options: ScoreOptions, *, output: Path, placement: Placement = Placement()) -> Normaliser:
    """As `normalise_pipeline`, for files (or `-`, JSON lines of standard input). Several scorers are a job on Ray, which the same call
    continues.

    Args:
        options: the items and how they are read.

    Raises: as `normalise_pipeline`, and as `workflows.score.score_pipeline`.
    """
    items = options.items
    check(options, Placement())
    if items == (STREAM,):
        lines = read_lines(sys.stdin.buffer, ScoringConfig().max_body_bytes)
        return normalise_pipeline(model, lines, output=output, reference="standard input", placement=placement)
    reference = ", ".join(Path(name).name for name in items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
    work = storage.absolute(f"{output}.scores")
    inputs = find_inputs(options, download_to=f"{work}.downloads")
    if placement.actors == 1 and placement.gpus_per_actor == 0:
        return _normalise(model, output, reference, lambda: _moments(_of_files(model, inputs, placement)))
    return _normalise(model, output, reference, lambda: _moments_of_job(model, inputs, work, options, placement))


def _moments_of_job(model: str, inputs: Inputs, work: str, options: ScoreOptions, placement: Placement) -> Moments:
    done = run_scores(model, inputs, work, options, placement=placement)
    for example in done.examples.values():
        raise DataError(f"{sum(done.errors.values())} items have no reward, for example {example}", remedy="correct or remove them")
    storage.delete_dir(*storage.resolve(work))
    return done.rewards


def normalise_pipeline(
    model: str, items: Iterable[str | bytes], *, output: Path, reference: str, placement: Placement = Placement()
) -> Normaliser:
    """Write the model again with mean and deviation of the rewards of a reference set; its version stays.

    Args:
        items: JSON lines; none of them is kept.
        output: a directory that does not exist yet. `model` does not change, nor do its servers.

    Raises:
        ConfigError: `output` exists.
        ContractError: `model` has no contract to put them in.
        DataError: a line has no reward, or fewer than two are left.
    """
    return _normalise(model, output, reference, lambda: _moments(_of_lines(model, items, reference, placement)))


def _of_files(model: str, inputs: Inputs, placement: Placement) -> Iterator[tuple[str, ItemResult]]:
    from rayward.scoring.load import load_scored_model

    for file, (rows, results) in scored_files(load_scored_model(model, placement), inputs):
        yield from ((f"{file.uri} row {row.number}", result) for row, result in zip(rows, results, strict=True))


def _of_lines(model: str, items: Iterable[str | bytes], reference: str, placement: Placement) -> Iterator[tuple[str, ItemResult]]:
    from rayward.scoring.load import load_scored_model

    for scored in scored_lines(load_scored_model(model, placement), chunks(numbered(items))):
        yield from ((f"item {line.number} of {reference}", line.result) for line in scored)


def _moments(results: Iterable[tuple[str, ItemResult]]) -> Moments:
    def rewards() -> Iterator[float]:
        for where, result in results:
            if result.rewards is None:
                assert result.error is not None
                raise DataError(f"{where} has no reward: {result.error.message}", remedy="correct or remove it")
            yield from result.rewards

    return Moments.of(rewards())


def _normalise(model: str, output: Path, reference: str, measure: Callable[[], Moments]) -> Normaliser:
    from rayward.artifacts.staging import staged
    from rayward.artifacts.writer import ModelWriter
    from rayward.contract.contract import Contract
    from rayward.scoring.combining import rule_kind

    source = Path(model)
    kind = rule_kind(source)
    stored = Contract.load(source) if kind is None else kind.load(source).moved(source, output)
    with staged(output, replace=False) as directory:
        normaliser = normaliser_of(measure(), reference)
        revised = stored.model_copy(update={"normaliser": normaliser})
        if isinstance(revised, Contract):
            ModelWriter(directory).finish_revision(source, revised)
        else:
            revised.save(directory)
    return normaliser


def normaliser_of(rewards: Moments, reference: str) -> Normaliser:
    """Mean and population deviation of rewards.

    Raises:
        DataError: there are no two different ones.
    """
    from rayward.contract.contract import Normaliser

    if not rewards.deviation > 0:
        raise DataError(
            f"{reference} gives {rewards.count} rewards without spread; the rule is two different ones", remedy="use a larger reference set"
        )
    return Normaliser(mean=rewards.mean, std=rewards.deviation, num_rewards=rewards.count, reference=reference)


def normaliser_of_evaluation(evaluation: Path) -> Normaliser | None:
    """Statistics of the held-out completions, or None where they have no spread.

    Bradley-Terry rewards have no zero of their own: every trained model leaves with one.
    """
    from rayward.evaluation.run import SCORES_FILE, read_scores

    rewards = [reward for record in read_scores(evaluation / SCORES_FILE) for reward in record.rewards or ()]
    return normaliser_of(Moments.of(rewards), "completions of the held-out rows") if len(set(rewards)) > 1 else None
