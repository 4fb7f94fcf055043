"""Pages from the templates that lie beside their modules (`*.j2`); every value is escaped unless it is `Markup`."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(package: str, template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        package: the package whose folder holds the template, such as `rayward.evaluation`.
        template: its file name; it may import from its neighbours.
        values: what the template names. A name that is missing is an error, never an empty place.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    def load(name: str) -> str:
        return resources.files(package).joinpath(name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
