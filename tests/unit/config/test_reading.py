"""How `--data` of a command becomes a `data:` block."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayward.config.data import DataConfig
from rayward.config.reading import reading_config
from rayward.errors import ConfigError


def test_without_settings_only_the_flags_count() -> None:
    assert reading_config([], ["a"], format=None, attributes=None) == DataConfig()
    assert reading_config([], ["a"], format="trl", attributes=["x"]) == DataConfig(format="trl", attributes=("x",))


def test_keys_of_a_source_and_of_the_block_may_be_mixed() -> None:
    found = reading_config(
        ["columns.prompt=q", "columns.chosen=a.0", "columns.rejected=b", "ties=keep", "data.max_bad_fraction=1"], ["x", "y"]
    )
    assert (found.ties, found.max_bad_fraction) == ("keep", 1.0)
    assert [source.path for source in found.sources] == [("x",), ("y",)]
    assert found.sources[0].columns == {"prompt": "q", "chosen": "a.0", "rejected": "b"}


def test_a_training_configuration_does_too(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        "run: {name: x}\nmodel: {max_tokens: 99}\ndata:\n  train: [t.jsonl]\n  sources:\n"
        "  - {path: a.jsonl, prompt_template: A, repeat: 3}\n  - {path: [b.jsonl, c.jsonl], prompt_template: B}\n"
    )
    found = reading_config([str(file)], ["c.jsonl", "a.jsonl", "other.jsonl"])
    assert [(source.path[0], source.prompt_template, source.role, source.repeat) for source in found.sources] == [
        ("c.jsonl", "B", "validation", 1.0),
        ("a.jsonl", "A", "validation", 1.0),
        ("other.jsonl", None, "validation", 1.0),
    ]
    assert not found.train


def test_a_single_source_is_taken_for_every_file(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text("sources: [{path: a.jsonl, prompt_template: A}]\n")
    assert [source.prompt_template for source in reading_config([str(file)], ["x", "y"]).sources] == ["A", "A"]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="colums"):
        reading_config(["colums.prompt=q"], ["x"])
