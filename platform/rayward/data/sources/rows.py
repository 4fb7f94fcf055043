"""One row of a source file, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

from rayward.data.record import BadRow


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as JSON text, or what is wrong with it."""

    number: int
    raw: str
    reason: BadRow | None = None
    detail: str = ""
