"""`rayward`: prepare, train, export, evaluate, score, serve. Commands parse everything first and import heavy modules after."""

from __future__ import annotations

import signal
import sys

import typer

from rayward.cli import data, models, scores, serving  # noqa: F401 - each puts its commands on the application
from rayward.cli.options import app, load
from rayward.cli.runs import train
from rayward.errors import RaywardError

__all__ = ["app", "load", "main", "run", "train"]


def main() -> None:
    """Console entry point: typed errors become a message and their exit code."""
    run(app)


def run(command: typer.Typer) -> None:
    """Run a command line; a Rayward error prints what was given, the rule and the remedy, and nothing else."""
    # A supervisor's SIGTERM is a Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except RaywardError as exc:
        typer.echo(f"error: {exc}", err=True)
        sys.exit(exc.exit_code)
