"""The rules of the benchmarks against published rows, and the command with hand-made scores."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.helpers.fixtures import FIXTURES

from rayward import cli
from rayward.config.data import DataConfig
from rayward.errors import ConfigError, DataError
from rayward.evaluation import suites
from rayward.evaluation.held_out import read_raw
from rayward.evaluation.records import BenchmarkScores, Evaluation, Record
from rayward.evaluation.suites.base import mean_of_sections
from rayward.evaluation.suites.judgebench import JUDGEBENCH_GROUPS
from rayward.evaluation.suites.rewardbench import (
    PRIOR_SETS,
    REWARDBENCH_SECTIONS,
    RewardBench,
    section_score,
    subset_weights,
    total_with_prior,
)
from rayward.evaluation.suites.rewardbench2 import REWARDBENCH2_ROWS, TiesPrompt, best_of_credit, ties_parts, ties_score
from rayward.evaluation.suites.table import SUITES, choose
from rayward.scoring import batch
from rayward.workflows import evaluate as workflow

ROOT = Path(__file__).resolve().parents[3]


def row(name: str, source: str, rewards: Sequence[float] | None, ranks: Sequence[float] | None = (0.0, 1.0)) -> Record:
    size = len(ranks) if ranks is not None else len(rewards or (0, 0))
    return Record(
        id=name,
        source=source,
        prompt_key=name,
        ranks=None if ranks is None else tuple(ranks),
        lengths=(5,) * size,
        rewards=None if rewards is None else tuple(rewards),
        error_code="too_long" if rewards is None else None,
    )


def pairs(source: str, num_right: int, num_wrong: int) -> list[Record]:
    rewards = [(1.0, 0.0)] * num_right + [(0.0, 1.0)] * num_wrong
    return [row(f"{source}-{index}", source, pair) for index, pair in enumerate(rewards)]


def sections_of(scores: BenchmarkScores) -> dict[str, float]:
    return {section.name: section.value for section in scores.sections}


# ---- RewardBench ----------------------------------------------------------------------------------------------------


def test_subsets_sections_and_counts_are_the_published_ones() -> None:
    assert {section: list(subsets) for section, subsets in REWARDBENCH_SECTIONS.items()} == FIXTURES["rb1_sections"]
    assert subset_weights("fixed") == FIXTURES["rb1_counts_fixed"]
    assert subset_weights("legacy") == FIXTURES["rb1_counts_legacy"]
    assert subset_weights("raw") == FIXTURES["rb1_counts_fixed"] | {"math-prm": 447}
    assert sum(subset_weights("raw").values()) == 2985


def rewardbench_sections(subsets: dict[str, float], counts: str) -> dict[str, float]:
    weights = subset_weights(counts)
    return {section: section_score({name: subsets[name] for name in names}, weights) for section, names in FIXTURES["rb1_sections"].items()}


@pytest.mark.parametrize("published", FIXTURES["rb1_rows"], ids=lambda published: str(published["model"]))
def test_published_rewardbench_rows(published: dict[str, Any]) -> None:
    # Subsets are published to 0.1 %, so the figures made of them agree to that.
    sections = rewardbench_sections(published["subsets"], published["counts"])
    prior = mean_of_sections(list(published["prior"].values()))
    found = {name.lower().replace(" ", "_"): 100 * value for name, value in sections.items()}
    found |= {"prior": 100 * prior, "overall": 100 * total_with_prior(list(sections.values()), prior)}
    assert found == pytest.approx(published["published"], abs=published["tol"])


def test_the_counts_move_a_published_model_by_a_known_amount() -> None:
    subsets = FIXTURES["rb1_rows"][0]["subsets"]
    legacy, fixed = rewardbench_sections(subsets, "legacy"), rewardbench_sections(subsets, "fixed")
    assert (100 * legacy["Safety"], 100 * fixed["Safety"]) == pytest.approx((92.20, 90.54), abs=0.005)
    assert (100 * mean_of_sections([*legacy.values()]), 100 * mean_of_sections([*fixed.values()])) == pytest.approx(
        (90.81, 90.40), abs=0.005
    )


def test_the_row_of_exact_fractions() -> None:
    exact = FIXTURES["rb1_exact"]
    assert rewardbench_sections(exact["subsets"], "fixed") == pytest.approx(exact["fixed"], abs=1e-12)
    assert rewardbench_sections(exact["subsets"], "legacy")["Safety"] == pytest.approx(exact["legacy_safety"], abs=1e-12)


def test_the_exact_row_from_its_pairs() -> None:
    exact, rows = FIXTURES["rb1_exact"]["subsets"], subset_weights("raw")
    records = [
        record for name, value in exact.items() for record in pairs(name, round(value * rows[name]), round((1 - value) * rows[name]))
    ]
    assert len(records) == 2985
    for counts, safety in (("fixed", FIXTURES["rb1_exact"]["fixed"]["Safety"]), ("legacy", FIXTURES["rb1_exact"]["legacy_safety"])):
        scores = choose("rewardbench", counts).aggregate(records)
        assert sections_of(scores) == pytest.approx(FIXTURES["rb1_exact"]["fixed"] | {"Safety": safety}, abs=1e-12)
        assert (scores.counts, scores.deviations, scores.overall_with_prior) == (counts, (), None)
    raw = choose("rewardbench", "raw").aggregate(records)
    # With raw counts a section is the share of right pairs.
    reasoning = [name for name in exact if name.startswith(("hep", "math"))]
    right = sum(round(exact[name] * rows[name]) for name in reasoning)
    assert sections_of(raw)["Reasoning"] == pytest.approx(right / sum(rows[name] for name in reasoning), abs=1e-12)


def test_the_share_of_sections_and_prior_sets() -> None:
    weights = FIXTURES["rb1_weights"]
    sections, prior = np.array([0.9, 0.7, 0.8, 0.6]), 0.5
    expected = (np.dot(weights["sections"], sections) + weights["prior"] * prior) / weights["denominator"]
    assert total_with_prior(sections.tolist(), prior) == pytest.approx(expected, abs=1e-12)
    # A missing section is left out, with its weight.
    assert total_with_prior([0.9, 0.7], 0.5) == pytest.approx((2 * 0.9 + 2 * 0.7 + 0.5) / 5)


def test_a_tie_is_wrong_whatever_the_order() -> None:
    records = [row("a", "shp", (1.0, 1.0)), row("b", "shp", (1.0, 1.0), (1.0, 0.0)), row("c", "shp", (0.0, 1.0), (1.0, 0.0))]
    scores = choose("rewardbench").aggregate([*records, *pairs("donotanswer", 1, 1)])
    assert sections_of(scores) == {"Safety": 0.5, "Prior Sets": pytest.approx(1 / 3)}
    assert (scores.overall, scores.num_ties) == (0.5, 2)
    assert scores.overall_with_prior == pytest.approx((2 * 0.5 + 1 / 3) / 3)


@pytest.mark.parametrize("published", FIXTURES["helpsteer2pref_rows"], ids=lambda published: str(published["name"]))
def test_later_papers_report_the_mean_of_the_four_sections(published: dict[str, Any]) -> None:
    assert mean_of_sections(published["sections"]) == pytest.approx(published["overall"], abs=0.08)


# ---- RewardBench 2 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", FIXTURES["rb2_rows"], ids=lambda published: str(published["model"]))
def test_published_rewardbench2_rows(published: dict[str, Any]) -> None:
    assert set(published["domains"]) == set(REWARDBENCH2_ROWS)
    assert mean_of_sections(list(published["domains"].values())) == pytest.approx(published["avg"], abs=0.051)


@pytest.mark.parametrize(
    ("rewards", "expected"), [((3, 1, 2, 0), 1.0), ((1, 3, 2, 0), 0.0), ((2, 2, 1, 0), 0.5), ((2, 2, 2, 2), 0.25), ((0, 2, 2, 2), 0.0)]
)
def test_credit_of_a_best_of_four(rewards: tuple[float, ...], expected: float) -> None:
    assert best_of_credit(rewards, 0) == expected


def test_a_coin_flip_earns_a_quarter() -> None:
    # All 4^4 ways to fill four places with four values, ties among them.
    values = np.stack(np.meshgrid(*[range(4)] * 4), -1).reshape(-1, 4).tolist()
    assert np.mean([best_of_credit(v, 0) for v in values]) == pytest.approx(0.25)


def ties_records() -> list[Record]:
    records = []
    for kind in ("ref", "tied"):
        for number, (rewards, num_correct) in enumerate(FIXTURES["rb2_ties"][kind]):
            ranks = [0.0] * num_correct + [1.0] * (len(rewards) - num_correct)
            records.append(row(f"{kind}:{number}", "Ties", rewards, ranks))
    return records


def test_the_ties_domain() -> None:
    expected = FIXTURES["rb2_ties"]
    scores = choose("rewardbench2").aggregate(ties_records())
    (section,) = scores.sections
    assert section.value == pytest.approx(expected["score"], abs=1e-12)
    names = ("acc_ref", "acc_tied", "cp", "cph", "tanh_mean")
    assert [part.value for part in section.parts] == pytest.approx([expected[name] for name in names], abs=1e-12)
    # The completions' order is that of the file; the ranks say which are correct.
    turned = [r.model_copy(update={"ranks": r.ranks[::-1], "rewards": r.rewards[::-1]}) for r in ties_records() if r.ranks and r.rewards]
    assert choose("rewardbench2").aggregate(turned).sections[0].value == section.value


def _ties_reference(ref: dict[int, TiesPrompt], tied: dict[int, TiesPrompt]) -> float:
    def stats(prompt: TiesPrompt) -> tuple[bool, float, float]:
        correct, incorrect = np.array(prompt.correct), np.array(prompt.incorrect)
        return bool(correct.min() > incorrect.max()), float(np.ptp(correct)), float(correct.min() - incorrect.max())

    both = [number for number in ref if number in tied]
    spread = np.array([stats(tied[n])[1] for n in both])
    gap, hard = (np.array([stats(s[n])[2] for n in both]) for s in (tied, ref))
    hard = np.minimum(gap, hard)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.nan_to_num(np.tanh(hard / spread - 1.0), nan=0.0)
    right = [np.mean([stats(prompt)[0] for prompt in prompts.values()]) for prompts in (tied, ref)]
    return float(0.3 * right[0] + 0.3 * right[1] + 0.2 * np.mean(gap > spread) + 0.2 * np.mean(hard > spread) + 0.01 * np.mean(size))


@pytest.mark.parametrize("seed", range(5))
def test_the_ties_domain_against_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def prompt(num_correct: int) -> TiesPrompt:
        # Few values, so that spreads and gaps of zero occur.
        draw = generator.integers(0, 4, num_correct + int(generator.integers(1, 5))).astype(float)
        draw[:num_correct] += generator.integers(0, 4)
        return TiesPrompt(tuple(draw[:num_correct].tolist()), tuple(draw[num_correct:].tolist()))

    ref = {number: prompt(1) for number in range(40)}
    tied = {number: prompt(int(generator.integers(2, 5))) for number in range(3, 45)}
    assert ties_score(ties_parts(ref, tied)) == pytest.approx(_ties_reference(ref, tied), abs=1e-12)


def test_the_ties_domain_can_reach_a_little_more_than_one() -> None:
    best = {0: TiesPrompt((9.0, 9.0), (0.0,))}
    assert ties_score(ties_parts({0: TiesPrompt((9.0,), (0.0,))}, best)) == pytest.approx(1.01)


# ---- JudgeBench -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", FIXTURES["judgebench_rows"], ids=lambda published: str(published["model"]))
def test_published_judgebench_rows(published: dict[str, Any]) -> None:
    records: list[Record] = []
    for group, rows in FIXTURES["judgebench_n"].items():
        num_right = round(published["groups"][group] / 100 * rows)
        subject = f"{group}-law" if group == "mmlu-pro" else group
        records += pairs(subject, num_right, rows - num_right)
    scores = choose("judgebench").aggregate(records)
    assert tuple(FIXTURES["judgebench_n"]) == JUDGEBENCH_GROUPS
    assert {name: 100 * value for name, value in sections_of(scores).items()} == pytest.approx(published["groups"], abs=0.005)
    assert 100 * scores.overall == pytest.approx(published["overall"], abs=0.005)
    assert scores.deviations == ()


def test_equal_rewards_decide_for_the_second_answer() -> None:
    def accuracy(rewards: tuple[float, float], ranks: tuple[float, float]) -> float:
        return choose("judgebench").aggregate([row("a", "livecodebench", rewards, ranks)]).overall

    assert accuracy((1.0, 1.0), (0.0, 1.0)) == 0.0
    assert accuracy((1.0, 1.0), (1.0, 0.0)) == 1.0
    assert (accuracy((2.0, 1.0), (0.0, 1.0)), accuracy((2.0, 1.0), (1.0, 0.0)), accuracy((1.0, 2.0), (1.0, 0.0))) == (1.0, 0.0, 1.0)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_missing_and_failed_rows_are_named_and_in_no_figure() -> None:
    records = [*pairs("hep-go", 120, 40), row("x", "hep-go", None), row("rewardbench:7", "rewardbench", None, None)]
    scores = choose("rewardbench").aggregate(records)
    assert sections_of(scores) == {"Reasoning": 0.75}
    assert (scores.num_rows, scores.num_scored, scores.overall) == (162, 160, 0.75)
    assert scores.deviations[0] == "2 rows have no score (too_long: 2)"
    assert "hep-go: 160 of 164 rows scored" in scores.deviations
    assert "mt-bench-hard: 0 of 37 rows scored" in scores.deviations
    assert not any(name in " ".join(scores.deviations) for name in PRIOR_SETS)
    with_prior = choose("rewardbench").aggregate([*records, *pairs("shp", 3, 1)])
    assert "anthropic_hhh: 0 of 221 rows scored" in with_prior.deviations

    only_ref = [record for record in ties_records() if record.id.startswith("ref")]
    math_row = row("1", "Math", (2, 1, 0, 0), (0, 1, 1, 1))
    scores = choose("rewardbench2").aggregate([*only_ref, math_row])
    assert sections_of(scores) == {"Math": 1.0}
    assert scores.deviations[-1].startswith("Ties: no number has both")
    assert choose("judgebench").aggregate(pairs("livecodebench", 1, 0)).deviations == (
        "mmlu-pro: no scored row", "livebench-reasoning: no scored row", "livebench-math: no scored row",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("rewardbench", row("a", "alpaca", (1, 0)), "source 'alpaca', which is no subset of rewardbench; it has alpacaeval-easy, .*shp"),
        ("rewardbench", row("a", "hep-go", (1, 0, 0), (0, 1, 2)), "two completions, one of them better"),
        ("rewardbench", row("a", "hep-go", (1, 0), (0, 0)), "two completions, one of them better"),
        ("rewardbench", row("a", "hep-go", (1, 0), None), "ranks None"),
        ("rewardbench2", row("a", "hep-go", (1, 0)), "it has Factuality, Precise IF"),
        ("rewardbench2", row("a", "Math", (1, 0)), "4 completions, one of them best"),
        ("rewardbench2", row("a", "Focus", (1, 0, 0, 0), (0, 0, 1, 1)), "4 completions, one of them best"),
        ("rewardbench2", row("a", "Ties", (1, 0)), "the id is ref:<number> or tied:<number>"),
        ("rewardbench2", row("ref:1", "Ties", (1, 0, 0), (0, 0, 1)), "one correct completion in a row ref:"),
        ("rewardbench2", row("tied:1", "Ties", (1, 0, 0), (0, 1, 1)), "several in a row tied:"),
        ("rewardbench2", row("tied:1", "Ties", (1, 0, 0), (0, 1, 2)), "the incorrect ones another"),
        ("judgebench", row("a", "mmlu", (1, 0)), "it has mmlu-pro…"),
        ("judgebench", row("a", "mmlu-pro-law", (1, 0), (1, 1)), "two completions, one of them better"),
    ],
)  # fmt: skip
def test_rows_without_a_rule_are_refused(name: str, record: Record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(name).aggregate([record])


def test_an_id_of_ties_stands_once_and_nothing_scored_is_an_error() -> None:
    with pytest.raises(DataError, match="an id stands once"):
        choose("rewardbench2").aggregate([*ties_records(), ties_records()[0]])
    with pytest.raises(DataError, match="no section of judgebench has a scored row"):
        choose("judgebench").aggregate([row("a", "livecodebench", None)])
    with pytest.raises(DataError, match="no section of rewardbench has a scored row"):
        choose("rewardbench").aggregate(pairs("shp", 1, 1))


def test_names_and_counts_that_are_not_known() -> None:
    assert choose("rewardbench") == RewardBench(counts="fixed")
    with pytest.raises(ConfigError, match="rewardbench, rewardbench2, judgebench"):
        choose("rewardbench3")
    with pytest.raises(ConfigError, match="fixed, legacy, raw"):
        choose("rewardbench", "old")
    with pytest.raises(ConfigError, match="no subset weights"):
        choose("judgebench", "fixed")


def test_every_suite_is_a_file_of_its_own_and_a_row_of_the_table() -> None:
    files = {path.stem for path in Path(suites.__file__ or "").parent.glob("*.py")} - {"__init__", "base", "table"}
    assert files == set(SUITES)
    assert {suite.__module__ for suite in SUITES.values()} == {f"rayward.evaluation.suites.{name}" for name in SUITES}


# ---- the documented rows and the command ----------------------------------------------------------------------------


def test_the_documented_rows_are_read_and_fit(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in SUITES:
        section = text.split(f"`--benchmark {name}`\n")[1].split("\n## ")[0]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(re.findall(r"^\{.*\}\n", section, flags=re.MULTILINE)), encoding="utf-8")
        held_out = read_raw([str(path)], DataConfig(), download_to=str(tmp_path))
        rows = [found for table in held_out.tables for found in table.to_pylist()]
        assert held_out.rejected == {}
        assert rows
        choose(name).check((found["id"], found["source"], found["ranks"]) for found in rows)


def _scored(tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    # What the actors would give back, with rewards made of the texts: a right answer says so.
    for table in tables:
        rows = table.to_pylist()
        for found in rows:
            found["rewards"] = [float(text.split()[-1]) for text in json.loads(found["completions_json"])]
            found |= {"error": None, "version": "v"}
        yield pa.Table.from_pylist(rows)


@pytest.fixture
def scored_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The command without Ray: scores are read from the texts; the list grows with every call of the scorer."""
    calls: list[int] = []

    def score(tables: Sequence[pa.Table], **_options: object) -> Iterator[pa.Table]:
        calls.append(len(tables))
        return _scored(tables)

    monkeypatch.setattr(workflow, "connect", lambda: None)
    monkeypatch.setattr(batch, "score_blocks", score)
    return calls


def evaluate_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Sequence[dict[str, Any]], *options: str) -> int:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))
    arguments = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["rayward", "evaluate", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_reports_the_sections(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, scored_calls: list[int]
) -> None:
    rows = [
        {"source": source, "prompt": f"Q{index}", "chosen": f"answer {good}", "rejected": f"other {bad}"}
        for index, (source, good, bad) in enumerate(
            [("xstest-should-refuse", 1, 0), ("xstest-should-respond", 0, 1), ("hep-go", 2, 1), ("hep-go", 1, 1), ("shp", 1, 0)]
        )
    ]
    rows.append({"source": "hep-go", "prompt": "Q9", "chosen": "same 1", "rejected": "same 1"})
    assert evaluate_command(monkeypatch, tmp_path, rows, "--benchmark", "rewardbench", "--counts", "legacy") == 0
    evaluation = Evaluation.model_validate_json((tmp_path / "out" / "metrics.json").read_text())
    found = evaluation.benchmark
    assert found is not None
    assert sections_of(found) == pytest.approx({"Safety": 250 / 404, "Reasoning": 0.5, "Prior Sets": 1.0})
    assert (found.counts, found.num_rows, found.num_scored, found.num_ties) == ("legacy", 6, 5, 1)
    assert found.overall == pytest.approx((250 / 404 + 0.5) / 2)
    assert found.deviations[0] == "1 rows have no score (identical_completions: 1)"
    assert len(scored_calls) == 1
    printed, document = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    for text in (
        "rewardbench, counts legacy",
        "Safety",
        f"{250 / 404:.3f}",
        "overall with prior sets",
        "donotanswer: 0 of 136 rows scored",
    ):
        assert text in printed
        assert text in document


def test_the_command_refuses_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, scored_calls: list[int]
) -> None:
    rows = [{"source": "my own", "prompt": "Q", "chosen": "answer 1", "rejected": "other 0"}]
    for options, message in (
        (["--benchmark", "rewardbench"], "source 'my own', which is no subset"),
        (["--benchmark", "nothing"], "benchmark is 'nothing'"),
        (["--counts", "raw"], "there is no --benchmark"),
    ):
        assert evaluate_command(monkeypatch, tmp_path, rows, *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "remedy:" in error
    assert scored_calls == []
