"""The prepare job over sources of several shapes: mapped, by a user's own function, repeated, limited, with columns left over."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.tokenizer import make_tokenizer

from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.data.prepare.job import prepare
from rayward.errors import TooManyBadRowsError

# Ray Data 2.60 warns about its own deprecated settings whenever it copies its context.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

HOOK = """
def pairs(row):
    parts = row["blob"].split("|")
    if len(parts) != 3:
        return None, "not three parts"
    return {"format": "trl", "prompt": parts[0], "chosen": parts[1], "rejected": parts[2]}
"""


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sources_of_several_shapes_become_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer")
    hook = f"hook_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{hook}.py").write_text(HOOK)
    arena = [
        {"q": f"q{i}?", "a": {"t": f"good {i}"}, "b": {"t": f"bad {i}"}, "win": ("A", "B", "tie", "?")[i % 4], "magnitude": i}
        for i in range(60)
    ]
    late: list[dict[str, Any]] = [{"instruction": f"do {i}", "input": "", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(120)]
    own = [{"blob": f"Q{i}|A{i}|B{i}" if i else "broken"} for i in range(20)]
    late[110]["images"] = ["x.png"]  # not in the sample
    sources: list[dict[str, Any]] = [
        {
            "path": write(tmp_path / "arena.jsonl", arena),
            "columns": {"prompt": "q", "first": "a.t", "second": "b.t", "label": "win"},
            "judgement": {"first": "A", "second": "B", "tie": "tie"},
            "limit": 40,
            "repeat": 2,
        },
        {"path": write(tmp_path / "late.jsonl", late), "prompt_template": "{instruction}\n\n{input}", "ignore": ["instruction"]},
        {
            "path": write(tmp_path / "own.jsonl", own),
            "adapter": f"{hook}:pairs",
        },
    ]
    data = {"sources": sources, "validation_fraction": 0.0, "max_bad_fraction": 0.2, "rows_per_shard": 7}
    settings = {"run": {"storage_path": str(tmp_path / "runs")}, "model": {"tokenizer": str(tmp_path / "tokenizer")}, "data": data}
    config = parse_config(settings, Config)
    prepared = prepare(config)
    manifest = prepared.manifest
    assert manifest.num_quarantined == {"adapter_rejected": 1, "bad_ranking": 10, "tie": 10, "unused_column": 1}
    assert (manifest.num_input_rows, manifest.num_train, manifest.num_repeated) == (180, 178, 20)
    rows = [row for table in prepared.tables("train", ["id", "source", "prompt_json", "ranks"]) for row in table.to_pylist()]
    assert Counter(row["source"] for row in rows) == {"arena": 40, "late": 119, "own": 19}
    copies = Counter(row["id"] for row in rows if row["source"] == "arena")
    assert (len(copies), set(copies.values())) == (20, {2})
    found = {
        each.source: (each.column, each.type, each.num_rows, each.share) for each in manifest.unused_columns if each.column != "images"
    }
    assert found == {"arena": ("magnitude", "number", 40, 1.0)}
    assert manifest.told_unused()[0] == "not used of arena: magnitude (number, 100 % of rows)"
    report = json.loads(Path(prepared.directory, "report.json").read_text())
    assert {each["column"] for each in report["unused_columns"]} == {"magnitude", "images"}
    assert "magnitude" in Path(prepared.directory, "report.html").read_text()
    # The function is part of what the data is: another source of it is other data.
    (tmp_path / f"{hook}.py").write_text(HOOK.replace('three parts"', 'enough"'))
    stricter = parse_config({**settings, "data": {**data, "max_bad_fraction": 0.0}}, Config)
    with pytest.raises(TooManyBadRowsError, match="unused_column"):
        prepare(stricter)
    assert len(list((tmp_path / "runs" / "prepared").iterdir())) == 2
