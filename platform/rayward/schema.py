"""What every stored or configured record is built on: one frozen pydantic base, and the hashes that identify things. Light."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of everything that is configured, stored or sent: unknown keys are refused, nothing changes after validation.

    The string under a field is its documentation, in JSON schemas too; units and scope are in the name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


def digest(value: object) -> str:
    """128-bit hex hash of a JSON value; the one hash used for ids, splits and shuffling."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
