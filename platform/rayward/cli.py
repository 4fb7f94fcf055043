"""`rayward`: prepare, train, export, evaluate, score, serve. Commands parse everything first and import heavy modules after."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

import typer

from rayward.errors import ConfigError, RaywardError

if TYPE_CHECKING:
    from rayward.config.placement import Placement
    from rayward.config.run import Config
    from rayward.wire.items import Asked


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

ReadAs = Annotated[
    list[str] | None,
    typer.Option("--data", help="YAML file or key=value of the data: block or of one of its sources; repeat it for more."),
]
Weights = Annotated[str | None, typer.Option(help="Weight set for a model with several outputs, by name.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TokensPerBatch = Annotated[int, typer.Option(help="Token budget of one forward.")]
NumCritiques = Annotated[int, typer.Option(help="Of a model that writes critiques: the reward is the mean over so many.")]
Temperature = Annotated[float, typer.Option(help="Of sampled critiques; 0 takes the likeliest text.")]
Verify = Annotated[bool, typer.Option(help="Check an exported model against its contract first.")]


def load(settings: list[str] | None) -> Config:
    """Resolve `FILE.yaml … section.key=value …`."""
    from rayward.cluster import lasting
    from rayward.config.load import load_config

    given = settings or []
    resolved: Config = load_config([s for s in given if "=" not in s], [s for s in given if "=" in s])
    path = resolved.run.storage_path
    if (moved := lasting(path)) == path:
        return resolved
    typer.echo(f"note: in a submitted job, run.storage_path {path!r} is {moved}", err=True)
    return resolved.model_copy(update={"run": resolved.run.model_copy(update={"storage_path": moved})})


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
    typer.echo(f"rows: {manifest.num_input_rows} = {used} + quarantined ({quarantined})")
    if resolved.data.group_pairs:
        grouping = manifest.grouping
        typer.echo(f"groups: {grouping.groups} of {grouping.joined} rows; left as rows: {grouping.left() or 'none'}")
    typer.echo(f"prepared data: {prepared.directory}\nreport: {prepared.directory}/report.html")


@app.command()
def train(
    settings: Settings = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Export directory [default: <run>/export].")] = None,
    evaluation: Annotated[bool, typer.Option(help="Evaluate the export on the held-out rows.")] = True,
) -> None:
    """Prepare, train, export and evaluate; the same command continues an interrupted run. Without settings: the demo."""
    if not settings:
        from rayward.demo.settings import demo_settings

        settings = demo_settings()
    resolved = load(settings)
    from rayward.workflows.train import train_pipeline

    train_pipeline(resolved, export_to=export_to, evaluation=evaluation)


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
    placement = _placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch, verify=verify)
    asked = _asked(weights=weights, n_critiques=n_critiques, temperature=temperature)
    from rayward.workflows.evaluate import evaluate_pipeline

    evaluate_pipeline(model, data, output, data_config=data_config, asked=asked, placement=placement, benchmark=chosen)


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
    format: Annotated[str, typer.Option(help="items, or a format of data.format (auto): its completions are scored.")] = "items",
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
    placement = _placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch, verify=verify)
    asked = _asked(weights=weights, normalise=normalise, n_critiques=n_critiques, temperature=temperature)
    from rayward.workflows.score import ScoreOptions, score_pipeline

    options = ScoreOptions(
        items=tuple(items or ["-"]),
        output=output,
        output_format=output_format,
        format=format,
        keep_columns=keep_columns,
        ignore=tuple(ignore.split(",")) if ignore else (),
        rows_per_part=rows_per_part,
    )
    counts = score_pipeline(model, options, asked=asked, placement=placement)
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
    format: Annotated[str, typer.Option(help="items, or a format of data.format (auto): its completions are scored.")] = "items",
    device: Device = "auto",
    scorers: Annotated[int, typer.Option(min=1, help="Scorers side by side; several run on Ray.")] = 1,
    gpus_per_scorer: Annotated[float, typer.Option(min=0, help="GPUs that each scorer reserves on Ray.")] = 0.0,
    tokens_per_batch: TokensPerBatch = 8192,
) -> None:
    """Write a model again with mean and deviation of a reference set's rewards, for centred and standardised scores."""
    placement = _placed(device=device, actors=scorers, gpus_per_actor=gpus_per_scorer, tokens_per_batch=tokens_per_batch)
    from rayward.workflows.normalise import default_output, normalise_files

    target = output or default_output(model)
    found = normalise_files(model, tuple(items or ["-"]), output=target, format=format, placement=placement)
    typer.echo(
        f"model: {target}\nmean {found.mean:.6g}, standard deviation {found.std:.6g} of {found.num_rewards} rewards of {found.reference}"
    )


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    models: Annotated[list[str], typer.Argument(help="Two or more exported models of one architecture and contract.")],
    weights: Annotated[str | None, typer.Option(help="Comma-separated, sum 1 [default: equal].")] = None,
    expo: Annotated[float | None, typer.Option(help="Extrapolate: first + ALPHA (second - first), for example 1.52.")] = None,
) -> None:
    """Average or extrapolate the weights of exported models, shard by shard."""
    from rayward.workflows.merge import merge as run
    from rayward.workflows.merge import shares_of

    given = None if weights is None else _numbers(weights, float, "--weights")
    run([Path(model) for model in models], shares_of(len(models), given, expo), output)
    typer.echo(f"model: {output}")


def _placed(**options: Any) -> Placement:
    from rayward.config.load import parse_config
    from rayward.config.placement import Placement

    return parse_config(options, Placement)


def _asked(**options: Any) -> Asked:
    from rayward.wire.items import Asked

    asked = Asked(**options)
    if asked.normalise not in ("raw", "centred", "standardised"):
        raise ConfigError(f"--normalise is {asked.normalise!r}; the rule is raw, centred or standardised", remedy="use one of these")
    number, temperature = asked.n_critiques, asked.temperature
    if number < 1 or not 0.0 <= temperature <= 2.0 or (number > 1 and temperature == 0.0):
        raise ConfigError(
            f"--n-critiques is {number} and --temperature {temperature:g}; the rule is 1 or more, and 0 to 2 (above 0 for several)",
            remedy="for example --n-critiques 4 --temperature 0.5",
        )
    return asked


Number = TypeVar("Number", int, float)


def _numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as exc:
        raise ConfigError(f"{option} is {text!r}; the rule is numbers with commas between", remedy="for example 1,2") from exc


@app.command()
def mixture(settings: Settings = None) -> None:
    """Mixture of objectives on a frozen reward model (ArmoRM): ridge regression to ratings, then a gate on the prompt."""
    from rayward.config.load import load_config
    from rayward.config.mixture import MixtureConfig

    given = settings or []
    resolved = load_config([s for s in given if "=" not in s], [s for s in given if "=" in s], schema=MixtureConfig)
    from rayward.workflows.mixture import fit_mixture

    typer.echo(f"model: {fit_mixture(resolved)}")


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="Checkpoint of a reward model with its tokenizer: directory or hub name.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    max_tokens: Annotated[int | None, typer.Option(help="Longest conversation [default: 4096, or the model's context].")] = None,
    outputs: Annotated[str | None, typer.Option(help="Names of the outputs, where there are several, with commas between.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the outputs in the reward, with commas between.")] = None,
    templated_text: Annotated[str, typer.Option(help="Text that was templated before: refuse, or as_rendered.")] = "refuse",
    unshown_text: Annotated[str, typer.Option(help="What the chat template leaves out or changes: refuse, or accept.")] = "refuse",
    device: Device = "auto",
    tokens_per_batch: TokensPerBatch = 8192,
) -> None:
    """Write a reward model of others as an export: contract, golden scores by its own forward, checked."""
    placement = _placed(device=device, tokens_per_batch=tokens_per_batch)
    names = tuple(outputs.split(",")) if outputs else ()
    shares = _numbers(weights, float, "--weights") if weights else ()
    from rayward.contract.contract import TemplatedText, UnshownText

    for option, given, known in (
        ("--templated-text", templated_text, get_args(TemplatedText)),
        ("--unshown-text", unshown_text, get_args(UnshownText)),
    ):
        if given not in known:
            raise ConfigError(f"{option} is {given!r}; the rule is {' or '.join(known)}", remedy="use one of these")
    from rayward.workflows.import_model import import_model as run

    contract = run(
        source, output, max_tokens=max_tokens, outputs=names, weights=shares, placement=placement,
        templated_text=cast(TemplatedText, templated_text), unshown_text=cast(UnshownText, unshown_text),
    )  # fmt: skip
    typer.echo(f"model: {output}\n{len(contract.golden)} golden scores of {source} agree")


@app.command("import-armo")
def import_armo(
    source: Annotated[Path, typer.Argument(help="Checkpoint with regression_layer, reward_transform_matrix and gating tensors.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    attributes: Annotated[str, typer.Option(help="Names of the objectives, with commas between.")],
    gate_ids: Annotated[str, typer.Option(help="Token ids of the assistant's header.")] = "128009,128006,78191,128007,271",
    max_tokens: Annotated[int, typer.Option(help="Longest conversation.")] = 4096,
) -> None:
    """Write a published mixture-of-objectives checkpoint as an export with a contract."""
    from rayward.workflows.import_armo import import_armo as run_import

    names, ids = tuple(attributes.split(",")), _numbers(gate_ids, int, "--gate-ids")
    run_import(source, output, attributes=names, gate_ids=ids, max_tokens=max_tokens)
    typer.echo(f"model: {output}")


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
    placement = _placed(device=device, actors=writers, gpus_per_actor=gpus_per_writer, tokens_per_batch=tokens_per_batch)
    _asked(temperature=temperature)
    resolved = load(settings)
    from rayward.workflows.critique import Sampling, write_critiques

    counts = write_critiques(model, output, resolved, sampling=Sampling(temperature, seed), placement=placement)
    for split, (written, left_out) in counts.items():
        typer.echo(f"{split}: {written} rows with critiques, {left_out} left out for want of room or text: {output}/{split}.jsonl")


@app.command()
def serve(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [FILE.yaml]... [key=value]...")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model over HTTP until interrupted: POST /v1/score, GET /v1/models, GET /health."""
    from rayward.config.load import load_config
    from rayward.config.scoring import ScoringConfig

    given = list(settings or [])
    files = [s for s in given if s.endswith((".yaml", ".yml"))]
    overrides = [s for s in given if "=" in s]
    models = [f"model={s}" for s in given if s not in files and s not in overrides]
    resolved = load_config(files, [*models, *overrides], schema=ScoringConfig)
    from rayward.cluster import connect
    from rayward.serving.app import serve_model

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
    from rayward.demo.files import write_demo

    write_demo(directory, train_prompts, validation_prompts, seed)
    typer.echo(f"wrote {directory}")


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
