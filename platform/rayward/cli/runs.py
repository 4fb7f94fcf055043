"""Commands that make a model out of data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayward.cli.options import Device, Settings, Temperature, TokensPerBatch, app, asked, load, placed
from rayward.errors import ConfigError


@app.command()
def train(
    settings: Settings = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Export directory [default: <run>/export].")] = None,
    evaluation: Annotated[bool, typer.Option(help="Evaluate the export on the held-out rows.")] = True,
    publish: Annotated[str | None, typer.Option(help="Base URL of a running service: publish the export to it at the end.")] = None,
    publish_as: Annotated[str | None, typer.Option(help="Name of the model there [default: run.name].")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with a key of scope admin for --publish [default: RAYWARD_API_KEY].")] = None,
) -> None:
    """Prepare, train, export and evaluate; the same command continues an interrupted run. Without settings: the demo."""
    if publish is None and (publish_as is not None or key_file is not None):
        raise ConfigError("--publish-as and --key-file are for --publish, which is not given", remedy="add --publish URL")
    if not settings:
        from rayward.demo.settings import demo_settings

        settings = demo_settings()
    resolved = load(settings)
    from rayward.workflows.train import train_pipeline

    publication = None
    if publish is not None:
        from rayward.workflows.publish import Publication, Service

        publication = Publication(Service(publish, key_file), publish_as or resolved.run.name)
    train_pipeline(resolved, export_to=export_to, evaluation=evaluation, publication=publication)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    settings: Settings = None,
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step number.")] = "last",
) -> None:
    """Write a committed checkpoint of a run as a Transformers model with its scoring contract."""
    resolved = load(settings)
    from rayward.workflows.export import export_pipeline

    typer.echo(f"model: {export_pipeline(resolved, output, which=checkpoint)}")


@app.command()
def mixture(settings: Settings = None) -> None:
    """Mixture of objectives on a frozen reward model (ArmoRM): ridge regression to ratings, then a gate on the prompt."""
    from rayward.config.load import load_config
    from rayward.config.mixture import MixtureConfig

    given = settings or []
    resolved = load_config([s for s in given if "=" not in s], [s for s in given if "=" in s], schema=MixtureConfig)
    from rayward.workflows.mixture import fit_mixture

    typer.echo(f"model: {fit_mixture(resolved)}")


@app.command()
def critique(
    model: Annotated[str, typer.Argument(help="Exported model that writes critiques.")],
    output: Annotated[str, typer.Argument(help="Directory for train.jsonl, validation.jsonl and the cache.")],
    settings: Settings = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampled texts.")] = 0,
    device: Device = "auto",
    writers: Annotated[int, typer.Option(min=1, help="Actors side by side.")] = 1,
    gpus_per_writer: Annotated[float, typer.Option(min=0, help="GPUs that each actor reserves.")] = 0.0,
    tokens_per_batch: TokensPerBatch = 8192,
) -> None:
    """Write a model's own critiques of the data that the settings name; the same command continues an interrupted one."""
    placement = placed(device=device, actors=writers, gpus_per_actor=gpus_per_writer, tokens_per_batch=tokens_per_batch)
    asked(temperature=temperature)
    resolved = load(settings)
    from rayward.workflows.critique import Sampling, write_critiques

    counts = write_critiques(model, output, resolved, sampling=Sampling(temperature, seed), placement=placement)
    for split, (written, left_out) in counts.items():
        typer.echo(f"{split}: {written} rows with critiques, {left_out} left out for want of room or text: {output}/{split}.jsonl")
