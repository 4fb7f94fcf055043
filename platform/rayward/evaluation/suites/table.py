"""The one list of published benchmarks: a suite is a class in a file of its own and a row here."""

from __future__ import annotations

from rayward.errors import ConfigError
from rayward.evaluation.suites.base import Suite
from rayward.evaluation.suites.judgebench import JudgeBench
from rayward.evaluation.suites.rewardbench import RewardBench
from rayward.evaluation.suites.rewardbench2 import RewardBench2

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (RewardBench, RewardBench2, JudgeBench)}


def choose(name: str, counts: str | None = None) -> Suite:
    """The benchmark of a name.

    Args:
        counts: which of the benchmark's subset weights, where it has several; None: its default.

    Raises:
        ConfigError: the name or the counts are not known, or counts are given to a benchmark without weights.
    """
    if name not in SUITES:
        raise ConfigError(f"benchmark is {name!r}; the rule is one of {', '.join(SUITES)}", remedy="use one of these")
    suite = SUITES[name]
    if not suite.weightings:
        if counts is not None:
            raise ConfigError(f"counts is {counts!r} and {name} has no subset weights", remedy="leave counts out")
        return suite()
    if counts is not None and counts not in suite.weightings:
        raise ConfigError(f"counts is {counts!r}; the rule is one of {', '.join(suite.weightings)}", remedy="use one of these")
    return suite(counts=counts or suite.weightings[0])
