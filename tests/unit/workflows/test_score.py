"""`rayward score` without Ray: lines from standard input, and rows of files to standard output."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.models import make_export

from rayward import cli
from rayward.config.placement import Placement
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.workflows.score import score_lines

GOOD: dict[str, Any] = {"prompt": "Name a colour.", "completions": ["Red.", "Rust, which is a kind of red."]}
OTHER = {"prompt": "Hi", "completions": ["Hello"]}
TWO_ON_A_LINE = json.dumps(GOOD) + ", " + json.dumps(OTHER)
SMUGGLED = json.dumps(GOOD)[:-1] + '}], "items": [' + json.dumps(OTHER)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export", outputs=("a", "b"), reward_weights=(1.0, 0.5))


@pytest.fixture(scope="module")
def rewards(model: Path) -> tuple[float, ...]:
    item = ScoreItem(({"role": "user", "content": "Name a colour."},), tuple(GOOD["completions"]))
    found = Scorer.load(model, device="cpu").score([item])
    assert found[0].rewards is not None
    return found[0].rewards


Capture = pytest.CaptureFixture[str]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: object, stdin: bytes = b"", code: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Result lines and messages of the command line, which must end with a code."""
    monkeypatch.setattr(sys, "argv", ["rayward", "score", *map(str, arguments), "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, error = capsys.readouterr()
    assert (caught.value.code or 0) == code, error
    assert "Traceback" not in error
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], error


def test_many_lines_go_through_the_model_together_and_come_back_in_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    score = Scorer.score

    def counted(self: Scorer, items: Any) -> Any:
        calls.append(len(items))
        return score(self, items)

    monkeypatch.setattr(Scorer, "score", counted)
    lines: list[str | bytes] = [json.dumps({**OTHER, "completions": ["x" * (i % 9 + 1)], "id": i}) for i in range(300)]
    lines[7], lines[100] = "{broken", ""
    calls.clear()
    found = list(score_lines(str(model), lines, placement=Placement(device="cpu", verify=False)))
    assert calls == [255, 43]
    assert [line.get("id") for line in found] == [None if i == 7 else i for i in range(300) if i != 100]
    assert [i for i, line in enumerate(found) if "error" in line] == [7]


def test_lines_of_standard_input(model: Path, rewards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps({**GOOD, "id": "first"}).encode(),
        b"",
        TWO_ON_A_LINE.encode(),
        SMUGGLED.encode(),
        b'{"prompt": "a", "completions": ["\xff"], "id": 3}',
        json.dumps({**GOOD, "weights": "none such", "id": [1]}).encode(),
        json.dumps({**GOOD, "weights": "none such", "id": None}).encode(),
        json.dumps({"prompt": "Hi", "completion": "word " * 300, "id": 5.5}).encode(),
        json.dumps(GOOD).encode(),
    ]
    for stdin in (b"\r\n".join(lines), gzip.compress(b"\n".join(lines))):
        found, error = run(monkeypatch, capsys, model, stdin=stdin, code=1)
        assert [line.get("error", {}).get("code") for line in found] == [
            None, "invalid_item", "invalid_item", "invalid_item", "invalid_item", "unknown_weights", "too_long", None,
        ]  # fmt: skip
        assert [line.get("id", "none") for line in found] == ["first", "none", "none", "none", "none", None, 5.5, "none"]
        for line in (found[0], found[-1]):
            assert line["rewards"] == pytest.approx(rewards, abs=1e-5)
            assert list(line["outputs"][0]) == ["a", "b"]
        assert "rows: 8 = 2 scored + 6 with an error (invalid_item 4, unknown_weights 1, too_long 1)" in error
        assert "line 3" in error


def test_rows_of_files_of_every_kind(
    model: Path, rewards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps({**GOOD, 'id': 1, 'note': 'x'})}\n{TWO_ON_A_LINE}\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    (tmp_path / "c.json").write_text(json.dumps([GOOD, OTHER]))
    pq.write_table(pa.Table.from_pylist([{**GOOD, "id": 9, "temperature": None}]), tmp_path / "d.parquet")
    found, error = run(monkeypatch, capsys, model, tmp_path, code=1)
    assert [(Path(line["file"]).name, line["row"], line.get("id")) for line in found] == [
        ("a.jsonl", 2, 1), ("a.jsonl", 3, None), ("b.jsonl.gz", 1, None), ("c.json", 1, None), ("c.json", 2, None), ("d.parquet", 1, 9),
    ]  # fmt: skip
    for place in (0, 2, 3, 5):
        assert found[place]["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert found[1]["error"]["code"] == "unparsable"
    assert "not used: 'note' (17% of the rows)" in error
    assert f"unparsable, for example {tmp_path / 'a.jsonl'} row 3" in error
    kept, _ = run(monkeypatch, capsys, model, tmp_path / "a.jsonl", "--keep-columns", code=1)
    assert (kept[0]["note"], kept[0]["prompt"]) == ("x", "Name a colour.")


def test_completions_of_preference_data_and_of_columns_of_any_name(
    model: Path, rewards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    first, second = GOOD["completions"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": GOOD["prompt"], "chosen": second, "rejected": first}) + "\n")
    (found,), _ = run(monkeypatch, capsys, model, tmp_path / "pairs.jsonl", "--format", "auto")
    assert found["rewards"] == pytest.approx(rewards[::-1], abs=1e-5)
    row = {"ask": {"text": GOOD["prompt"]}, "samples": [first, second], "temperature": 0.7}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    mapped = ("--data", "columns.prompt=ask.text", "--data", "columns.completions=samples")
    (found,), error = run(monkeypatch, capsys, model, tmp_path / "own.jsonl", *mapped)
    assert found["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert "not used: 'temperature'" in error
    # A judgement does not change a score, a text does.
    (tmp_path / "judged.jsonl").write_text(json.dumps({**row, "label": 2, "scores": [1, 2]}) + "\n")
    (found,), error = run(monkeypatch, capsys, model, tmp_path / "judged.jsonl", *mapped)
    assert found["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert "'label'" in error
    (tmp_path / "more.jsonl").write_text(json.dumps({**row, "system": "Rhyme.", "context": "Blue."}) + "\n")
    _, error = run(monkeypatch, capsys, model, tmp_path / "more.jsonl", *mapped, code=1)
    assert "context" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-", "x.jsonl"), "the rule is - alone"),
        (("-", "--output", "x"), "are for files"),
        (("-", "--format", "auto"), "are for files"),
        (("x.jsonl", "--scorers", "2"), "are for --output"),
        (("x.jsonl", "--rows-per-part", "2"), "are for --output"),
        (("x.jsonl", "--output", "x", "--output-format", "csv"), "parquet or jsonl"),
        (("x.jsonl", "--format", "no_such"), "no_such"),
        (("x.jsonl", "--data", "limit=3"), "limit"),
        (("absent.jsonl",), "absent.jsonl cannot be read"),
    ],
)
def test_options_that_contradict_each_other_are_said_before_anything_is_loaded(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD) + "\n")
    _, error = run(monkeypatch, capsys, "no-model", *arguments, code=2)
    assert says in error
    assert "remedy:" in error


def test_a_damaged_file_and_an_empty_one_are_errors(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 50)[:-9])
    _, error = run(monkeypatch, capsys, model, tmp_path / "a.jsonl.gz", code=2)
    assert "damaged" in error
    (tmp_path / "b.jsonl").write_text("\n")
    _, error = run(monkeypatch, capsys, model, tmp_path / "b.jsonl", code=2)
    assert "no rows" in error
