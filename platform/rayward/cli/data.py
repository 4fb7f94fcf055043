"""Commands for data and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayward.cli.options import ReadAs, Settings, app, load

data_app = typer.Typer(no_args_is_help=True, help="Look at data before it is prepared.")
app.add_typer(data_app, name="data")


@app.command()
def config(settings: Settings = None) -> None:
    """Print the fully resolved configuration."""
    from rayward.config.load import dump_config

    typer.echo(dump_config(load(settings)))


@app.command()
def prepare(settings: Settings = None) -> None:
    """Read, check, split and tokenize preference data; report what is wrong with it."""
    resolved = load(settings)
    from rayward.data.prepare.job import prepare as run

    prepared = run(resolved)
    manifest = prepared.manifest
    quarantined = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.num_quarantined.items())) or "none"
    used = f"{manifest.num_train} train + {manifest.num_validation} validation"
    used += f" + {manifest.num_merged} merged into them" if manifest.num_merged else ""
    used += f" - {manifest.num_repeated} repeated" if manifest.num_repeated else ""
    typer.echo(f"rows: {manifest.num_input_rows} = {used} + quarantined ({quarantined})")
    if resolved.data.group_pairs:
        grouping = manifest.grouping
        typer.echo(f"groups: {grouping.groups} of {grouping.joined} rows; left as rows: {grouping.left() or 'none'}")
    for line in manifest.told_unused():
        typer.echo(line)
    typer.echo(f"prepared data: {prepared.directory}\nreport: {prepared.directory}/report.html")


@data_app.command()
def describe(
    path: Annotated[str, typer.Argument(help="File, glob, directory or URI.")],
    settings: ReadAs = None,
    tokenizer: Annotated[str | None, typer.Option(help="Directory or hub name: rows are shown as tokens, too.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest conversation.")] = 2048,
) -> None:
    """Columns, detected format or why there is none, three rows as they would be trained, and a block for data.sources."""
    from rayward.config.reading import reading_config

    config = reading_config(settings or (), [path])
    from rayward.workflows.describe import describe as run

    for line in run(path, config, tokenizer=tokenizer, max_tokens=max_tokens):
        typer.echo(line)


@app.command("demo-data")
def demo_data(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    train_prompts: Annotated[int, typer.Option(help="Training comparisons.")] = 24_000,
    validation_prompts: Annotated[int, typer.Option(help="Held-out comparisons.")] = 1_000,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
) -> None:
    """Write preference data of a small generated world with a known true reward, and a tokenizer for it."""
    from rayward.demo.files import write_demo

    write_demo(directory, train_prompts, validation_prompts, seed)
    typer.echo(f"wrote {directory}")
