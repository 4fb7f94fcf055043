"""`rayward`: prepare, train, export, evaluate, score, serve. Commands parse everything first and import heavy modules after."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rayward.errors import RaywardError

if TYPE_CHECKING:
    from rayward.config import Config

app = typer.Typer(
    name="rayward",
    help="Train, evaluate and serve reward models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE.yaml]... [section.key=value]...", help="YAML files, left to right, and dotted overrides."),
]
Verify = Annotated[bool, typer.Option(help="Check an exported model against its contract first.")]


def load(settings: list[str] | None) -> Config:
    """Resolve `FILE.yaml … section.key=value …`."""
    from rayward.config import load_config

    given = settings or []
    return anchored(load_config([s for s in given if "=" not in s], [s for s in given if "=" in s]))


def anchored(config: Config) -> Config:
    """A submitted job's working directory is deleted after it: a relative storage path is then taken from the home directory."""
    from rayward.cluster import in_submitted_job

    path = config.run.storage_path
    if not in_submitted_job() or "://" in path or Path(path).expanduser().is_absolute():
        return config
    moved = str(Path.home() / "rayward" / path)
    typer.echo(f"note: in a submitted job, run.storage_path {path!r} is {moved}", err=True)
    return config.model_copy(update={"run": config.run.model_copy(update={"storage_path": moved})})


@app.command()
def config(settings: Settings = None) -> None:
    """Print the fully resolved configuration."""
    from rayward.config import dump_config

    typer.echo(dump_config(load(settings)))


@app.command()
def prepare(settings: Settings = None) -> None:
    """Read, check, split and tokenize preference data; report what is wrong with it."""
    resolved = load(settings)
    from rayward.data.prepare import prepare as run

    prepared = run(resolved)
    manifest = prepared.manifest
    quarantined = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.num_quarantined.items())) or "none"
    used = f"{manifest.num_train} train + {manifest.num_validation} validation"
    typer.echo(f"rows: {manifest.num_input_rows} = {used} + quarantined ({quarantined})")
    typer.echo(f"prepared data: {prepared.directory}\nreport: {prepared.directory}/report.html")


@app.command()
def train(
    settings: Settings = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Export directory [default: <run>/export].")] = None,
    evaluation: Annotated[bool, typer.Option(help="Evaluate the export on the held-out rows.")] = True,
) -> None:
    """Prepare, train, export and evaluate; the same command continues an interrupted run. Without settings: the demo."""
    if not settings:
        from rayward.demo import demo_settings

        settings = demo_settings()
    resolved = load(settings)
    from rayward.pipeline import train_pipeline

    train_pipeline(resolved, export_to=export_to, evaluation=evaluation)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    settings: Settings = None,
    checkpoint: Annotated[str, typer.Option(help="last, best, or a step number.")] = "last",
) -> None:
    """Write a committed checkpoint of a run as a Transformers model with its scoring contract."""
    resolved = load(settings)
    from rayward.pipeline import export_pipeline

    typer.echo(f"model: {export_pipeline(resolved, output, which=checkpoint)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Exported model, or any Hugging Face sequence-classification reward model.")],
    data: Annotated[list[str], typer.Argument(help="Files, globs, directories, URIs, hf: names; or one prepared directory.")],
    output: Annotated[str, typer.Option(help="Directory for scores, metrics, report and plots.")] = "evaluation",
    format: Annotated[str, typer.Option(help="Format of raw files.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    scorers: Annotated[int, typer.Option(help="Scorers side by side.")] = 1,
    gpus_per_scorer: Annotated[float, typer.Option(help="GPUs that each scorer reserves.")] = 0.0,
    tokens_per_batch: Annotated[int, typer.Option(help="Token budget of one forward.")] = 8192,
    verify: Verify = True,
) -> None:
    """Held-out accuracy with interval, baselines, calibration and plots."""
    from rayward.config import DataConfig, parse_config

    data_config = parse_config({"format": format}, DataConfig)
    from rayward.pipeline import evaluate_pipeline

    evaluate_pipeline(
        model,
        data,
        output,
        data_config=data_config,
        device=device,
        scorers=scorers,
        gpus_per_scorer=gpus_per_scorer,
        tokens_per_batch=tokens_per_batch,
        verify=verify,
    )


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Exported model, or any Hugging Face sequence-classification reward model.")],
    items: Annotated[
        str, typer.Argument(help='JSON lines {"prompt": str | messages, "completions": [str, …]}; "-" reads standard input.')
    ] = "-",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tokens_per_batch: Annotated[int, typer.Option(help="Token budget of one forward.")] = 8192,
    verify: Verify = True,
) -> None:
    """Score items from a file; one JSON line per item, with rewards or an error."""
    from rayward.pipeline import score_lines

    stream = sys.stdin if items == "-" else _open(items)
    failed = 0
    for result in score_lines(model, stream, device=device, tokens_per_batch=tokens_per_batch, verify=verify):
        failed += "error" in result
        typer.echo(json.dumps(result, ensure_ascii=False))
    if failed:
        typer.echo(f"{failed} items have an error", err=True)
        raise typer.Exit(1)


@app.command()
def serve(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [FILE.yaml]... [key=value]...")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model over HTTP until interrupted: POST /v1/score, GET /v1/models, GET /health."""
    from rayward.config import ScoringConfig, load_config

    given = list(settings or [])
    files = [s for s in given if s.endswith((".yaml", ".yml"))]
    overrides = [s for s in given if "=" in s]
    models = [f"model={s}" for s in given if s not in files and s not in overrides]
    resolved = load_config(files, [*models, *overrides], schema=ScoringConfig)
    from rayward.cluster import connect
    from rayward.scoring.app import serve_model

    connect()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve_model(
        resolved,
        host=host,
        port=port,
        blocking=True,
        on_ready=lambda url: typer.echo(f"serving {resolved.model} at {url} (POST {url}/v1/score); Ctrl-C stops"),
    )


@app.command("demo-data")
def demo_data(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    train_prompts: Annotated[int, typer.Option(help="Training comparisons.")] = 24_000,
    validation_prompts: Annotated[int, typer.Option(help="Held-out comparisons.")] = 1_000,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
) -> None:
    """Write preference data of a small generated world with a known true reward, and a tokenizer for it."""
    from rayward.data.world import write_demo

    write_demo(directory, train_prompts, validation_prompts, seed)
    typer.echo(f"wrote {directory}")


def _open(path: str) -> TextIO:
    from rayward.errors import DataError

    try:
        return open(path, encoding="utf-8")
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror})", remedy="check the path") from exc


def main() -> None:
    """Console entry point: typed errors become a message and their exit code."""
    run(app)


def run(command: typer.Typer) -> None:
    """Run a command line; a Rayward error prints what was given, the rule and the remedy, and nothing else."""
    try:
        command()
    except RaywardError as exc:
        typer.echo(f"error: {exc}", err=True)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
