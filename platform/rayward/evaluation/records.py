"""The shapes of an evaluation: the scored record and the result, both plain JSON. No computation here.

Undefined numbers (no pairs, no spread) are None, never 0 and never NaN, so that `metrics.json` is strict JSON.
"""

from __future__ import annotations

from rayward.schema import Frozen


class Record(Frozen):
    """One held-out comparison after scoring: a line of `scores.jsonl`, from which every table can be computed again.

    Attributes:
        prompt_key: rows with one key share a prompt and are resampled together.
        ranks: K numbers, lower is better; None when only attributes are known.
        lengths: characters of the K completions.
        rewards: K finite numbers, or None together with `error_code` and `error`.
    """

    id: str
    source: str
    prompt_key: str
    ranks: tuple[float, ...] | None
    lengths: tuple[int, ...]
    rewards: tuple[float, ...] | None
    error_code: str | None = None
    error: str | None = None


class Estimate(Frozen):
    """A value with its 95 % interval; None where it is undefined (no pairs)."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "n/a"
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Row(Frozen):
    """One line of the main table: the model or a baseline on all pairs."""

    name: str
    num_pairs: int
    num_ties: int
    accuracy: Estimate
    accuracy_ties_half: float | None


class Group(Frozen):
    """Accuracy on a subset of the pairs, beside the longer-wins baseline on the same pairs."""

    name: str
    num_pairs: int
    num_comparisons: int
    num_prompts: int
    num_ties: int
    accuracy: Estimate
    accuracy_ties_half: float | None
    mean_margin: float | None
    longer_wins: Estimate


class CalibrationBin(Frozen):
    """Pairs with confidence sigma(|margin|) in [low, high)."""

    low: float
    high: float
    num_pairs: int
    confidence: float | None
    accuracy: float | None


class Calibration(Frozen):
    """How well sigma(margin) predicts the judgement."""

    ece: float | None
    brier: float | None
    log_loss: float | None
    bins: tuple[CalibrationBin, ...]


class Spread(Frozen):
    """Mean and population standard deviation of n numbers."""

    count: int
    mean: float | None
    std: float | None


class Histogram(Frozen):
    """Counts between edges; numbers beyond the outermost edges (0.1 % at either end) are in the outermost bins."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


class ErrorExample(Frozen):
    """A comparison without a score."""

    id: str
    source: str
    code: str
    message: str


class BenchmarkPart(Frozen):
    """A subset of a benchmark, or one of the means that a section is made of (then num_rows is 0)."""

    name: str
    value: float
    num_rows: int
    num_ties: int


class BenchmarkSection(BenchmarkPart):
    """One of the figures that a benchmark is known by."""

    parts: tuple[BenchmarkPart, ...]


class BenchmarkScores(Frozen):
    """The figures of a published benchmark, by its own rules.

    Attributes:
        counts: which subset weights RewardBench was computed with; None elsewhere.
        overall: RewardBench: mean of the sections without the prior sets; RewardBench 2: mean of the domains; JudgeBench: over all pairs.
        overall_with_prior: RewardBench's total of the 2024 paper, where there are prior sets.
        num_ties: rows of equal rewards (best of four: the highest is shared).
        deviations: what keeps the figures from being those of the whole benchmark; empty when nothing does.
    """

    name: str
    counts: str | None
    overall: float
    overall_with_prior: float | None
    sections: tuple[BenchmarkSection, ...]
    num_rows: int
    num_scored: int
    num_ties: int
    deviations: tuple[str, ...]


class Evaluation(Frozen):
    """Everything that is known about a reward model on held-out comparisons; `metrics.json`.

    Attributes:
        num_rows: comparisons given; always num_scored + num_errors.
        num_unranked, num_tied: scored comparisons that hold no pair: without ranks, or all ranked equal.
        rows: the model, "the longer one wins" and a coin flip on the same pairs.
        over_longer: accuracy of the model minus that of the longer-wins baseline, paired over prompts.
        chosen, rejected: rewards of the best-ranked completions and of all others.
        kendall_tau: mean tau-b over the num_rankings comparisons with more than two completions.
        spearman_length: correlation of reward and length over all completions; the second after each
            comparison's mean was taken from both, which removes what a reward owes to the prompt.
        benchmark: the same scores under the rules of a published benchmark, when one was asked for.
        unused_columns: columns of raw files that nothing reads, a line for each source.
    """

    model: str
    model_version: str
    data: tuple[str, ...]
    num_rows: int
    num_scored: int
    num_errors: int
    errors: dict[str, int]
    first_errors: tuple[ErrorExample, ...]
    num_unranked: int
    num_tied: int
    overall: Group
    rows: tuple[Row, ...]
    over_longer: Estimate
    by_source: tuple[Group, ...]
    by_length: tuple[Group, ...]
    length_unit: str
    calibration: Calibration
    margin: Spread
    chosen: Spread
    rejected: Spread
    reward_histogram: Histogram
    margin_histogram: Histogram
    num_rankings: int
    kendall_tau: Estimate
    spearman_length: float | None
    spearman_length_within: float | None
    bootstrap_samples: int
    seed: int
    benchmark: BenchmarkScores | None = None
    unused_columns: tuple[str, ...] = ()
