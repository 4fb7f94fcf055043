"""`data.adapter`: a user's own function as an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.data.formats.hook import Adapter, Module, adapter_fingerprint, load_adapter, read_adapter
from rayward.data.formats.table import adapt, choose_format, columns_of
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.rows import adapt as adapt_rows
from rayward.data.record import Comparison
from rayward.errors import ConfigError, DataFormatError

SOURCE = """
def pairs(row):
    kind = row["kind"]
    if kind == "none":
        return None
    if kind == "reason":
        return None, "too old"
    if kind == "refuse":
        raise ValueError("no such speaker")
    if kind == "crash":
        return row["missing"]
    if kind == "odd":
        return ["x"]
    if kind == "format":
        return {"format": "no-such-format"}
    if kind == "unread":
        return {"format": "trl", "prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}
    if kind == "ranking":
        return {"format": "ranking", "prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 3, 2]}
    row["text"].append("!")
    return {"prompt": row["text"][0], "chosen": row["text"][1], "rejected": row["text"][2]}
"""
ROW: dict[str, Any] = {"kind": "pair", "text": ["q", "a", "b"], "system": "ignored by the function", "score": 3}


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory; its name is the test's own, because Python keeps modules."""
    monkeypatch.chdir(tmp_path)
    name = f"hook_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return f"{name}:pairs"


def read(hook: str, row: dict[str, Any], **settings: Any) -> Comparison:
    name, options = choose_format([row], DataConfig(adapter=hook, **settings), where="f", source="set")
    return adapt(name, columns_of(name, options), row, options)


def test_rows_of_a_known_format_are_read_as_such(hook: str) -> None:
    found = read(hook, ROW)
    assert (found.prompt[0]["content"], found.completions, found.ranks, found.source) == ("q", ("a", "b"), (0.0, 1.0), "set")
    assert ROW["text"] == ["q", "a", "b"]  # the function got a row of its own
    assert read(hook, {"kind": "ranking"}).ranks == (1.0, 3.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "reason", "detail"),
    [
        ("none", "adapter_rejected", "without a reason"),
        ("reason", "adapter_rejected", "too old"),
        ("refuse", "adapter_rejected", "no such speaker"),
        ("crash", "adapter_failed", "KeyError: 'missing'"),
        ("odd", "adapter_failed", "returned list"),
        ("format", "adapter_failed", "no-such-format"),
        ("unread", "unused_column", "images"),
    ],
)
def test_a_row_that_it_does_not_give_is_quarantined(hook: str, kind: str, reason: str, detail: str) -> None:
    reading = choose_format([ROW], DataConfig(adapter=hook), where="f", source="set")
    raw = [{"kind": "row", "role": "train", "file": "f", "number": 1, "raw": json.dumps({**ROW, "kind": kind})}]
    (draft,) = adapt_rows(pa.Table.from_pylist(raw, READ_SCHEMA), Adaptation({"f": reading}, "quarantine"))
    assert draft.reason == reason
    assert detail in (draft.detail or "")


def test_a_function_that_takes_no_row_of_the_sample_is_an_error(hook: str) -> None:
    with pytest.raises(DataFormatError, match=r"none of the first 1 rows gets through the mapping.*too old"):
        read(hook, {**ROW, "kind": "reason"})


def test_only_the_sources_that_name_it_use_it(hook: str) -> None:
    config = parse_config({"sources": [{"path": "a", "adapter": hook}, {"path": "b"}]}, DataConfig)
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    used = [
        choose_format([row], config, where="f", source="s", mapping=s)[1].adapter
        for s, row in zip(config.sources, (ROW, plain), strict=True)
    ]
    assert [each and each.name for each in used] == [hook, None]


@pytest.mark.parametrize("name", ["no_such_module_at_all:f", "json:no_such_function", "json:__name__"])
def test_what_cannot_be_imported_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"data\.adapter '{name}'"):
        read_adapter(name)


def test_the_fingerprint_follows_the_source(hook: str, tmp_path: Path) -> None:
    before = adapter_fingerprint(hook)
    assert adapter_fingerprint(hook) == before
    file = tmp_path / f"{hook.partition(':')[0]}.py"
    file.write_text(SOURCE.replace("too old", "too new"))
    assert adapter_fingerprint(hook) != before


def test_modules_beside_it_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tag = tmp_path.name.replace("-", "_")
    (tmp_path / f"helper_{tag}.py").write_text("def clean(text):\n    return text\n")
    (tmp_path / f"user_{tag}.py").write_text(f"from helper_{tag} import clean\n\ndef f(row):\n    return row\n")
    before = adapter_fingerprint(f"user_{tag}:f")
    (tmp_path / f"helper_{tag}.py").write_text("def clean(text):\n    return text.strip()\n")
    assert adapter_fingerprint(f"user_{tag}:f") != before


def test_what_runs_is_the_text_and_no_worker_needs_the_files(hook: str, tmp_path: Path) -> None:
    adapter = read_adapter(hook)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    moved = Adapter("elsewhere:pairs", (Module("elsewhere", "/no/such/place.py", False, adapter.modules[0].text),))
    assert load_adapter(moved)(dict(ROW, text=["q", "a", "b"]))["chosen"] == "a"


def test_an_edited_file_is_read_again_in_the_same_process(hook: str, tmp_path: Path) -> None:
    assert read(hook, {**ROW, "text": ["q", "a", "b"]}).completions == ("a", "b")
    file = tmp_path / f"{hook.partition(':')[0]}.py"
    file.write_text(SOURCE.replace('row["text"][1]', '"new"'))
    assert read(hook, {**ROW, "text": ["q", "a", "b"]}).completions == ("new", "b")


def test_modules_of_a_package_travel_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / f"pack_{tmp_path.name.replace('-', '_')}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("GOOD = 'a'\n\ndef good():\n    return GOOD\n")
    (package / "hooks.py").write_text(
        f"import rayward\nfrom {package.name}.words import good\n\ndef f(row):\n"
        "    return {'prompt': 'q', 'chosen': good(), 'rejected': 'b'}\n"
    )
    adapter = read_adapter(f"{package.name}.hooks:f")
    assert [module.name.removeprefix(package.name) for module in adapter.modules] == ["", ".hooks", ".words"]
    assert load_adapter(adapter)({})["chosen"] == "a"
