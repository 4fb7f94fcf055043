"""What the name of a file says: its kind, its compression, the data set and the split it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["json", "csv", "parquet", "arrow"]
Compression = Literal["gzip", "zstd", "xz", "bz2", "lz4"]
Role = Literal["train", "validation", "contamination"]

SUFFIXES: Mapping[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS: Mapping[str, Compression] = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".xz": "xz",
    ".bz2": "bz2",
    ".lz4": "lz4",
}
TEXT_KINDS = ("json", "csv")
_TEXT = ", ".join(suffix for suffix, kind in SUFFIXES.items() if kind in TEXT_KINDS)
_COLUMNS = ", ".join(suffix for suffix, kind in SUFFIXES.items() if kind not in TEXT_KINDS)
READABLE = f"use {_TEXT} (plain, or with {', '.join(COMPRESSIONS)} behind it), {_COLUMNS}, or a directory of datasets' save_to_disk"
"""What can be read, as a remedy says it."""

HELD_OUT = "held out"
TRAIN = "train"
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing|set)?)|(?P<test>test(?:s|ing|set)?)|(?P<validation>val(?:id(?:ation)?)?(?:set)?)"
    r"|(?P<dev>dev(?:el|set)?)|(?P<eval>eval(?:s|uation|set)?)|(?P<held_out>h[eo]ld[-_. ]?out))(?![a-z])"
)
_SHARD = re.compile(r"[-_.]?\d{3,}([-_]of[-_]\d+)?$")
_GENERIC = {"", "part", "shard", "train", "test", "validation", "data"}


def kind_of(path: str) -> tuple[Kind, Compression | None] | None:
    """Kind and compression by the suffixes; None: it cannot be read (columnar files compress their own columns)."""
    name = path.lower()
    compression = next((value for suffix, value in COMPRESSIONS.items() if name.endswith(suffix)), None)
    kind = SUFFIXES.get(PurePosixPath(plain_name(name)).suffix)
    return None if kind is None or (compression and kind not in TEXT_KINDS) else (kind, compression)


def plain_name(path: str) -> str:
    """The path without the suffix of a compression."""
    return next((path[: -len(suffix)] for suffix in COMPRESSIONS if path.lower().endswith(suffix)), path)


def source_name(path: str) -> str:
    """`…/set-a/train-00003-of-00010.parquet` -> `set-a`; `…/pairs.jsonl.gz` -> `pairs`."""
    parts = PurePosixPath(path)
    stem = _SHARD.sub("", plain_name(parts.name).rpartition(".")[0])
    if stem.lower() not in _GENERIC:
        return stem
    folder = parts.parent
    if folder.name.lower() in {"train", "test", "validation"} and folder.parent.name:
        folder = folder.parent
    return folder.name or stem or "data"


def split_words(text: str) -> frozenset[str]:
    """The splits that a text names: train, test, validation, dev, eval, held_out; each a word between anything but letters."""
    return frozenset(str(match.lastgroup) for match in _SPLIT.finditer(text.lower()))


def split_of(parts: Iterable[str]) -> tuple[str, frozenset[str]] | None:
    """What the file's name, else its nearest folder, says: HELD_OUT or TRAIN, and the words that say it; None: nothing.

    Args:
        parts: the path below what the user named, the file last.
    """
    for part in reversed(list(parts)):
        words = split_words(part)
        if words - {"train"}:
            return HELD_OUT, words - {"train"}
        if words:
            return TRAIN, words
    return None
