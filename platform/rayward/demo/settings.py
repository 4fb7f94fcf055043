"""The embedded default: what `rayward train` without arguments and `make demo` train on. No hub, no GPU, no account."""

from __future__ import annotations

from pathlib import Path

from rayward.cluster import SOURCE_ROOT
from rayward.errors import ConfigError

RECIPE = SOURCE_ROOT.parent / "jobs" / "recipes" / "demo.yaml"
DATA = Path("runs/demo/data")
NUM_TRAIN, NUM_VALIDATION, SEED = 24_000, 1_000, 0


def demo_settings() -> list[str]:
    """Write the generated world's data once and name the recipe.

    Raises:
        ConfigError: the package was installed without the repository's recipes.
    """
    from rayward.demo.files import write_demo

    if not RECIPE.is_file():
        raise ConfigError(
            f"no settings are given and the demo recipe {RECIPE} is not there", remedy="name a YAML file: rayward train my.yaml"
        )
    if not (DATA / "tokenizer").is_dir():
        write_demo(DATA, NUM_TRAIN, NUM_VALIDATION, SEED)
    return [str(RECIPE)]
