"""The terminal of the commands."""

from __future__ import annotations

from rich.console import Console

console = Console(soft_wrap=True)
