"""Who may ask: bearer keys from a file or the environment, what each may do, and how much of it.

    file          one JSON object a line: {"name": str, "key": str | "sha256": hex, "scopes"?: ["score", "admin"], "requests_per_s"?: float,
                  "tokens_per_s"?: float, "max_concurrent"?: int, "max_body_bytes"?: int}; empty lines and lines of # are passed over
    environment   RAYWARD_API_KEYS="name:key[:scope[+scope]], ..."; instead of a key its digest: "name:sha256=<hex>"

A key is kept as its SHA-256 only, and compared in constant time. The file is read again when it changes: a key that was taken out is
refused from the next request on. A file that has gone leaves no key; one that cannot be read any more leaves those that were read last, and
the log says so. Only who holds a key of scope `admin` may publish, whoever else may score.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, ValidationError

from rayward.config.scoring import ScoringConfig
from rayward.errors import AccessError, ConfigError
from rayward.schema import Frozen

logger = logging.getLogger("ray.serve")

KEYS_VARIABLE = "RAYWARD_API_KEYS"
MIN_KEY_CHARS = 16
"""Shorter keys can be found by trying."""

LOOK_AGAIN_S = 1.0
"""How often the file's time of change is looked at."""

Scope: TypeAlias = Literal["score", "admin"]

_FORM = 'one {"name": str, "key": str or "sha256": hex, "scopes"?: ["score", "admin"]} a line'
_DIGEST = "sha256="


class KeyLimits(Frozen):
    """How much the holder of one key may send; None: as much as the server takes."""

    requests_per_s: float | None = Field(None, gt=0.0)
    tokens_per_s: float | None = Field(None, gt=0.0)
    max_concurrent: int | None = Field(None, ge=1)
    max_body_bytes: int | None = Field(None, ge=1)


NO_LIMITS = KeyLimits()


class _Entry(KeyLimits):
    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    key: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")
    scopes: tuple[Scope, ...] = ("score",)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key, or the address of somebody without one; stands in logs and metrics.
        scopes: what it may do.
    """

    name: str
    scopes: frozenset[Scope]
    limits: KeyLimits = NO_LIMITS

    def require(self, scope: Scope) -> None:
        """Refuse what the caller may not do.

        Raises:
            AccessError: 403.
        """
        if scope not in self.scopes:
            held = ", ".join(sorted(self.scopes)) or "none"
            raise AccessError(
                f"this needs a key of scope {scope}, and that of {self.name} has: {held}", remedy="use a key of that scope", status=403
            )


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    caller: Caller


class Keys:
    """The keys that are valid now.

    Args:
        path: of the file; None: the keys of `fixed` stay as they are.
        allow_anonymous: whether a caller without a key may score from any address; without keys, one from this machine always may.

    Raises:
        ConfigError: the file is not what it should be.
    """

    def __init__(
        self,
        fixed: Sequence[_Key] = (),
        *,
        path: Path | None = None,
        allow_anonymous: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = tuple(fixed)
        self._path = path
        self._clock = clock
        self._allow_anonymous = allow_anonymous
        self._stamp = self._stamp_of_file()
        self._looked_at_s = clock()
        if path is not None:
            self._keys = read_keys(path)

    @classmethod
    def of(cls, config: ScoringConfig, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> Keys:
        """The keys of a configuration: of its file, else of RAYWARD_API_KEYS.

        Raises:
            ConfigError: the file or the variable is not what it should be.
        """
        if config.keys_file is not None:
            return cls(path=Path(config.keys_file).expanduser(), allow_anonymous=config.allow_anonymous, clock=clock)
        fixed = parse_variable(environment.get(KEYS_VARIABLE, ""))
        return cls(fixed, allow_anonymous=config.allow_anonymous, clock=clock)

    @property
    def required(self) -> bool:
        """Whether keys are given at all; a file that lost all of them still asks for one."""
        return self._path is not None or bool(self._keys)

    @property
    def score_needs_key(self) -> bool:
        """Whether nobody scores without one."""
        return self.required and not self._allow_anonymous

    def caller_of(self, authorization: str | None, address: str | None, host: str | None = None) -> Caller:
        """Who sends a request.

        Args:
            authorization: the header.
            address: of the peer; None: unknown, taken for another machine's.
            host: the header. A server without keys is called by no name of the internet: such a request comes through a proxy on this
                machine, or from a page in its browser whose name was made to point here.

        Raises:
            AccessError: 401: the key is not known, or there is none where one is needed.
        """
        if authorization is not None and self.required:
            return self._caller_of_key(authorization)
        if self._allow_anonymous or (not self.required and is_loopback(address) and not is_domain(host)):
            return Caller(address or "unknown", frozenset({"score"}))
        raise AccessError(
            "there is no key in this request",
            remedy="send `Authorization: Bearer <key>`"
            if self.required
            else f"give the server keys (keys_file or {KEYS_VARIABLE}), or allow_anonymous: true",
        )

    def _caller_of_key(self, authorization: str) -> Caller:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            # Clients that can be given an address and nothing else put a key into it: http://any:<key>@host.
            given = _password_of(given)
        elif scheme.lower() != "bearer":
            given = ""
        if not given.strip():
            raise AccessError(
                "the Authorization header is not of the form `Bearer <key>`, or Basic with the key as password",
                remedy="send it in that form",
            )
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        # All of them, and each in constant time: how long it takes says nothing about the keys.
        for key in self._current():
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        if found is None:
            raise AccessError("this key is not known here, or was revoked", remedy="ask the operator for a key")
        return found

    def _current(self) -> tuple[_Key, ...]:
        now = self._clock()
        if self._path is None or now - self._looked_at_s < LOOK_AGAIN_S:
            return self._keys
        self._looked_at_s = now
        stamp = self._stamp_of_file()
        if stamp == self._stamp:
            return self._keys
        self._stamp = stamp
        if stamp is None:
            logger.error("the file of keys %s is gone: no key is valid until it is back", self._path)
            self._keys = ()
            return self._keys
        try:
            self._keys = read_keys(self._path)
            logger.info("the file of keys was read again: %d keys", len(self._keys))
        except ConfigError as exc:
            logger.error("the file of keys cannot be read any more, the former keys stay valid: %s", exc.problem)
        return self._keys

    def _stamp_of_file(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_keys(path: Path) -> tuple[_Key, ...]:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read, or a line is not a key; the message names the line and never quotes it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the file of keys {path} cannot be read ({exc})", remedy=f"write {_FORM}, in UTF-8") from exc
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_key_of(line, f"{path}, line {number}"))
    return _distinct(keys, str(path))


def parse_variable(text: str) -> tuple[_Key, ...]:
    """The keys of RAYWARD_API_KEYS.

    Raises:
        ConfigError: an entry is not a key; the message names its number and never quotes it.
    """
    keys = []
    for number, entry in enumerate((part.strip() for part in text.split(",")), start=1):
        if not entry:
            continue
        name, secret, scopes = _parts_of(entry, f"{KEYS_VARIABLE}, entry {number}")
        fields: dict[str, object] = {"name": name, "scopes": scopes.split("+")}
        fields |= {"sha256": secret.removeprefix(_DIGEST)} if secret.startswith(_DIGEST) else {"key": secret}
        keys.append(_key_of(json.dumps(fields), f"{KEYS_VARIABLE}, entry {number}"))
    return _distinct(keys, KEYS_VARIABLE)


def without_secrets(text: str) -> str:
    """The value of RAYWARD_API_KEYS with digests in place of keys: for the environment of other processes, which Ray shows to everybody.

    Raises:
        ConfigError: as `parse_variable`.
    """
    return ", ".join(f"{key.caller.name}:{_DIGEST}{key.digest.hex()}:{'+'.join(sorted(key.caller.scopes))}" for key in parse_variable(text))


def check_exposure(host: str, config: ScoringConfig, keys: Keys) -> None:
    """Refuse to listen on an address of the network for everybody, unless told twice.

    Raises:
        ConfigError: the address is not loopback, there is no key, and `allow_anonymous` is false.
    """
    if not (is_loopback(host) or keys.required or config.allow_anonymous):
        raise ConfigError(
            f"{host} can be reached from other machines, and there are no keys: anybody could ask for scores",
            remedy=f"give keys (keys_file or {KEYS_VARIABLE}), listen on 127.0.0.1, or say allow_anonymous: true as well",
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address, or can have sent from it."""
    if host is None:
        return False
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def is_domain(host: str | None) -> bool:
    """Whether a Host header holds a name with a point in it, hence one that others may own."""
    name = (host or "").rpartition(":")[0] if (host or "").rpartition(":")[2].isdecimal() else host or ""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return "." in name.rstrip(".") and not name.rstrip(".").endswith(".localhost")
    return False


def _password_of(credentials: str) -> str:
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


def _parts_of(entry: str, where: str) -> tuple[str, str, str]:
    parts = entry.split(":")
    if len(parts) == 2:
        return parts[0], parts[1], "score"
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    raise ConfigError(f"{where} is not of the form name:key or name:key:scope+scope", remedy="write for example ppo:<key>, ops:<key>:admin")


def _key_of(line: str, where: str) -> _Key:
    try:
        entry = _Entry.model_validate_json(line)
    except ValidationError as exc:
        # Without the input: it holds the key.
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        # What pydantic says of broken JSON may quote the line.
        rule = "it is not a JSON object" if first["type"] == "json_invalid" else first["msg"]
        raise ConfigError(f"{where} is no key: {field + ': ' if field else ''}{rule}", remedy=f"write {_FORM}") from None
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigError(f"{where} has both key and sha256, or neither; the rule is one of them", remedy=f"write {_FORM}")
    if entry.key is not None and (len(entry.key) < MIN_KEY_CHARS or not entry.key.isascii() or entry.key != entry.key.strip()):
        raise ConfigError(
            f"{where}: the key of {entry.name} has fewer than {MIN_KEY_CHARS} characters, spaces around it or characters beyond ASCII",
            remedy="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    digest = bytes.fromhex(entry.sha256) if entry.sha256 is not None else hashlib.sha256((entry.key or "").encode()).digest()
    limits = KeyLimits(**{name: getattr(entry, name) for name in KeyLimits.model_fields})
    return _Key(digest, Caller(entry.name, frozenset(entry.scopes), limits))


def _distinct(keys: list[_Key], where: str) -> tuple[_Key, ...]:
    names = [key.caller.name for key in keys]
    for name in names:
        if names.count(name) > 1 and len({key.caller for key in keys if key.caller.name == name}) > 1:
            raise ConfigError(f"{where} has two keys of the name {name} that may do different things", remedy="give them different names")
    if len({key.digest for key in keys}) != len(keys):
        raise ConfigError(f"{where} has the same key twice", remedy="delete one of the two")
    return tuple(keys)
