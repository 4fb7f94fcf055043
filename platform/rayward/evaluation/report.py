"""`report.html` (one self-contained file) and the terminal table of an `Evaluation`."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayward.evaluation.records import BenchmarkScores, Calibration, Evaluation, Group
from rayward.evaluation.statistics import ELO_PER_REWARD

_CAPTIONS = {
    "rewards": "Left: rewards of the best-ranked completions against all others. Right: the margins that decide accuracy.",
    "reliability": "Pairs grouped by how sure the model was. On the dashed line the stated confidence is the observed accuracy.",
    "accuracy_by_length": "A model that only rewards length is right at the bottom and wrong at the top.",
    "accuracy_by_source": "The same model on every source of the data, beside the longer-wins baseline.",
}

_STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22303c; background: #f5f7f9; margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 10px; }
.sub { color: #5b6975; margin: 0 0 24px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 20px 0; }
.card, figure, .scroll { background: #fff; border: 1px solid #dfe5ea; border-radius: 10px; }
.card { padding: 14px 16px; } .card b { display: block; font-size: 26px; line-height: 1.2; color: #2f6fb3; }
.card span { color: #5b6975; font-size: 13px; }
.verdict { background: #e9f0f8; border-left: 4px solid #2f6fb3; border-radius: 6px; padding: 10px 14px; }
.warn { background: #fdf1e7; border-left-color: #e0803a; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf1f4; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
th { color: #5b6975; font-weight: 600; font-size: 13px; } tr:last-child td { border-bottom: 0; } tr.lead td { font-weight: 600; }
td.text { text-align: left; white-space: normal; }
figure { margin: 14px 0; padding: 14px; } figure img { max-width: 100%; display: block; margin: 0 auto; max-height: 640px; }
figcaption { color: #5b6975; font-size: 13px; margin-top: 8px; } .note { color: #5b6975; font-size: 13px; }
"""


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
    body = [
        "<h1>Reward model evaluation</h1>",
        f'<p class="sub">{_text(evaluation.model)} · version {_text(evaluation.model_version)}<br>{_text(", ".join(evaluation.data))}</p>',
        f'<p class="{"verdict" if good else "verdict warn"}">{_text(sentence)}</p>',
        _cards(evaluation),
        "<h2>Accuracy and baselines</h2>",
        _main_table(evaluation),
        f'<p class="note">{_text(how_computed(evaluation))}</p>',
        *([] if evaluation.benchmark is None else [_benchmark_section(evaluation.benchmark)]),
        *(_figure(plot) for plot in plots),
        "<h2>By source</h2>",
        _group_table("source", evaluation.by_source, with_longer=True),
        f"<h2>By length difference ({_text(evaluation.length_unit)} of the completions)</h2>",
        _group_table("the better completion is …", evaluation.by_length, with_longer=False),
        "<h2>Calibration</h2>",
        _calibration_table(evaluation.calibration),
        "<h2>More numbers</h2>",
        _table(("", "value"), [(name, value) for name, value in more_numbers(evaluation)]),
        "<h2>Rows</h2>",
        _rows_section(evaluation),
    ]
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation of {_text(evaluation.model)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path.write_text(document, encoding="utf-8")


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


def _benchmark_section(scores: BenchmarkScores) -> str:
    rows = [(name, "", "", number(value)) for name, value in _benchmark_totals(scores)]
    for section in scores.sections:
        rows.append((section.name, f"{section.num_rows:,}", f"{section.num_ties:,}", number(section.value)))
        if len(section.parts) > 1:
            for part in section.parts:
                counts = (f"{part.num_rows:,}", f"{part.num_ties:,}") if part.num_rows else ("", "")
                rows.append((f"… {part.name}", *counts, number(part.value)))
    note = f'<p class="verdict warn">{_text(_not_whole(scores))}</p>' if scores.deviations else ""
    return f"<h2>Benchmark: {_text(_benchmark_title(scores))}</h2>{note}{_table(('', 'rows', 'ties', 'score'), rows, lead=True)}"


def _row_counts(evaluation: Evaluation) -> str:
    errors = ", ".join(f"{code}: {count:,}" for code, count in evaluation.errors.items())
    counts = f"{evaluation.num_rows:,} comparisons: {evaluation.num_scored:,} scored, {evaluation.num_errors:,} errors"
    return f"{counts} ({errors})" if errors else counts


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, lead: bool = False, text_columns: frozenset[int] = frozenset()) -> str:
    head = "".join(f"<th>{_text(header)}</th>" for header in headers)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f'<td class="text">{_text(c)}</td>' if i in text_columns else f"<td>{_text(c)}</td>" for i, c in enumerate(row))
        lines.append(f'<tr class="lead">{cells}</tr>' if lead and index == 0 else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cards(evaluation: Evaluation) -> str:
    overall = evaluation.overall
    accuracy, gain = overall.accuracy, evaluation.over_longer
    cards = (
        (number(accuracy.value), f"accuracy, 95 % interval {number(accuracy.low)} to {number(accuracy.high)}"),
        (f"{gain.value:+.3f}" if gain.value is not None else "n/a", f"over longer wins, {number(gain.low)} to {number(gain.high)}"),
        (number(evaluation.calibration.ece), "expected calibration error"),
        (f"{overall.num_ties:,}", f"ties in {overall.num_pairs:,} pairs"),
    )
    return f'<div class="cards">{"".join(f"<div class=card><b>{_text(b)}</b><span>{_text(s)}</span></div>" for b, s in cards)}</div>'


def _main_table(evaluation: Evaluation) -> str:
    rows = [
        (row.name, f"{row.num_pairs:,}", f"{row.num_ties:,}", str(row.accuracy), number(row.accuracy_ties_half)) for row in evaluation.rows
    ]
    return _table(("", "pairs (n)", "ties", "accuracy [95 %]", "ties half"), rows, lead=True)


def _group_table(name: str, groups: Sequence[Group], *, with_longer: bool) -> str:
    headers = [name, "pairs (n)", "prompts", "ties", "accuracy [95 %]", "ties half", "mean margin"]
    rows = []
    for group in groups:
        row = [group.name, f"{group.num_pairs:,}", f"{group.num_prompts:,}", f"{group.num_ties:,}", str(group.accuracy)]
        row += [number(group.accuracy_ties_half), number(group.mean_margin)]
        rows.append(row + ([str(group.longer_wins)] if with_longer else []))
    return _table(headers + (["longer wins [95 %]"] if with_longer else []), rows)


def _calibration_table(calibration: Calibration) -> str:
    rows = [(f"{b.low:.2f} to {b.high:.2f}", f"{b.num_pairs:,}", number(b.confidence), number(b.accuracy)) for b in calibration.bins]
    return _table(("confidence sigma(|margin|)", "pairs (n)", "mean confidence", "accuracy (ties half)"), rows)


def _figure(plot: Path) -> str:
    data = base64.b64encode(plot.read_bytes()).decode()
    caption = _CAPTIONS.get(plot.stem, plot.stem)
    return f'<figure><img alt="{_text(plot.stem)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'


def _rows_section(evaluation: Evaluation) -> str:
    counts = [
        ("comparisons given", f"{evaluation.num_rows:,}"),
        ("scored", f"{evaluation.num_scored:,}"),
        ("… of these without ranks", f"{evaluation.num_unranked:,}"),
        ("… of these all ranked equal", f"{evaluation.num_tied:,}"),
        ("not scored", f"{evaluation.num_errors:,}"),
        *((f"… {code}", f"{count:,}") for code, count in evaluation.errors.items()),
    ]
    section = _table(("", "rows"), counts)
    if not evaluation.first_errors:
        return section
    rows = [(example.id, example.source, example.code, example.message) for example in evaluation.first_errors]
    shown = f"The first {len(rows)} of {evaluation.num_errors:,} rows without a score; scores.jsonl holds all."
    return f'{section}<p class="note">{shown}</p>{_table(("id", "source", "code", "message"), rows, text_columns=frozenset((1, 2, 3)))}'
