"""What the commands share: the application, common options, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rayward.errors import ConfigError

if TYPE_CHECKING:
    from rayward.config.data import DataConfig
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
RowFormat = Annotated[
    str | None, typer.Option(help="A format of data.format (auto): the completions of its rows are scored [default: rows are items].")
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


def read_as(items: Sequence[str], format: str | None, settings: list[str] | None, ignore: tuple[str, ...]) -> DataConfig | None:
    """How rows become comparisons whose completions are scored; None: they are items."""
    from rayward.config.reading import reading_config

    return reading_config(settings or (), items, judged=False, format=format, ignore=ignore or None) if format or settings else None


def placed(**options: Any) -> Placement:
    """Where the work runs, by the options of a command."""
    from rayward.config.load import parse_config
    from rayward.config.placement import Placement

    return parse_config(options, Placement)


def asked(**options: Any) -> Asked:
    """What is asked of a model, by the options of a command."""
    from rayward.wire.items import Asked

    found = Asked(**options)
    if found.normalise not in ("raw", "centred", "standardised"):
        raise ConfigError(f"--normalise is {found.normalise!r}; the rule is raw, centred or standardised", remedy="use one of these")
    number, temperature = found.n_critiques, found.temperature
    if number < 1 or not 0.0 <= temperature <= 2.0 or (number > 1 and temperature == 0.0):
        raise ConfigError(
            f"--n-critiques is {number} and --temperature {temperature:g}; the rule is 1 or more, and 0 to 2 (above 0 for several)",
            remedy="for example --n-critiques 4 --temperature 0.5",
        )
    return found


Number = TypeVar("Number", int, float)


def numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    """The numbers of an option, with commas between."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as exc:
        raise ConfigError(f"{option} is {text!r}; the rule is numbers with commas between", remedy="for example 1,2") from exc
