"""The commands' work: prepare -> train -> export -> evaluate in one process, each step callable alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from rayward import storage
from rayward.cluster import connect
from rayward.config import Config, DataConfig, ScoringConfig, dump_config
from rayward.errors import ConfigError, RaywardError

if TYPE_CHECKING:
    from rayward.data.manifest import PreparedData
    from rayward.evaluation.results import Evaluation
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
        judged = evaluate_pipeline(str(output), [prepared.directory], f"{output}-evaluation", data_config=config.data, gpus_per_scorer=gpus)
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
    )
    print_table(result)
    console.print(f"evaluation: {output}/report.html\nplots: {output}/plots")
    return result


def score_lines(model: str, lines: Iterable[str], *, device: str, tokens_per_batch: int, verify: bool) -> Iterator[dict[str, Any]]:
    """Score JSON lines with the scorer that serving uses; a line that is no valid item gets an error of its own."""
    from rayward.scoring.rules import Limits, parse_request
    from rayward.scoring.scorer import Scorer

    scorer = Scorer.load(model, device=cast(Any, device), tokens_per_batch=tokens_per_batch, verify=verify)
    limits = Limits.of(ScoringConfig())
    for line in lines:
        if not line.strip():
            continue
        try:
            (item,), _ = parse_request(f'{{"items": [{line}]}}'.encode("utf-8", errors="surrogatepass"), limits)
        except RaywardError as exc:
            yield {"error": {"code": "invalid_item", "message": exc.problem}}
            continue
        (result,) = scorer.score([item])
        if result.error is not None:
            yield {"error": {"code": result.error.code, "message": result.error.message}}
        else:
            yield {"rewards": result.rewards}


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
