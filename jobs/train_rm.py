#!/usr/bin/env python3
"""Train a reward model: `python jobs/train_rm.py FILE.yaml section.key=value …`, alone or as a Ray job.

Takes what `rayward train` takes. Needs no installation: the source root beside this folder is put on the path.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import typer

from rayward.cli import run, train

if __name__ == "__main__":
    job = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    job.command()(train)
    run(job)
