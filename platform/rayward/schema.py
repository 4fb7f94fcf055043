"""What stored and configured records are built on: one frozen pydantic base, files with a version, hashes that identify things. Light."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined, to_jsonable_python


class Frozen(BaseModel):
    """Base of everything that is configured, stored or sent: unknown keys are refused, nothing changes after validation.

    The string under a field is its documentation, in JSON schemas too; units and scope are in the name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class ErrorOf(Protocol):
    """The error class of whoever reads a file."""

    def __call__(self, problem: str, *, remedy: str) -> Exception:
        """An error that says what is wrong and what to do."""
        ...


class Versioned(Frozen):
    """Base of what is kept in a file: its version is looked at before any other field, so that no file is called damaged for being new.

    A field with a default may be added without a new version: older files are read, and identities stay. The default of `version` is the
    version that is written; a file without one is of version 1.
    """

    kind: ClassVar[str]
    """What the file is, in words."""
    remedy: ClassVar[str]
    """What to do about a file that is damaged or too old."""
    oldest: ClassVar[int] = 1
    """Oldest version that is read."""
    version: int = 1

    @classmethod
    def parse(cls, text: str | bytes, *, where: str, error: ErrorOf, other_version: ErrorOf | None = None) -> Self:
        """The record in a file's text.

        Args:
            where: the file, for messages.
            error: raised for what is no such record.
            other_version: raised for what another Rayward wrote; None: `error`.
        """
        refuse = other_version or error
        try:
            raw = json.loads(text)
        except ValueError as exc:
            raise error(f"{where} is not a valid {cls.kind}: {exc}", remedy=cls.remedy) from exc
        version = raw.get("version", 1) if isinstance(raw, dict) else None
        newest: int = cls.model_fields["version"].default
        if type(version) is int and not cls.oldest <= version <= newest:
            known = f"version {newest}" if cls.oldest == newest else f"versions {cls.oldest} to {newest}"
            if version > newest:
                problem = f"{where} was written by a newer Rayward: it has version {version}; this Rayward reads {known}"
                raise refuse(problem, remedy="upgrade Rayward")
            raise refuse(f"{where} has version {version}, which is no longer read; this Rayward reads {known}", remedy=cls.remedy)
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            unknown = [".".join(map(str, e["loc"])) for e in exc.errors() if e["type"] == "extra_forbidden"]
            if unknown and len(unknown) == exc.error_count():
                names = ", ".join(unknown)
                problem = f"{where} has fields that this Rayward does not know: {names}; it was written by a newer Rayward, or by hand"
                raise refuse(problem, remedy=f"upgrade Rayward, or {cls.remedy}") from exc
            raise error(f"{where} is not a valid {cls.kind}: {exc}", remedy=cls.remedy) from exc


def digest(value: object) -> str:
    """128-bit hex hash of a JSON value; the one hash used for ids, splits and shuffling."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def identity(record: object, *, exclude: Collection[str] = ()) -> str:
    """128-bit hex hash of what a record (pydantic or dataclass) says beyond its defaults, and beyond those of the records inside it.

    A field that is added with a default therefore changes no identity until somebody sets it. Order of fields, the version of the file and
    int against float do not count either. A tag (a `Literal` of one value, or what a base class requires) counts although it has a default.

    The price: the default of a field that is in an identity never changes, because records that leave it out would mean something else
    under the same identity. Add a field of another name instead.

    Args:
        exclude: fields that do not count, of the record itself, not of records inside it.
    """
    return digest({name: value for name, value in _said_by(record).items() if name not in exclude})


def _said_by(record: object) -> dict[str, object]:
    said = {}
    for name, value, default, is_tag in _fields(record):
        content = _said(value)
        if is_tag or default is MISSING or content != _said(default):
            said[name] = content
    return said


def _said(value: object) -> object:
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        return _said_by(value)
    if isinstance(value, Mapping):
        return {str(key): _said(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_said(entry) for entry in value]
    if isinstance(value, Set):
        return sorted((_said(entry) for entry in value), key=digest)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are one setting, whoever wrote it
    return to_jsonable_python(value)


def _fields(record: object) -> Iterator[tuple[str, object, object, bool]]:
    # Name, value, default (MISSING without one), and whether the field is a tag.
    if not isinstance(record, BaseModel):
        for field in fields(record):  # type: ignore[arg-type]  # a dataclass
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            yield field.name, getattr(record, field.name), default, False
        return
    cls = type(record)
    for name, info in cls.model_fields.items():
        if name == "version" and isinstance(record, Versioned):
            continue
        default = info.get_default(call_default_factory=True)
        one_value = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        inherited = [base.model_fields[name] for base in cls.__mro__[1:] if issubclass(base, Frozen) and name in base.model_fields]
        is_tag = one_value or any(base.is_required() for base in inherited)
        yield name, getattr(record, name), MISSING if default is PydanticUndefined else default, is_tag


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a small local file so that a reader sees the old content or the new one, whatever dies: beside it, then renamed.

    Raises:
        OSError: it cannot be written; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with beside.open("xb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
