"""Published weights that make one reward of several attributes. Light."""

from __future__ import annotations

from collections.abc import Mapping

from rayward.errors import ConfigError

WEIGHT_SETS: dict[str, dict[str, float]] = {
    "helpsteer2_llama3_70b": {"helpfulness": 0.65, "correctness": 0.80, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.40},
    "helpsteer2_nemotron4_340b": {"helpfulness": 0.30, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33},
    "helpsteer2_goodness": {"helpfulness": 0.65, "correctness": 0.80, "coherence": 0.45},
}
"""Published ways to make one reward of HelpSteer2's attributes (arXiv 2406.08673). The first two were searched on RewardBench: a
RewardBench figure that uses them is tuned on the benchmark. The third is the one that selects data and rewards the policy there."""


def weight_set(name: str) -> Mapping[str, float]:
    """A published set of weights.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in WEIGHT_SETS:
        raise ConfigError(
            f"weight set {name!r} is not known", remedy=f"use one of {', '.join(WEIGHT_SETS)}, or give the weights themselves"
        )
    return WEIGHT_SETS[name]
