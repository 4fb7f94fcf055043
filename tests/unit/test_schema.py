from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from rayward.contract.contract import Contract
from rayward.errors import CheckpointVersionError, ContractError
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.rankings import PlackettLuceObjective
from rayward.schema import Frozen, Versioned, digest, identity, write_atomically
from rayward.scoring.combining import EnsembleRule, ImplicitRule

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


class Part(Frozen):
    name: str
    note: str | None = None


class LaterPart(Part):
    size: int = 3


class Whole(Versioned):
    kind: ClassVar[str] = "whole"
    remedy: ClassVar[str] = "make it again"
    oldest: ClassVar[int] = 2
    version: int = 3
    name: str
    scale: float = 1.0
    parts: tuple[Part, ...] = ()
    by_name: Mapping[str, Part] = Field(default_factory=dict)


class LaterWhole(Whole):
    version: int = 4
    parts: tuple[LaterPart, ...] = ()
    by_name: Mapping[str, LaterPart] = Field(default_factory=dict)
    colour: str = "red"
    inner: LaterPart = LaterPart(name="x")


CONTENT = {"name": "a", "scale": 2.5, "parts": [{"name": "p", "note": "n"}, {"name": "q"}], "by_name": {"k": {"name": "r"}}}


def test_an_identity_is_the_hash_of_what_is_not_default() -> None:
    assert identity(Whole.model_validate(CONTENT)) == digest(CONTENT) == "813dc958229ec478537b53df44ee46e6"
    assert identity(Whole(name="a", scale=1.0, parts=())) == digest({"name": "a"})


def test_a_later_field_with_a_default_changes_no_identity_at_any_depth() -> None:
    whole, later = Whole.model_validate(CONTENT), LaterWhole.model_validate(CONTENT)
    assert later.version != whole.version
    assert identity(later) == identity(whole)
    deep = {**CONTENT, "by_name": {"k": {"name": "r", "size": 4}}}
    changed = [{**CONTENT, "colour": "blue"}, {**CONTENT, "inner": {"name": "x", "size": 1}}, deep]
    assert len({identity(LaterWhole.model_validate(content)) for content in (CONTENT, *changed)}) == 4


def test_the_order_of_fields_and_the_type_of_a_number_do_not_count() -> None:
    class Swapped(Frozen):
        parts: tuple[Part, ...] = ()
        scale: int = 7
        name: str = ""

    assert identity(Swapped(name="a", scale=2)) == identity(Whole(name="a", scale=2.0))


def test_fields_are_left_out_by_name_in_the_record_itself_only() -> None:
    whole = Whole.model_validate(CONTENT)
    without = identity(whole, exclude={"name"})
    assert without == identity(Whole.model_validate({**CONTENT, "name": "other"}), exclude={"name"})
    assert without != identity(whole.model_copy(update={"parts": (Part(name="z"),)}), exclude={"name"})


def test_records_of_two_methods_with_defaults_alone_are_told_apart() -> None:
    class Untagged(BradleyTerryObjective):
        type: str = "untagged"  # type: ignore[assignment]

    class Holder(Frozen):
        method: Frozen = BradleyTerryObjective()

    methods = (BradleyTerryObjective(), PlackettLuceObjective(), Untagged())
    assert len({identity(Holder(method=method)) for method in methods}) == 3
    assert identity(Holder(method=BradleyTerryObjective())) == identity(Holder()) == digest({})


def test_dataclasses_have_identities_too() -> None:
    @dataclass(frozen=True)
    class Sampling:
        temperature: float = 0.0
        seed: int = 0

    @dataclass(frozen=True)
    class Later(Sampling):
        top_p: float = 1.0
        stop: tuple[str, ...] = field(default_factory=tuple)

    assert identity(Sampling(0.7)) == identity(Later(0.7)) == digest({"temperature": 0.7})
    assert identity(Later(0.7, top_p=0.9)) != identity(Sampling(0.7))


def parse(text: str) -> Whole:
    return Whole.parse(text, where="dir/whole.json", error=ContractError, other_version=CheckpointVersionError)


@pytest.mark.parametrize("text", ['{"version": 3, "name": "a"}', '{"version": 2, "name": "a"}'])
def test_versions_in_the_range_are_read(text: str) -> None:
    assert parse(text).name == "a"


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        ('{"version": 4, "nothing": "known"}', "dir/whole.json was written by a newer Rayward: it has version 4", "upgrade Rayward"),
        ('{"version": 1, "name": "a"}', "version 1, which is no longer read; this Rayward reads versions 2 to 3", "make it again"),
        ('{"name": "a"}', "version 1, which is no longer read", "make it again"),
        (
            '{"version": 3, "name": "a", "tone": 1, "parts": [{"name": "p", "hue": 2}]}',
            r"not know: parts\.0\.hue, tone; .* newer",
            "upgrade",
        ),
    ],
)
def test_what_another_rayward_wrote_is_not_called_damaged(text: str, says: str, remedy: str) -> None:
    with pytest.raises(CheckpointVersionError, match=says) as caught:
        parse(text)
    assert remedy in caught.value.remedy
    assert "not a valid" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"version": 3}', '{"version": "x", "name": "a"}', '{"version": 3, "name": 1, "tone": 2}', "\x00"]
)
def test_what_is_no_such_record_is_not_valid(text: str) -> None:
    with pytest.raises(ContractError, match=r"dir/whole\.json is not a valid whole: ") as caught:
        parse(text)
    assert caught.value.remedy == "make it again"


def test_a_tag_is_kept_where_it_stands_alone() -> None:
    class Tagged(Frozen):
        kind: Literal["one"] = "one"
        level: Literal["low", "high"] = "low"

    assert identity(Tagged()) == digest({"kind": "one"})


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "contract.json"
    write_atomically(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["contract.json"])
    write_atomically(path, "ü")
    assert (path.read_bytes(), os.listdir(tmp_path)) == ("ü".encode(), ["contract.json"])


@pytest.mark.parametrize(
    ("kind", "file", "later"),
    [
        (Contract, "contract_v1", {"max_tokens": 8}),
        (EnsembleRule, "ensemble_v1", {"penalty": 2.0}),
        (ImplicitRule, "implicit_v1", {"beta": 2.0}),
    ],
)
def test_contracts_and_rules_are_saved_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any], file: str, later: dict[str, Any]
) -> None:
    record = kind.load(FIXTURES / file)
    record.save(tmp_path)

    def killed(*_paths: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(OSError, match="killed"):
            record.model_copy(update=later).save(tmp_path)
    assert kind.load(tmp_path) == record
    assert len(os.listdir(tmp_path)) == 1


def test_a_reader_with_the_file_open_keeps_what_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "contract.json"
    write_atomically(path, "old " * 1000)
    with path.open() as reader:
        begun = reader.read(4)
        write_atomically(path, "new")
        assert begun + reader.read() == "old " * 1000
