from __future__ import annotations

import base64
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from tests.unit.evaluation.table import evaluation_of, make_records, pair

from rayward.evaluation.plots import write_plots
from rayward.evaluation.records import BenchmarkScores, BenchmarkSection, Evaluation, Record
from rayward.evaluation.report import print_table, verdict, write_report
from rayward.evaluation.run import write_results


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluation_of(make_records(400))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_four_plots_of_readable_size(evaluation: Evaluation, tmp_path: Path) -> None:
    plots = write_plots(evaluation, tmp_path)
    assert [plot.name for plot in plots] == ["rewards.png", "reliability.png", "accuracy_by_length.png", "accuracy_by_source.png"]
    for plot in plots:
        width, height = png_size(plot)
        assert 800 <= width <= 2000
        assert 300 <= height <= 2000


@pytest.mark.parametrize(
    "records",
    [
        [pair("one", rewards=(1.0, 0.0))],
        [pair(f"r{i}", rewards=(0.5, 0.5), lengths=(4, 4)) for i in range(3)],
        [pair(f"r{i}", rewards=(1e6 + i, -1e6)) for i in range(3)],
        [pair(f"r{i}", rewards=(1.0 + i, 0.0)).model_copy(update={"source": f"source-{i}"}) for i in range(25)],
    ],
    ids=["one pair", "all ties", "huge rewards", "many sources"],
)
def test_plots_and_report_of_odd_tables(records: list[Record], tmp_path: Path) -> None:
    plots = write_results(evaluation_of(records), tmp_path)
    assert all(png_size(plot)[0] > 0 for plot in plots)
    assert (tmp_path / "report.html").stat().st_size > 10_000


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src") and tag != "img"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_report_is_one_well_formed_file_that_fetches_nothing(evaluation: Evaluation, tmp_path: Path) -> None:
    plots = write_plots(evaluation, tmp_path)
    write_report(evaluation, tmp_path / "report.html", plots)
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(document)
    page.close()
    assert page.open == []
    assert page.links == []
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", document)
    embedded = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images]
    assert embedded == [plot.read_bytes() for plot in plots]


def test_report_shows_numbers_with_intervals_and_escapes_names(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(evaluation, tmp_path / "report.html", ())
    page = _Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    for row in evaluation.rows:
        assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", str(row.accuracy))
        assert page.text.count(str(row.accuracy)) >= 1
    for group in (*evaluation.by_source, *evaluation.by_length):
        assert group.name in page.text
    assert "<b>arithmetic</b> | x" in page.text
    assert "row-7" in page.text
    assert "the last user turn takes <3,000> tokens" in page.text
    assert str(evaluation.num_errors) in page.text


def test_no_text_of_the_data_becomes_html(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"onload="
    records = [pair(f"{evil}{i}", rewards=(1.0, 0.0)).model_copy(update={"source": f"{evil}{i % 2}"}) for i in range(6)]
    records.append(records[0].model_copy(update={"id": evil, "rewards": None, "error_code": "too_long", "error": evil}))
    evaluation = evaluation_of(records).model_copy(
        update={
            "model": evil,
            "model_version": evil,
            "data": (evil,),
            "benchmark": BenchmarkScores(
                name=evil,
                counts=evil,
                overall=0.5,
                overall_with_prior=None,
                sections=(BenchmarkSection(name=evil, value=0.5, num_rows=1, num_ties=0, parts=()),),
                num_rows=1,
                num_scored=1,
                num_ties=0,
                deviations=(evil,),
            ),
        }
    )
    plot = tmp_path / "<img src=x>.png"
    plot.write_bytes(b"png")
    write_report(evaluation, tmp_path / "report.html", (plot,))
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in document
    assert "<img src=x" not in document
    page = _Page()
    page.feed(document)
    assert page.open == []
    for text in (evil, f"{evil}1", f"Benchmark: {evil}, counts {evil}", f"Evaluation of {evil}"):
        assert text in page.text


def test_terminal_table(evaluation: Evaluation) -> None:
    console = Console(width=120, record=True, force_terminal=False, file=None, quiet=False)
    with console.capture() as capture:
        print_table(evaluation, console)
    printed = capture.get()
    assert "runs/<demo>[bold]" in printed
    for row in evaluation.rows:
        assert re.search(rf"{row.name} .*{re.escape(str(row.accuracy))}", printed)
    assert f"400 comparisons: {evaluation.num_scored} scored, {evaluation.num_errors} errors (too_long: {evaluation.num_errors})" in printed


def test_verdict_needs_both_baselines() -> None:
    right = [pair(f"r{i}", rewards=(1.0, 0.0), lengths=(3, 5)) for i in range(50)]
    assert verdict(evaluation_of(right))[0]
    like_longer = [pair(f"r{i}", rewards=(1.0, 0.0), lengths=(5, 3)) for i in range(50)]
    good, sentence = verdict(evaluation_of(like_longer))
    assert not good
    assert "“the longer one wins”" in sentence
    assert "coin" not in sentence
    wrong = [pair(f"r{i}", rewards=(0.0, 1.0), lengths=(5, 3)) for i in range(50)]
    good, sentence = verdict(evaluation_of(wrong))
    assert not good
    assert "nor than" in sentence
