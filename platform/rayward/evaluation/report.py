"""`report.html` (one self-contained file) and the terminal table of an `Evaluation`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayward.data.page import render
from rayward.evaluation.records import BenchmarkScores, CalibrationBin, Evaluation, Group
from rayward.evaluation.statistics import ELO_PER_REWARD

_CAPTIONS = {
    "rewards": "Left: rewards of the best-ranked completions against all others. Right: the margins that decide accuracy.",
    "reliability": "Pairs grouped by how sure the model was. On the dashed line the stated confidence is the observed accuracy.",
    "accuracy_by_length": "A model that only rewards length is right at the bottom and wrong at the top.",
    "accuracy_by_source": "The same model on every source of the data, beside the longer-wins baseline.",
}


def verdict(evaluation: Evaluation) -> tuple[bool, str]:
    """Whether the model is surely better than both baselines, and one sentence that says so."""
    gain, accuracy = evaluation.over_longer, evaluation.overall.accuracy
    over_longer = gain.low is not None and gain.low > 0
    over_coin = accuracy.low is not None and accuracy.low > 0.5
    if over_longer and over_coin:
        return True, f"Better than a coin flip and than “the longer one wins”, the latter by {gain}: the 95 % intervals exclude both."
    missed = [name for name, ok in (("a coin flip", over_coin), ("“the longer one wins”", over_longer)) if not ok]
    return False, f"Not surely better than {' nor than '.join(missed)}: the 95 % interval includes it (over “the longer one wins”: {gain})."


def write_report(evaluation: Evaluation, path: Path, plots: Sequence[Path]) -> None:
    """Write one HTML file with the plots embedded; nothing is fetched when it is opened.

    Args:
        evaluation: what to show.
        path: the file to write.
        plots: PNG files from `write_plots`.
    """
    good, sentence = verdict(evaluation)
    document = render(
        "rayward.evaluation",
        "report.html.j2",
        evaluation=evaluation,
        good=good,
        sentence=sentence,
        cards=_cards(evaluation),
        accuracy=accuracy_rows(evaluation),
        how_computed=how_computed(evaluation),
        benchmark=None if evaluation.benchmark is None else _benchmark(evaluation.benchmark),
        plots=[
            {"name": plot.stem, "caption": _CAPTIONS.get(plot.stem, plot.stem), "data": base64.b64encode(plot.read_bytes()).decode()}
            for plot in plots
        ],
        group_headers=("pairs (n)", "prompts", "ties", "accuracy [95 %]", "ties half", "mean margin"),
        by_source=[(*_group(group), str(group.longer_wins)) for group in evaluation.by_source],
        by_length=[_group(group) for group in evaluation.by_length],
        calibration=[_bin(found) for found in evaluation.calibration.bins],
        more_numbers=more_numbers(evaluation),
        row_counts=_counts(evaluation),
        num_errors=f"{evaluation.num_errors:,}",
        first_errors=[(example.id, example.source, example.code, example.message) for example in evaluation.first_errors],
    )
    path.write_text(document, encoding="utf-8")


def accuracy_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str, str]]:
    """Model and baselines: name, pairs, ties, accuracy with interval, accuracy with ties as half; report and model card share it."""
    return [
        (row.name, f"{row.num_pairs:,}", f"{row.num_ties:,}", str(row.accuracy), number(row.accuracy_ties_half)) for row in evaluation.rows
    ]


def more_numbers(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    """Names and formatted values of everything that is one number; report and model card share it."""
    calibration = evaluation.calibration
    return (
        ("difference to the longer-wins baseline", str(evaluation.over_longer)),
        ("expected calibration error", number(calibration.ece)),
        ("Brier score (constant model: 0.250)", number(calibration.brier)),
        ("log loss, nats (constant model: 0.693)", number(calibration.log_loss)),
        ("margin, mean ± deviation", f"{number(evaluation.margin.mean)} ± {number(evaluation.margin.std)}"),
        ("mean margin in Elo points, if the rewards are Bradley-Terry's", _elo(evaluation.margin.mean)),
        ("reward of best-ranked completions", f"{number(evaluation.chosen.mean)} ± {number(evaluation.chosen.std)}"),
        ("reward of all others", f"{number(evaluation.rejected.mean)} ± {number(evaluation.rejected.std)}"),
        (f"Kendall's tau, rankings of more than two (n = {evaluation.num_rankings:,})", str(evaluation.kendall_tau)),
        (f"Spearman correlation of reward and {evaluation.length_unit}", number(evaluation.spearman_length)),
        ("the same within comparisons", number(evaluation.spearman_length_within)),
    )


def how_computed(evaluation: Evaluation) -> str:
    """What the accuracy counts and where the intervals come from; report and model card share it."""
    overall = evaluation.overall
    return (
        f"{overall.num_pairs:,} pairs from {overall.num_comparisons:,} comparisons over {overall.num_prompts:,} prompts. A tie is two "
        f"equal scores and counts as wrong. Intervals are 95 %: bootstrap over prompts ({evaluation.bootstrap_samples:,} resamples, seed "
        f"{evaluation.seed}), Wilson where all prompts agree; for the coin flip, where 95 % of random scorers fall."
    )


def number(value: float | None) -> str:
    """Three decimals, or n/a."""
    return "n/a" if value is None else f"{value:.3f}"


def _elo(margin: float | None) -> str:
    return "n/a" if margin is None else f"{ELO_PER_REWARD * margin:+.0f}"


def print_table(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print model, baselines and sources as one terminal table, with the verdict and the counts below."""
    console = console or Console()
    table = Table(title=f"{escape(evaluation.model)} on {evaluation.overall.num_pairs:,} held-out pairs", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("pairs", "ties", "accuracy [95 %]", "ties half"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, row in enumerate(evaluation.rows):
        cells = (row.name, f"{row.num_pairs:,}", f"{row.num_ties:,}", escape(str(row.accuracy)), number(row.accuracy_ties_half))
        table.add_row(*cells, style="bold" if index == 0 else "", end_section=index == len(evaluation.rows) - 1)
    if len(evaluation.by_source) > 1:
        for group in evaluation.by_source:
            name = f"  {escape(group.name)}"
            cells = (name, f"{group.num_pairs:,}", f"{group.num_ties:,}", escape(str(group.accuracy)), number(group.accuracy_ties_half))
            table.add_row(*cells)
    console.print(table)
    for line in evaluation.unused_columns:
        console.print(escape(line), highlight=False, soft_wrap=True)
    if evaluation.benchmark is not None:
        console.print(_benchmark_table(evaluation.benchmark))
        if evaluation.benchmark.deviations:
            console.print(escape(_not_whole(evaluation.benchmark)), style="yellow", highlight=False, soft_wrap=True)
    good, sentence = verdict(evaluation)
    console.print(escape(sentence), style="green" if good else "yellow", highlight=False)
    console.print(escape(_row_counts(evaluation)), highlight=False)


def _benchmark_title(scores: BenchmarkScores) -> str:
    return f"{scores.name}, counts {scores.counts}" if scores.counts else scores.name


def _not_whole(scores: BenchmarkScores) -> str:
    return f"Not the figures of the whole benchmark: {'; '.join(scores.deviations)}."


def _benchmark_totals(scores: BenchmarkScores) -> list[tuple[str, float]]:
    with_prior = [] if scores.overall_with_prior is None else [("overall with prior sets", scores.overall_with_prior)]
    return [("overall", scores.overall), *with_prior]


def _benchmark_table(scores: BenchmarkScores) -> Table:
    table = Table(title=escape(_benchmark_title(scores)), title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("rows", "ties", "score"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, value in _benchmark_totals(scores):
        table.add_row(name, "", "", number(value), style="bold")
    for section in scores.sections:
        table.add_row(escape(section.name), f"{section.num_rows:,}", f"{section.num_ties:,}", number(section.value))
    return table


def _benchmark(scores: BenchmarkScores) -> dict[str, Any]:
    """What the page shows of a benchmark."""
    rows = [(name, "", "", number(value)) for name, value in _benchmark_totals(scores)]
    for section in scores.sections:
        rows.append((section.name, f"{section.num_rows:,}", f"{section.num_ties:,}", number(section.value)))
        if len(section.parts) > 1:
            for part in section.parts:
                counts = (f"{part.num_rows:,}", f"{part.num_ties:,}") if part.num_rows else ("", "")
                rows.append((f"… {part.name}", *counts, number(part.value)))
    return {"title": _benchmark_title(scores), "not_whole": _not_whole(scores) if scores.deviations else "", "rows": rows}


def _row_counts(evaluation: Evaluation) -> str:
    errors = ", ".join(f"{code}: {count:,}" for code, count in evaluation.errors.items())
    counts = f"{evaluation.num_rows:,} comparisons: {evaluation.num_scored:,} scored, {evaluation.num_errors:,} errors"
    return f"{counts} ({errors})" if errors else counts


def _cards(evaluation: Evaluation) -> list[tuple[str, str]]:
    overall = evaluation.overall
    accuracy, gain = overall.accuracy, evaluation.over_longer
    return [
        (number(accuracy.value), f"accuracy, 95 % interval {number(accuracy.low)} to {number(accuracy.high)}"),
        (f"{gain.value:+.3f}" if gain.value is not None else "n/a", f"over longer wins, {number(gain.low)} to {number(gain.high)}"),
        (number(evaluation.calibration.ece), "expected calibration error"),
        (f"{overall.num_ties:,}", f"ties in {overall.num_pairs:,} pairs"),
    ]


def _group(group: Group) -> tuple[str, ...]:
    row = (group.name, f"{group.num_pairs:,}", f"{group.num_prompts:,}", f"{group.num_ties:,}", str(group.accuracy))
    return (*row, number(group.accuracy_ties_half), number(group.mean_margin))


def _bin(found: CalibrationBin) -> tuple[str, ...]:
    return (f"{found.low:.2f} to {found.high:.2f}", f"{found.num_pairs:,}", number(found.confidence), number(found.accuracy))


def _counts(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [
        ("comparisons given", f"{evaluation.num_rows:,}"),
        ("scored", f"{evaluation.num_scored:,}"),
        ("… of these without ranks", f"{evaluation.num_unranked:,}"),
        ("… of these all ranked equal", f"{evaluation.num_tied:,}"),
        ("not scored", f"{evaluation.num_errors:,}"),
        *((f"… {code}", f"{count:,}") for code, count in evaluation.errors.items()),
    ]
