"""The commands' work: prepare -> train -> export -> evaluate in one process, each step callable alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from rayward import storage
from rayward.cluster import connect
from rayward.config import Config, DataConfig, ScoringConfig, dump_config
from rayward.errors import ConfigError, DataError, RaywardError

if TYPE_CHECKING:
    from rayward.contract import Normaliser
    from rayward.data.manifest import PreparedData
    from rayward.evaluation.benchmarks import Benchmark
    from rayward.evaluation.results import Evaluation
    from rayward.section import Normalise
    from rayward.training.trainer import TrainResult

console = Console(soft_wrap=True)


def train_pipeline(config: Config, *, export_to: Path | None, evaluation: bool) -> TrainResult:
    """Prepare, train, export, verify the export, evaluate it and write its card; print where everything lies."""
    output = export_to or _default_export(config)
    from rayward.data.prepare import prepare
    from rayward.training.trainer import train

    prepared = prepare(config)
    connect()
    manifest = prepared.manifest
    console.print(f"data: {manifest.num_train} train, {manifest.num_validation} validation rows; report {prepared.directory}/report.html")
    result = train(config, prepared)
    _export_and_verify(config, result, output)
    judged = None
    if evaluation and manifest.num_validation:
        gpus = min(config.training.gpus_per_worker, 1.0)
        folder = f"{output}-evaluation"
        judged = evaluate_pipeline(str(output), [prepared.directory], folder, data_config=config.data, gpus_per_scorer=gpus)
        _normalise_by_evaluation(output, Path(folder))
    _write_card(config, prepared, output, judged)
    console.print(f"model: {output}\nmetrics: {result.location}/metrics.jsonl\nmodel card: {output}/README.md")
    return result


def export_pipeline(config: Config, output: Path, *, which: str) -> Path:
    """Export one checkpoint of an existing run."""
    from rayward.data.prepare import prepare
    from rayward.training.export import choose_checkpoint
    from rayward.training.trainer import TrainResult, resolve_job

    prepared = prepare(config)
    job, _ = resolve_job(config, prepared)
    checkpoint = choose_checkpoint(job.store, which)
    _export_and_verify(config, TrainResult(job.location, prepared, job, checkpoint), output)
    _write_card(config, prepared, output, None)
    return output


def evaluate_pipeline(
    model: str,
    data: Sequence[str],
    output: str,
    *,
    data_config: DataConfig,
    device: str = "auto",
    scorers: int = 1,
    gpus_per_scorer: float = 0.0,
    tokens_per_batch: int = 8192,
    verify: bool = True,
    weights: str | None = None,
    benchmark: Benchmark | None = None,
    n_critiques: int = 1,
    temperature: float = 0.0,
) -> Evaluation:
    """Evaluate a model on raw files or on one prepared directory and print the table."""
    connect()
    from rayward.data.manifest import MANIFEST_FILE
    from rayward.evaluation.evaluate import evaluate
    from rayward.evaluation.report import print_table

    prepared = data[0] if len(data) == 1 and (Path(data[0]) / MANIFEST_FILE).is_file() else None
    result = evaluate(
        model=model,
        output=output,
        data=None if prepared else data,
        prepared=prepared,
        data_config=data_config,
        device=cast(Any, device),
        concurrency=scorers,
        gpus_per_actor=gpus_per_scorer,
        tokens_per_batch=tokens_per_batch,
        verify=verify,
        weights=weights,
        benchmark=benchmark,
        n_critiques=n_critiques,
        temperature=temperature,
    )
    print_table(result)
    console.print(f"evaluation: {output}/report.html\nplots: {output}/plots")
    return result


def score_lines(
    model: str,
    lines: Iterable[str],
    *,
    device: str,
    tokens_per_batch: int,
    verify: bool,
    weights: str | None = None,
    normalise: Normalise = "raw",
    n_critiques: int = 1,
    temperature: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Score JSON lines with the scorer that serving uses; a line that is no valid item gets an error of its own."""
    from rayward.scoring.loading import load_scored_model
    from rayward.scoring.rules import Limits, parse_request

    scorer = load_scored_model(model, device=cast(Any, device), tokens_per_batch=tokens_per_batch, verify=verify)
    limits = Limits.of(ScoringConfig())
    for line in lines:
        if not line.strip():
            continue
        try:
            (item,), _ = parse_request(f'{{"items": [{line}]}}'.encode("utf-8", errors="surrogatepass"), limits)
        except RaywardError as exc:
            yield {"error": {"code": "invalid_item", "message": exc.problem}}
            continue
        asked = replace(item, weights=weights, normalise=normalise, n_critiques=n_critiques, temperature=temperature)
        (result,) = scorer.score([asked])
        if result.error is not None:
            yield {"error": {"code": result.error.code, "message": result.error.message}}
            continue
        outputs = result.outputs and [dict(zip(scorer.facts.outputs, row, strict=True)) for row in result.outputs]
        found = {"outputs": outputs, "steps": result.steps, "critiques": result.critiques, "reward_std": result.reward_std}
        yield {"rewards": result.rewards, **{name: value for name, value in found.items() if value is not None}}


def normalise_pipeline(model: str, items: Iterable[str], *, reference: str, device: str, tokens_per_batch: int) -> Normaliser:
    """Mean and deviation of the rewards of a reference set, stored in the model's contract (the model's version stays).

    Raises:
        DataError: a line has no reward, or fewer than two are left.
    """
    rewards: list[float] = []
    for number, result in enumerate(score_lines(model, items, device=device, tokens_per_batch=tokens_per_batch, verify=True), 1):
        if "error" in result:
            raise DataError(f"item {number} of {reference} has no reward: {result['error']['message']}", remedy="correct or remove it")
        rewards += result["rewards"]
    return _store_normaliser(Path(model), rewards, reference)


def merge_pipeline(output: Path, models: Sequence[str], weights: Sequence[float]) -> Path:
    """Merge exported models, recompute the golden scores with the merged one, and verify it."""
    from rayward.contract import Contract
    from rayward.model.merge import merge
    from rayward.scoring.scorer import Scorer

    golden = Contract.load(Path(models[-1])).golden
    contract = merge([Path(model) for model in models], list(weights), output)
    rescored = Scorer.load(output, verify=False).golden_scores(golden)
    contract.model_copy(update={"golden": rescored}).save(output)
    Scorer.load(output, verify=True)
    return output


def _store_normaliser(model: Path, rewards: Sequence[float], reference: str) -> Normaliser:
    from rayward.contract import Contract, Normaliser
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


def _default_export(config: Config) -> Path:
    location = storage.join(storage.absolute(config.run.storage_path), config.run.name)
    if "://" in location:
        raise ConfigError(
            f"run.storage_path is {config.run.storage_path}; an export is written to a local directory and none is named",
            remedy="name one with --export DIRECTORY",
        )
    return Path(location) / "export"


def _export_and_verify(config: Config, result: TrainResult, output: Path) -> None:
    from rayward.scoring.scorer import Scorer
    from rayward.training.export import export

    contract = export(config, result.prepared, result.checkpoint, result.job.store, output)
    Scorer.load(str(output), verify=True)
    console.print(f"exported step {result.checkpoint.commit.step}; {len(contract.golden)} golden scores of the training forward agree")


def _normalise_by_evaluation(model: Path, evaluation: Path) -> None:
    # Bradley-Terry rewards have no zero of their own: every trained model leaves with statistics of its held-out completions.
    from rayward.evaluation.evaluate import SCORES_FILE, read_scores

    rewards = [reward for record in read_scores(evaluation / SCORES_FILE) for reward in record.rewards or ()]
    if len(set(rewards)) > 1:
        _store_normaliser(model, rewards, "completions of the held-out rows")


def _write_card(config: Config, prepared: PreparedData, output: Path, evaluation: Evaluation | None) -> None:
    from rayward.contract import Contract
    from rayward.evaluation.model_card import write_model_card

    plots = sorted(Path(f"{output}-evaluation", "plots").glob("*.png")) if evaluation is not None else []
    write_model_card(
        output,
        contract=Contract.load(output),
        config_json=dump_config(config),
        manifest=json.loads(prepared.manifest.model_dump_json()),
        evaluation=evaluation,
        plots=plots,
    )
