"""Pages from templates: values are escaped, a missing one is an error, and the templates travel with the package."""

from __future__ import annotations

import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from rayward.data.page import render

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = sorted((ROOT / "platform" / "rayward").rglob("*.j2"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_pages").mkdir()
    (tmp_path / "some_pages" / "__init__.py").touch()
    (tmp_path / "some_pages" / "page.html.j2").write_text("<p title='{{ value }}'>{{ value }}</p>\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_pages", raising=False)
    return "some_pages"


def test_every_value_is_escaped(package: str) -> None:
    found = render(package, "page.html.j2", value="<b> & 'x' \"y\"")
    assert found == "<p title='&lt;b&gt; &amp; &#39;x&#39; &#34;y&#34;'>&lt;b&gt; &amp; &#39;x&#39; &#34;y&#34;</p>\n"


def test_a_missing_value_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="'value' is undefined"):
        render(package, "page.html.j2")


def test_templates_are_package_data_and_none_switches_escaping_off() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert {path.name for path in TEMPLATES} == {"report.html.j2", "card.md.j2"}
    for path in TEMPLATES:
        assert any(fnmatch(path.name, pattern) for pattern in patterns)
        assert (path.parent / "__init__.py").exists()
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text()), path


def test_no_module_writes_tags_by_hand() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "platform" / "rayward").rglob("*.py")
        if re.search(r"<(table|html|td|div|script)\b", path.read_text(encoding="utf-8"))
    ]
    assert found == []
