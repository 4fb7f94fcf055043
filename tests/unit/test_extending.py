"""docs/extending.md names folders, files and tables that are there, and the README's tree every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "rayward"
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
ROWS = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| an? .*$", PAGE, flags=re.MULTILINE)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
def test_a_row_of_the_table_names_a_folder_and_the_file_of_its_list(row: list[str]) -> None:
    assert (ROOT / row[0]).is_dir()
    assert list(PACKAGE.glob(f"**/{row[-1]}"))


def test_every_answer_has_its_section() -> None:
    assert len(ROWS) >= 4
    for thing in ("dialect", "suite", "objective", "label"):
        assert re.search(rf"^## Add an? {thing}$", PAGE, flags=re.MULTILINE)


def test_paths_in_the_answers_exist() -> None:
    named = {path for path in re.findall(r"`((?:platform|tests|jobs|docs)/[\w./]+)`", PAGE) if "<" not in path}
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_tree_of_the_readme_names_every_room_and_module() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    names = set(re.findall(r"\w+", tree))
    rooms = {path.parent.relative_to(PACKAGE).parts for path in PACKAGE.rglob("__init__.py")}
    assert {room[-1] for room in rooms if room} <= names
    by_kind = {"config", "objectives", "workflows", "demo", "client"}  # a block, a family, a command a file
    modules = {path.stem for path in PACKAGE.glob("*/*.py") if path.parent.name not in by_kind} - {"__init__", "__main__"}
    assert sorted(modules - names) == []
