"""The page at `/`: one HTML document without any outside asset, made of the files of this folder. Nothing on it needs Ray or torch.

    content, headers = document()

Its scripts and styles are allowed by their hashes alone, so that a text which slipped into the markup could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

MEDIA_TYPE = "text/html; charset=utf-8"
SCRIPTS = ("dom.js", "net.js", "compose.js", "trace.js", "results.js", "live.js", "main.js")


@cache
def document() -> tuple[bytes, Mapping[str, str]]:
    """The whole document, and the headers that it is to be sent with."""
    folder = files(__name__)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    parts = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    whole = folder.joinpath("page.html").read_text(encoding="utf-8")
    whole = whole.replace("/*style*/", style, 1).replace("/*script*/", script, 1)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return whole.encode("utf-8"), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
