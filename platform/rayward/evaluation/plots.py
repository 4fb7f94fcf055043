"""The four pictures of a report, drawn from an `Evaluation` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rayward.evaluation.records import Estimate, Evaluation, Group
from rayward.evaluation.statistics import wilson_interval

BLUE, ORANGE, INK, GREY, PALE = "#2f6fb3", "#e0803a", "#22303c", "#8a97a3", "#dfe5ea"
MAX_SOURCES = 20
_DPI = 160


def write_plots(evaluation: Evaluation, directory: Path) -> tuple[Path, ...]:
    """Write `reliability.png`, `rewards.png`, `accuracy_by_length.png` and `accuracy_by_source.png`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Evaluation], Figure]] = {
        "rewards": _rewards,
        "reliability": _reliability,
        "accuracy_by_length": _by_length,
        "accuracy_by_source": _by_source,
    }
    paths = []
    for name, draw in drawings.items():
        path = directory / f"{name}.png"
        draw(evaluation).savefig(path, dpi=_DPI, facecolor="white")
        paths.append(path)
    return tuple(paths)


def _style(axes: Axes, *, title: str, x: str, y: str, grid: str = "y") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(GREY)
    axes.grid(visible=False)
    axes.grid(axis="x" if grid == "x" else "y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _rewards(evaluation: Evaluation) -> Figure:
    figure = _figure(9.6, 3.5)
    left, right = figure.subplots(1, 2)
    histogram = evaluation.reward_histogram
    for name, label, color in (("chosen", "best-ranked", BLUE), ("rejected", "all others", ORANGE)):
        counts = np.asarray(histogram.counts[name], dtype=np.float64)
        share = counts / max(counts.sum(), 1.0)
        left.stairs(share, histogram.edges, fill=True, color=color, alpha=0.30)
        left.stairs(share, histogram.edges, color=color, linewidth=1.6, label=f"{label} (n = {int(counts.sum()):,})")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.legend(frameon=False, fontsize=8.5)
    _style(left, title="Rewards", x="reward", y="share of completions")
    margins = evaluation.margin_histogram
    counts = np.asarray(margins.counts["margin"], dtype=np.float64)
    edges = np.asarray(margins.edges)
    middle = (edges[:-1] + edges[1:]) / 2
    colors = [BLUE if value > 0 else ORANGE for value in middle]
    right.bar(middle, counts / max(counts.sum(), 1.0), width=np.diff(edges) * 0.92, color=colors, alpha=0.75)
    right.axvline(0.0, color=INK, linewidth=1.0)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ties = evaluation.overall.num_ties
    x = "margin (right of 0 is correct" + (f"; {ties:,} ties at 0)" if ties else ")")
    _style(right, title="Margin: reward of the better minus the worse", x=x, y="share of pairs")
    return figure


def _reliability(evaluation: Evaluation) -> Figure:
    figure = _figure(5.6, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins = evaluation.calibration.bins
    known = [(b.confidence, b.accuracy, b.num_pairs) for b in bins if b.confidence is not None and b.accuracy is not None]
    confidence, accuracy, counts = (np.asarray(column, dtype=np.float64) for column in zip(*known, strict=True))
    upper.plot([0.5, 1.0], [0.5, 1.0], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="perfectly calibrated")
    low, high = np.asarray([wilson_interval(a * n, n) for a, n in zip(accuracy, counts, strict=True)]).T
    upper.errorbar(
        confidence,
        accuracy,
        yerr=np.maximum([accuracy - low, high - accuracy], 0.0),
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=1.6,
        elinewidth=1.0,
        label="model",
    )
    upper.set_xlim(0.49, 1.01)
    upper.set_ylim(min(0.45, float(low.min()) - 0.02), 1.02)
    for axis in (upper.xaxis, upper.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ece = evaluation.calibration.ece
    _style(upper, title=f"Reliability (ECE {ece:.3f})" if ece is not None else "Reliability", x="", y="pairs ranked correctly")
    upper.legend(frameon=False, fontsize=8.5, loc="upper left")
    widths = [b.high - b.low for b in bins]
    lower.bar([b.low for b in bins], [b.num_pairs for b in bins], width=widths, align="edge", color=PALE, edgecolor="white")
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    _style(lower, title="", x="confidence of the model: sigma(|margin|)", y="pairs")
    return figure


def _errors(estimates: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    # A percentile interval need not hold the value itself; error bars must not be negative.
    values = [estimate.value or 0.0 for estimate in estimates]
    lows = [max(value - (value if e.low is None else e.low), 0.0) for value, e in zip(values, estimates, strict=True)]
    highs = [max((value if e.high is None else e.high) - value, 0.0) for value, e in zip(values, estimates, strict=True)]
    return values, [lows, highs]


def _rows(evaluation: Evaluation, groups: Sequence[Group], *, title: str, y: str, with_longer: bool) -> Figure:
    figure = _figure(7.6, 1.5 + 0.42 * len(groups))
    axes = figure.subplots()
    places = np.arange(len(groups))[::-1]
    overall = evaluation.overall.accuracy.value
    axes.axvline(0.5, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="coin flip")
    if overall is not None:
        axes.axvline(overall, color=BLUE, linewidth=1.0, alpha=0.45, label=f"model, all pairs ({overall:.3f})")
    if with_longer:
        values, errors = _errors([group.longer_wins for group in groups])
        axes.errorbar(values, places - 0.14, xerr=errors, fmt="s", color=ORANGE, markersize=4.5, elinewidth=1.1, label="longer one wins")
    values, errors = _errors([group.accuracy for group in groups])
    places_of_model = places + (0.1 if with_longer else 0.0)
    axes.errorbar(values, places_of_model, xerr=errors, fmt="o", color=BLUE, markersize=6, elinewidth=1.6, label="model")
    axes.set_yticks(places, [f"{_short(group.name)}\nn = {group.num_pairs:,}" for group in groups])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set_xlim(0.0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _style(axes, title=title, x="pairs ranked correctly, 95 % interval", y=y, grid="x")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 36 else f"…{name[-35:]}"


def _by_length(evaluation: Evaluation) -> Figure:
    title = f"Accuracy by length difference ({evaluation.length_unit})"
    return _rows(evaluation, evaluation.by_length, title=title, y="the better one is …", with_longer=False)


def _by_source(evaluation: Evaluation) -> Figure:
    groups = evaluation.by_source[:MAX_SOURCES]
    more = len(evaluation.by_source) - len(groups)
    title = "Accuracy by source" + (f" (the {MAX_SOURCES} largest; {more} more in the table)" if more else "")
    return _rows(evaluation, groups, title=title, y="", with_longer=True)
