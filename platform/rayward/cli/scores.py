"""Commands that score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayward.cli.options import (
    Device,
    NumCritiques,
    ReadAs,
    RowFormat,
    Temperature,
    TokensPerBatch,
    Verify,
    Weights,
    app,
    asked,
    placed,
    read_as,
)
from rayward.errors import ConfigError


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Exported model, or any Hugging Face sequence-classification reward model.")],
    data: Annotated[list[str], typer.Argument(help="Files, globs, directories, URIs, hf: names; or one prepared directory.")],
    output: Annotated[str, typer.Option(help="Directory for scores, metrics, report and plots.")] = "evaluation",
    format: Annotated[str | None, typer.Option(help="Format of raw files [default: auto].")] = None,
    settings: ReadAs = None,
    device: Device = "auto",
    scorers: Annotated[int, typer.Option(min=1, help="Scorers side by side.")] = 1,
    gpus_per_scorer: Annotated[float, typer.Option(min=0, help="GPUs that each scorer reserves.")] = 0.0,
    tokens_per_batch: TokensPerBatch = 8192,
    verify: Verify = True,
    weights: Weights = None,
    attributes: Annotated[str | None, typer.Option(help="Ratings of raw files to keep, with commas between.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="The one that ranks completions without a ranking.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="rewardbench, rewardbench2 or judgebench; see docs/benchmarks.md.")] = None,
    counts: Annotated[str | None, typer.Option(help="Subset weights of rewardbench: fixed, legacy or raw [default: fixed].")] = None,
    n_critiques: NumCritiques = 1,
    temperature: Temperature = 0.0,
) -> None:
    """Held-out accuracy with interval, baselines, calibration and plots."""
    from rayward.config.reading import reading_config
    from rayward.evaluation.suites.table import choose

    if counts is not None and benchmark is None:
        raise ConfigError(f"--counts is {counts!r} and there is no --benchmark", remedy="add --benchmark rewardbench")
    chosen = None if benchmark is None else choose(benchmark, counts)

    kept = attributes.split(",") if attributes else None
    data_config = reading_config(settings or (), data, format=format, attributes=kept, rank_by=rank_by)
    placement = placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch, verify=verify)
    wanted = asked(weights=weights, n_critiques=n_critiques, temperature=temperature)
    from rayward.workflows.evaluate import evaluate_pipeline, prepared_of

    if settings and prepared_of(data) is not None:
        raise ConfigError(f"{data[0]} is prepared data, whose columns are known; --data maps raw files", remedy="leave --data out")
    evaluate_pipeline(model, data, output, data_config=data_config, asked=wanted, placement=placement, benchmark=chosen)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Exported model, or any Hugging Face sequence-classification reward model.")],
    items: Annotated[
        list[str] | None,
        typer.Argument(
            help='Files, globs, directories, URIs, hf: names with rows {"prompt": str | messages, "completions": [str, …]}; '
            '"-" reads JSON lines from standard input [default: -].'
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Directory, .jsonl or .parquet file to write, by a job on Ray that is continued [default: stdout].")
    ] = None,
    output_format: Annotated[str | None, typer.Option(help="Of a directory: parquet or jsonl [default: parquet].")] = None,
    format: RowFormat = None,
    settings: ReadAs = None,
    keep_columns: Annotated[bool, typer.Option("--keep-columns", help="Keep the columns of the input beside the results.")] = False,
    ignore: Annotated[str | None, typer.Option(help="Columns to pass over although they could change the text, comma-separated.")] = None,
    device: Device = "auto",
    scorers: Annotated[int, typer.Option(min=1, help="Scorers side by side, for --output.")] = 1,
    gpus_per_scorer: Annotated[float, typer.Option(min=0, help="GPUs that each scorer reserves, for --output.")] = 0.0,
    rows_per_part: Annotated[int | None, typer.Option(min=1, help="Rows of one result file; lost when a scorer dies.")] = None,
    tokens_per_batch: TokensPerBatch = 8192,
    verify: Verify = True,
    weights: Weights = None,
    normalise: Annotated[str, typer.Option(help="raw, centred or standardised by the model's reference set.")] = "raw",
    n_critiques: NumCritiques = 1,
    temperature: Temperature = 0.0,
) -> None:
    """Score items: rewards or an error for each. The same command with --output continues an interrupted one."""
    placement = placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch, verify=verify)
    wanted = asked(weights=weights, normalise=normalise, n_critiques=n_critiques, temperature=temperature)
    ignored = tuple(ignore.split(",")) if ignore else ()
    data_config = read_as(items or (), format, settings, ignored)
    from rayward.workflows.score import ScoreOptions, score_pipeline

    options = ScoreOptions(
        items=tuple(items or ["-"]),
        output=output,
        output_format=output_format,
        data_config=data_config,
        keep_columns=keep_columns,
        ignore=ignored,
        rows_per_part=rows_per_part,
    )
    counts = score_pipeline(model, options, asked=wanted, placement=placement)
    if counts.errors:
        typer.echo(f"{counts.errors.total()} items have an error", err=True)
        raise typer.Exit(1)


@app.command()
def normalise(
    model: Annotated[str, typer.Argument(help="Exported model or ensemble.")],
    items: Annotated[
        list[str] | None,
        typer.Argument(help='Reference set: files, globs, directories, URIs as for score; "-" reads JSON lines [default: -].'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to write [default: <MODEL>-normalised].")] = None,
    format: RowFormat = None,
    settings: ReadAs = None,
    device: Device = "auto",
    scorers: Annotated[int, typer.Option(min=1, help="Scorers side by side; several run on Ray.")] = 1,
    gpus_per_scorer: Annotated[float, typer.Option(min=0, help="GPUs that each scorer reserves on Ray.")] = 0.0,
    tokens_per_batch: TokensPerBatch = 8192,
) -> None:
    """Write a model again with mean and deviation of a reference set's rewards, for centred and standardised scores."""
    placement = placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch)
    data_config = read_as(items or (), format, settings, ())
    from rayward.workflows.normalise import default_output, normalise_files
    from rayward.workflows.score import ScoreOptions

    target = output or default_output(model)
    options = ScoreOptions(items=tuple(items or ["-"]), data_config=data_config)
    found = normalise_files(model, options, output=target, placement=placement)
    typer.echo(
        f"model: {target}\nmean {found.mean:.6g}, standard deviation {found.std:.6g} of {found.num_rewards} rewards of {found.reference}"
    )
