"""From a table of scored comparisons to every number of the report. Pure: no Ray, no model, no files.

Legend: P pairs of all comparisons together, N completions. Lengths are characters of the completion alone, because
evaluation compares models whose tokenizers differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rayward.errors import DataError
from rayward.evaluation.records import (
    Calibration,
    CalibrationBin,
    ErrorExample,
    Estimate,
    Evaluation,
    Group,
    Histogram,
    Record,
    Row,
    Spread,
)
from rayward.evaluation.statistics import (
    Floats,
    Interval,
    PairSums,
    bootstrap_ratio,
    kendall_tau,
    pair_differences,
    pair_indices,
    random_scorer_interval,
    random_scorer_variance,
    spearman,
    sum_by_cluster,
)

LENGTH_UNIT = "characters"
HISTOGRAM_BINS = 40
ERRORS_NAMED = 20
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Pairs:
    # Arrays over all pairs [P]; `longer` is the length of the better completion minus that of the worse.
    difference: Floats
    longer: Floats
    prompt: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    comparison: npt.NDArray[np.int64]


def summarise(
    records: Sequence[Record], *, model: str, model_version: str, data: Sequence[str], bootstrap_samples: int = 2000, seed: int = 0
) -> Evaluation:
    """Compute the whole evaluation.

    Args:
        records: one per given comparison, with rewards or an error.
        model, model_version, data: copied into the result.
        bootstrap_samples: resamples of prompts behind every interval.
        seed: of the resampling; the same records and seed give the same result.

    Raises:
        DataError: there is no record, or none that holds a scored pair.
    """
    scored = [record for record in records if record.rewards is not None]
    failed = [record for record in records if record.rewards is None]
    sources = sorted({record.source for record in records})
    pairs = _pair_table(scored, sources)
    errors = Counter(record.error_code or "unknown" for record in failed)
    if not len(pairs.difference):
        raise DataError(
            f"{len(records)} comparisons, {len(failed)} without a score ({_counts(errors)}), hold no scored pair with different ranks",
            remedy="give held-out comparisons that are ranked, and check the errors",
        )

    def group(name: str, mask: Mask) -> Group:
        return _group(name, pairs, mask, bootstrap_samples, seed)

    everything = np.ones(len(pairs.difference), dtype=np.bool_)
    overall = group("all", everything)
    by_source = [group(name, pairs.source == index) for index, name in enumerate(sources)]
    by_length = [group(name, mask) for name, mask in _length_buckets(pairs.longer)]
    chosen, rejected = _split_rewards(scored)
    sums = PairSums.of(pairs.difference)
    return Evaluation(
        model=model,
        model_version=model_version,
        data=tuple(data),
        num_rows=len(records),
        num_scored=len(scored),
        num_errors=len(failed),
        errors=dict(sorted(errors.items())),
        first_errors=tuple(
            ErrorExample(id=record.id, source=record.source, code=record.error_code or "unknown", message=record.error or "")
            for record in failed[:ERRORS_NAMED]
        ),
        num_unranked=sum(record.ranks is None for record in scored),
        num_tied=sum(record.ranks is not None and len(set(record.ranks)) == 1 for record in scored),
        overall=overall,
        rows=_rows(overall, scored, pairs),
        over_longer=_over_longer(pairs, bootstrap_samples, seed),
        by_source=tuple(sorted((g for g in by_source if g.num_pairs), key=lambda g: (-g.num_pairs, g.name))),
        by_length=tuple(g for g in by_length if g.num_pairs),
        length_unit=LENGTH_UNIT,
        calibration=_calibration(sums),
        margin=_spread(pairs.difference),
        chosen=_spread(chosen),
        rejected=_spread(rejected),
        reward_histogram=_histogram({"chosen": chosen, "rejected": rejected}),
        margin_histogram=_histogram({"margin": pairs.difference}),
        **_rank_correlations(scored, bootstrap_samples, seed),
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )


def _counts(errors: Counter[str]) -> str:
    return ", ".join(f"{code}: {count}" for code, count in sorted(errors.items())) or "no errors"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _estimate(value: float, interval: Interval) -> Estimate:
    return Estimate(value=_known(value), low=_known(interval.low), high=_known(interval.high))


def _pair_table(scored: Sequence[Record], sources: Sequence[str]) -> _Pairs:
    prompts: dict[str, int] = {}
    source_index = {name: index for index, name in enumerate(sources)}
    differences, longer, counts, prompt, source = [np.zeros(0)], [np.zeros(0)], [], [], []
    for record in scored:
        assert record.rewards is not None
        delta = pair_differences(record.rewards, record.ranks) if record.ranks is not None else np.zeros(0)
        differences.append(delta)
        if record.ranks is not None:
            better, worse = pair_indices(record.ranks)
            lengths = np.asarray(record.lengths, dtype=np.float64)
            longer.append(lengths[better] - lengths[worse])
        counts.append(len(delta))
        prompt.append(prompts.setdefault(record.prompt_key, len(prompts)))
        source.append(source_index[record.source])
    return _Pairs(
        difference=np.concatenate(differences),
        longer=np.concatenate(longer),
        prompt=np.repeat(np.asarray(prompt, dtype=np.int64), counts),
        source=np.repeat(np.asarray(source, dtype=np.int64), counts),
        comparison=np.repeat(np.arange(len(scored), dtype=np.int64), counts),
    )


def _accuracy(differences: Floats, prompt: npt.NDArray[np.int64], samples: int, seed: int) -> Estimate:
    correct = differences > 0
    interval = bootstrap_ratio(sum_by_cluster(prompt, correct), sum_by_cluster(prompt, np.ones(len(correct))), samples=samples, seed=seed)
    return _estimate(PairSums.of(differences).accuracy, interval)


def _group(name: str, pairs: _Pairs, mask: Mask, samples: int, seed: int) -> Group:
    difference, prompt = pairs.difference[mask], pairs.prompt[mask]
    sums = PairSums.of(difference)
    return Group(
        name=name,
        num_pairs=sums.num_pairs,
        num_comparisons=len(np.unique(pairs.comparison[mask])),
        num_prompts=len(np.unique(prompt)),
        num_ties=sums.num_ties,
        accuracy=_accuracy(difference, prompt, samples, seed),
        accuracy_ties_half=_known(sums.accuracy_ties_half),
        mean_margin=_known(sums.mean_margin),
        longer_wins=_accuracy(pairs.longer[mask], prompt, samples, seed),
    )


def _rows(overall: Group, scored: Sequence[Record], pairs: _Pairs) -> tuple[Row, ...]:
    longer = PairSums.of(pairs.longer)
    variance = sum(random_scorer_variance(record.ranks) for record in scored if record.ranks is not None)
    model = Row(
        name="model",
        num_pairs=overall.num_pairs,
        num_ties=overall.num_ties,
        accuracy=overall.accuracy,
        accuracy_ties_half=overall.accuracy_ties_half,
    )
    baseline = Row(
        name="longer one wins",
        num_pairs=overall.num_pairs,
        num_ties=longer.num_ties,
        accuracy=overall.longer_wins,
        accuracy_ties_half=_known(longer.accuracy_ties_half),
    )
    coin = Row(
        name="coin flip",
        num_pairs=overall.num_pairs,
        num_ties=0,
        accuracy=_estimate(0.5, random_scorer_interval(variance, overall.num_pairs)),
        accuracy_ties_half=0.5,
    )
    return model, baseline, coin


def _over_longer(pairs: _Pairs, samples: int, seed: int) -> Estimate:
    gain = (pairs.difference > 0).astype(np.float64) - (pairs.longer > 0)
    totals = sum_by_cluster(pairs.prompt, np.ones(len(gain)))
    interval = bootstrap_ratio(sum_by_cluster(pairs.prompt, gain), totals, samples=samples, seed=seed, bounds=(-1.0, 1.0))
    return _estimate(float(gain.mean()), interval)


def _length_buckets(longer: Floats) -> list[tuple[str, Mask]]:
    # Edges are terciles of |length difference|, so they depend on the data alone and are equal for every model.
    size = np.abs(longer)
    unequal = size[size > 0]
    small, large = (max(_two_digits(q), 1) for q in np.quantile(unequal, [1 / 3, 2 / 3])) if len(unequal) else (1, 1)
    spans = [(f"1-{small}", (size > 0) & (size <= small)), (f"{small + 1}-{large}", (size > small) & (size <= large))]
    spans.append((f"more than {large}", size > large))
    spans = [span for span in spans if span[1].any()]
    shorter = [(f"shorter by {name}", mask & (longer < 0)) for name, mask in reversed(spans)]
    return [*shorter, ("same length", size == 0), *((f"longer by {name}", mask & (longer > 0)) for name, mask in spans)]


def _two_digits(value: float) -> int:
    return round(float(f"{value:.2g}"))


def _split_rewards(scored: Sequence[Record]) -> tuple[Floats, Floats]:
    chosen: list[float] = []
    rejected: list[float] = []
    for record in scored:
        if record.rewards is None or record.ranks is None or len(set(record.ranks)) == 1:
            continue
        best = min(record.ranks)
        for reward, rank in zip(record.rewards, record.ranks, strict=True):
            (chosen if rank == best else rejected).append(reward)
    return np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)


def _rank_correlations(scored: Sequence[Record], samples: int, seed: int) -> dict[str, Any]:
    # Rewards that are all equal give no order: that is no agreement (0); ranks that are all equal give nothing to agree with.
    values: list[float] = []
    keys: list[str] = []
    for record in scored:
        if record.rewards is not None and record.ranks is not None and len(record.ranks) > 2 and len(set(record.ranks)) > 1:
            one = kendall_tau(record.rewards, record.ranks)
            values.append(0.0 if math.isnan(one) else one)
            keys.append(record.prompt_key)
    _, clusters = np.unique(keys, return_inverse=True)
    tau = Estimate(value=None)
    if values:
        sums, counts = sum_by_cluster(clusters, values), sum_by_cluster(clusters, np.ones(len(values)))
        tau = _estimate(float(np.mean(values)), bootstrap_ratio(sums, counts, samples=samples, seed=seed, bounds=(-1.0, 1.0)))
    rewards = [np.asarray(record.rewards, dtype=np.float64) for record in scored]
    lengths = [np.asarray(record.lengths, dtype=np.float64) for record in scored]
    within = spearman(np.concatenate([r - r.mean() for r in rewards]), np.concatenate([n - n.mean() for n in lengths]))
    return {
        "num_rankings": len(values),
        "kendall_tau": tau,
        "spearman_length": _known(spearman(np.concatenate(rewards), np.concatenate(lengths))),
        "spearman_length_within": _known(within),
    }


def _calibration(sums: PairSums) -> Calibration:
    bins = tuple(
        CalibrationBin(low=b.low, high=b.high, num_pairs=b.num_pairs, confidence=_known(b.confidence), accuracy=_known(b.accuracy))
        for b in sums.reliability()
    )
    return Calibration(ece=_known(sums.ece), brier=_known(sums.brier), log_loss=_known(sums.log_loss), bins=bins)


def _spread(values: Floats) -> Spread:
    known = len(values) > 0
    return Spread(count=len(values), mean=float(values.mean()) if known else None, std=float(values.std()) if known else None)


def _histogram(series: dict[str, Floats]) -> Histogram:
    together = np.concatenate(list(series.values()))
    low, high = np.quantile(together, [0.001, 0.999]).tolist()
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    # Zero is an edge, so that no bin of the margins holds both right and wrong pairs.
    width = (high - low) / HISTOGRAM_BINS
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 1)
    counts = {name: tuple(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()) for name, values in series.items()}
    return Histogram(edges=tuple(edges.tolist()), counts=counts)
