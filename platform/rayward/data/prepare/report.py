"""The data report: `report.json` for programs, `report.html` (self-contained) for people."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pyarrow import fs as pafs

from rayward import storage
from rayward.data.page import render
from rayward.data.prepare.stats import SplitStats
from rayward.data.prepared import Grouping, UnusedColumn
from rayward.data.record import BadRow

EXAMPLES_PER_REASON = 3
SOURCES_SHOWN = 50
NUMBERS_SHOWN = ("smallest", "p1", "p50", "p99", "largest", "largest_allowed")
Examples = Mapping[str, Sequence[Mapping[str, Any]]]
"""By reason, some quarantine records."""

MEANING: dict[BadRow, str] = {
    BadRow.UNPARSABLE: "the line is not JSON, not UTF-8, or not a transcript",
    BadRow.MISSING_FIELD: "a column is absent or null",
    BadRow.WRONG_TYPE: "a value has the wrong type",
    BadRow.EMPTY_PROMPT: "the prompt holds no text",
    BadRow.EMPTY_COMPLETION: "a completion holds no text",
    BadRow.IDENTICAL_COMPLETIONS: "two completions are the same text or the same tokens",
    BadRow.NO_SHARED_PROMPT: "chosen and rejected answer different prompts",
    BadRow.TIE: "no completion is better (data.ties: keep would train it)",
    BadRow.NON_FINITE_MARGIN: "the margin is NaN or infinite",
    BadRow.OUTLIER: "a margin, strength, weight or rating lies far from all others (data.outlier_factor)",
    BadRow.UNKNOWN_ROLE: "a turn's role is not system, user, assistant or tool",
    BadRow.BAD_RANKING: "ranks do not fit the completions, contradict the scores, or are missing",
    BadRow.BAD_RATING: "a rating lies outside data.attribute_range, is no number, or does not fit the completions",
    BadRow.NO_RATING: "there is no ranking, and every rating is missing",
    BadRow.BAD_TEXT: "a text holds a NUL byte or a lone surrogate",
    BadRow.TOO_LONG: "the conversation does not fit model.max_tokens",
    BadRow.TEMPLATE_REJECTED: "the chat template refuses the conversation",
    BadRow.UNSUPPORTED_MESSAGE: "a part of a turn that the chat template does not show, or no text (model.unshown_text)",
    BadRow.ALREADY_TEMPLATED: "a text went through a chat template before (model.templated_text)",
    BadRow.CHANGED_BY_TEMPLATE: "the chat template changes the completion (model.unshown_text)",
    BadRow.DUPLICATE: "the same comparison with the same judgement stands elsewhere; one copy was kept",
    BadRow.CONTRADICTION: "the same completions are judged otherwise elsewhere; none was kept",
    BadRow.IN_VALIDATION: "the prompt also stands in the validation data",
    BadRow.CONTAMINATED: "the prompt also stands in a file of data.contamination",
    BadRow.UNUSED_COLUMN: "a column that would change the row's meaning is neither read nor in data.ignore; no row of the sample had it",
    BadRow.ADAPTER_REJECTED: "the function of data.adapter gave no row, and a reason",
    BadRow.ADAPTER_FAILED: "the function of data.adapter raised an error, or gave something that is no row",
}


def build_report(
    *,
    fingerprint: str,
    num_input_rows: int,
    quarantined: Mapping[str, int],
    quarantined_by_source: Mapping[str, int],
    examples: Examples,
    train: SplitStats,
    validation: SplitStats,
    files: Sequence[str],
    ignored_files: Sequence[str],
    formats: Mapping[str, int],
    overlap: int,
    num_merged: int = 0,
    grouping: Grouping | None = None,
    numbers: Mapping[str, Mapping[str, float]] | None = None,
    near_duplicates: int = 0,
    near_examples: Sequence[tuple[str, int, str]] = (),
    contamination: Mapping[str, int] | None = None,
    unread: Mapping[str, int] | None = None,
    unused: Sequence[UnusedColumn] = (),
) -> dict[str, Any]:
    """Collect what `report.json` says.

    Args:
        examples: by reason, some quarantine records.
        formats: number of files by format.
        overlap: train rows whose prompt stands in validation.
        num_merged: rows whose completions stand in another row's comparison.
        grouping: what `data.group_pairs` did.
        near_duplicates: see `tally.Tally`; near_examples: of some of them file and number, and the place of the other row.
        contamination: quarantined rows by benchmark file; unread: rows of benchmarks that give no prompt, by reason.
        unused: columns that nothing reads.
        numbers: by column, the distribution of what rows bring (`numbers.described`).
    """
    both = SplitStats.merged([train, validation])
    return {
        "fingerprint": fingerprint,
        "num_input_rows": num_input_rows,
        "num_train": train.num_rows,
        "num_validation": validation.num_rows,
        "num_merged": num_merged,
        "unused_columns": [column.model_dump() for column in unused],
        "grouping": (grouping or Grouping()).model_dump(),
        "num_quarantined": dict(sorted(quarantined.items())),
        "unranked": both.missing.get("ranks", 0),
        "unrated": both.num_unrated,
        "duplicates": quarantined.get(BadRow.DUPLICATE, 0),
        "contradictions": quarantined.get(BadRow.CONTRADICTION, 0),
        "ties_quarantined": quarantined.get(BadRow.TIE, 0),
        "tied_pairs_kept": both.tied_pairs,
        "train_validation_prompt_overlap": overlap,
        "near_duplicates": near_duplicates,
        "near_duplicate_examples": [{"file": file, "row": row, "like": like} for file, row, like in near_examples],
        "contamination": dict(contamination or {}),
        "contamination_unread": dict(unread or {}),
        "rows_truncated": both.truncated,
        "rows_trimmed": both.trimmed,
        "rows_changed": both.changed,
        "change_example": both.change,
        "longer_wins": _longer_wins(both),
        "tokens": both.tokens,
        "tokens_without_sharing": both.tokens_unshared,
        "tokens_saved_by_sharing": 1.0 - both.tokens / both.tokens_unshared if both.tokens_unshared else 0.0,
        "sources": {
            name: {
                "train": train.sources.get(name, 0),
                "validation": validation.sources.get(name, 0),
                "quarantined": quarantined_by_source.get(name, 0),
            }
            for name in sorted({*train.sources, *validation.sources, *quarantined_by_source})
        },
        "formats": dict(sorted(formats.items())),
        "files": list(files),
        "ignored_files": list(ignored_files),
        "numbers": {name: dict(facts) for name, facts in (numbers or {}).items()},
        "quarantine_examples": {reason: list(records) for reason, records in sorted(examples.items())},
        "train": train.model_dump(),
        "validation": validation.model_dump(),
    }


def _longer_wins(stats: SplitStats) -> dict[str, float | int | None]:
    decided = stats.longer_wins + stats.shorter_wins
    return {
        "longer": stats.longer_wins,
        "shorter": stats.shorter_wins,
        "equal_length": stats.equal_length,
        "share": stats.longer_wins / decided if decided else None,
    }


def render_html(report: Mapping[str, Any]) -> str:
    """One HTML page without outside references; every text of the data is escaped."""
    quarantined = sum(report["num_quarantined"].values())
    share = report["longer_wins"]["share"]
    cards = [
        ("rows read", f"{report['num_input_rows']:,}", ""),
        ("train", f"{report['num_train']:,}", "comparisons"),
        ("validation", f"{report['num_validation']:,}", "comparisons"),
        *([("merged", f"{report['num_merged']:,}", "rows into comparisons of their prompt")] if report["num_merged"] else []),
        ("quarantined", f"{quarantined:,}", f"{quarantined / max(1, report['num_input_rows']):.1%} of the rows"),
        ("longer wins", "none" if share is None else f"{share:.1%}", "of pairs of unequal length; 50% is no bias"),
        ("tokens", f"{report['tokens']:,}", f"{report['tokens_saved_by_sharing']:.1%} saved by sharing the prompt"),
    ]
    merged = SplitStats.merged([SplitStats.model_validate(report["train"]), SplitStats.model_validate(report["validation"])])
    plots = [
        ("Whole comparison, prompt once", merged.lengths, "comparisons"),
        ("Shared prompt", merged.prompt_lengths, "comparisons"),
        ("One completion", merged.completion_lengths, "completions"),
    ]
    sources = sorted(report["sources"].items(), key=lambda item: (-sum(item[1].values()), item[0]))
    return render(
        "rayward.data.prepare",
        "report.html.j2",
        report=report,
        cards=cards,
        plots=[(title, _histogram(title, bins, unit)) for title, bins, unit in plots if bins],
        checks=_checks(report),
        numbers=[
            (name, f"{facts['values']:,}", *(f"{facts[key]:.4g}" for key in NUMBERS_SHOWN)) for name, facts in report["numbers"].items()
        ],
        unused=[
            (c.source, c.column, c.type, f"{c.num_rows:,}", f"{c.share:.1%}", c.setting or "")
            for c in (UnusedColumn.model_validate(column) for column in report["unused_columns"])
        ],
        sources=[(name, f"{c['train']:,}", f"{c['validation']:,}", f"{c['quarantined']:,}") for name, c in sources[:SOURCES_SHOWN]],
        more_sources=max(0, len(sources) - SOURCES_SHOWN),
        quarantine=[
            (reason, f"{count:,}", MEANING.get(BadRow(reason), ""), report["quarantine_examples"].get(reason, ()))
            for reason, count in Counter(report["num_quarantined"]).most_common()
        ],
        files=[("files read", report["files"]), ("files passed over", report["ignored_files"])],
    )


def most_frequent(counts: Mapping[str, int], examples: Examples, passed_over: Sequence[str]) -> str:
    """Of the most frequent reasons one example each: file, row and what is wrong."""
    lines = []
    for reason, count in Counter({reason: count for reason, count in counts.items() if reason not in passed_over}).most_common(3):
        lines.append(f"{reason} ({count:,}): {MEANING.get(BadRow(reason), 'see docs/data.md')}")
        lines += [f"  for example row {e['row']} of {e['file']}: {e['detail']}" for e in examples.get(reason, ())[:1]]
    return "".join(f"\n    {line}" for line in lines)


def read_examples(directory: str) -> Examples:
    """Those of the report beside prepared data; none where it is gone."""
    filesystem, path = storage.resolve(f"{directory}/report.json")
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        return {}
    with filesystem.open_input_stream(path) as stream:
        examples: Examples = json.loads(stream.read())["quarantine_examples"]
    return examples


def _checks(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of each."""
    wins = report["longer_wins"]
    groups = Grouping.model_validate(report["grouping"])
    return [
        ("prompts in train and in validation", f"{report['train_validation_prompt_overlap']:,}", "0 by construction"),
        ("duplicates", f"{report['duplicates']:,}", "one copy of each was kept"),
        ("contradictions", f"{report['contradictions']:,}", "same completions, other judgement: none was kept"),
        ("ties quarantined", f"{report['ties_quarantined']:,}", "data.ties: keep trains them towards one half"),
        ("tied pairs kept", f"{report['tied_pairs_kept']:,}", "inside rankings, or by data.ties: keep"),
        *_likeness_checks(report),
        ("rows that lost turns", f"{report['rows_truncated']:,}", "oldest turns dropped to fit model.max_tokens"),
        (
            "pairs won by the longer / the shorter / of equal length",
            f"{wins['longer']:,} / {wins['shorter']:,} / {wins['equal_length']:,}",
            "length in tokens",
        ),
        ("rows joined / groups made of them", f"{groups.joined:,} / {groups.groups:,}", "data.group_pairs"),
        *([("rows that did not join", groups.left(), "each stays a comparison of its own")] if groups.left() else []),
        ("longest comparison", f"{max(report['train']['longest_comparison'], report['validation']['longest_comparison']):,}", "tokens"),
    ]


def _likeness_checks(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    examples = [f"row {each['row']} of {each['file']} is like {each['like']}" for each in report["near_duplicate_examples"][:2]]
    note = "; ".join(examples) or "rows that differ in case, spaces and punctuation only"
    checks = [("near duplicates", f"{report['near_duplicates']:,}", note)]
    checks += [
        (f"train rows in {file}", f"{count:,}", "data.contamination: quarantined") for file, count in report["contamination"].items()
    ]
    if unread := report["contamination_unread"]:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in unread.items())
        checks.append(("rows of data.contamination that give no prompt", listed, "nothing is compared with them"))
    if trimmed := report["rows_trimmed"]:
        checks.append(("rows with a completion that the template trimmed", f"{trimmed:,}", "white space around it"))
    if changed := report["rows_changed"]:
        checks.append(("rows that the template changed", f"{changed:,}", report["change_example"]))
    return checks


def _histogram(title: str, bins: Mapping[int, int], unit: str) -> str:
    """A PNG in base64."""
    # Figure without pyplot: no global state, no display, safe in any thread.
    from matplotlib.figure import Figure

    width = max(1, max(bins) // 40)
    grouped: Counter[int] = Counter()
    for upper, count in bins.items():
        grouped[-(-upper // width) * width] += count
    figure = Figure(figsize=(4.6, 2.7), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.bar([upper - width / 2 for upper in grouped], list(grouped.values()), width=width * 0.92, color="#3b6fb6")
    axes.set(title=title, xlabel="tokens", ylabel=unit)
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
