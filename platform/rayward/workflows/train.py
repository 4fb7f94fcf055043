"""`rayward train`: prepare, train, export, verify, evaluate in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayward.cluster import connect
from rayward.config.placement import Placement
from rayward.config.run import Config
from rayward.workflows.console import console
from rayward.workflows.evaluate import evaluate_pipeline
from rayward.workflows.export import default_export, export_result, write_card
from rayward.workflows.normalise import normaliser_of_evaluation

if TYPE_CHECKING:
    from rayward.data.prepared import PreparedData
    from rayward.evaluation.records import Evaluation
    from rayward.training.trainer import TrainResult
    from rayward.workflows.publish import Publication


def train_pipeline(config: Config, *, export_to: Path | None, evaluation: bool, publication: Publication | None = None) -> TrainResult:
    """Prepare, train, export, verify the export, evaluate it and write its card; print where everything lies.

    Args:
        publication: where the export is published at the end; that the service would take it is asked before anything is trained.
    """
    output = export_to or default_export(config)
    if publication is not None:
        publication.check()
    from rayward.data.prepare.job import prepare
    from rayward.training.trainer import train

    prepared = prepare(config)
    connect()
    manifest = prepared.manifest
    console.print(f"data: {manifest.num_train} train, {manifest.num_validation} validation rows; report {prepared.directory}/report.html")
    for line in manifest.told_unused():
        console.print(line, markup=False)
    result = train(config, prepared)
    export_result(config, result, output)
    if evaluation and manifest.num_validation:
        placement = Placement(gpus_per_actor=min(config.training.gpus_per_worker, 1.0))
        folder = f"{output}-evaluation"
        judged = evaluate_pipeline(str(output), [prepared.directory], folder, data_config=config.data, placement=placement)
        publish_evaluated(config, prepared, output, judged, Path(folder))
    console.print(f"model: {output}\nmetrics: {result.location}/metrics.jsonl\nmodel card: {output}/README.md")
    if publication is not None:
        version = publication.publish(output)
        console.print(
            f"published: version {version} of {publication.model} at {publication.service.url}, ready to be promoted", markup=False
        )
    return result


def publish_evaluated(config: Config, prepared: PreparedData, output: Path, evaluation: Evaluation, folder: Path) -> None:
    """The export once more, with what its evaluation showed in contract and card; it takes the place of the first as a whole."""
    from rayward.artifacts.writer import new_model
    from rayward.contract.contract import Contract

    contract = Contract.load(output).model_copy(update={"normaliser": normaliser_of_evaluation(folder)})
    with new_model(output, replace=True) as writer:
        writer.finish_revision(output, contract)
        write_card(config, prepared, writer.directory, contract, evaluation, plots=folder / "plots")
