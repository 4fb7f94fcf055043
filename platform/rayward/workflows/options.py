"""Options that several commands have, and what they mean together. Light, like the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rayward.errors import ConfigError

if TYPE_CHECKING:
    from rayward.config.data import DataConfig
    from rayward.config.placement import Placement
    from rayward.wire.items import Asked

Number = TypeVar("Number", int, float)

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


def read_as(items: Sequence[str], format: str | None, settings: list[str] | None, ignore: tuple[str, ...]) -> DataConfig | None:
    """How rows become comparisons whose completions are scored; None: they are items."""
    from rayward.config.reading import reading_config

    return reading_config(settings or (), items, judged=False, format=format, ignore=ignore or None) if format or settings else None


def placed(**options: Any) -> Placement:
    """Where scoring runs.

    Raises:
        ConfigError: a value breaks its rule.
    """
    from rayward.config.load import parse_config
    from rayward.config.placement import Placement

    return parse_config(options, Placement)


def asked_of(**options: Any) -> Asked:
    """What is asked of the model, besides the texts.

    Raises:
        ConfigError: a value breaks its rule.
    """
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


def numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    """Numbers with commas between.

    Raises:
        ConfigError: the text is something else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as exc:
        raise ConfigError(f"{option} is {text!r}; the rule is numbers with commas between", remedy="for example 1,2") from exc
