"""The body of one request: read within a time and a size, inflated within the same size, and of a type that the route reads."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace

from rayward.errors import OverloadedError, RuleError
from rayward.wire.rules import Limits, body_too_large

JSON_TYPES = ("application/json",)
MAX_BODIES = 32
"""One ingress holds bodies of so many times the largest one; beyond that it refuses, before its memory is full."""

MAX_MEMBERS = 64
_BLOCK_BYTES = 1 << 20
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Bodies:
    """The bodies that one process reads and holds.

    Args:
        timeout_s: a body must have come in by then.
    """

    def __init__(self, limits: Limits, timeout_s: float) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        self._max_held = MAX_BODIES * limits.max_body_bytes
        self.num_held_bytes = 0

    async def read(
        self,
        headers: Mapping[str, str],
        stream: AsyncIterator[bytes],
        *,
        max_bytes: int | None = None,
        media_types: Collection[str] = JSON_TYPES,
    ) -> bytes:
        """A body, inflated; counted as held until its length is given to `release`.

        Args:
            max_bytes: of the caller's key, where that is less than the server's.

        Raises:
            RuleError: wrong type, encoding or size, or not there in time.
            OverloadedError: too much is held already.
        """
        limits = self._limits if max_bytes is None else replace(self._limits, max_body_bytes=min(max_bytes, self._limits.max_body_bytes))
        check_media_type(headers.get("content-type"), media_types)
        encoding = _encoding_of(headers.get("content-encoding"))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.max_body_bytes:
            body_too_large(int(declared), limits)
        body = bytearray()
        try:
            await self._receive(body, stream, limits)
            whole = bytes(body) if encoding is None else await asyncio.to_thread(inflate, bytes(body), encoding, limits)
        # Also a client that hangs up cancels: however it ends, the bytes are held no longer.
        except BaseException:
            self.num_held_bytes -= len(body)
            raise
        self.num_held_bytes += len(whole) - len(body)
        return whole

    def release(self, num_bytes: int) -> None:
        """Nobody needs a body of this length any more."""
        self.num_held_bytes -= num_bytes

    async def _receive(self, body: bytearray, stream: AsyncIterator[bytes], limits: Limits) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                async for part in stream:
                    body += part
                    self.num_held_bytes += len(part)
                    if len(body) > limits.max_body_bytes:
                        body_too_large(len(body), limits)
                    if self.num_held_bytes > self._max_held:
                        raise OverloadedError(
                            f"this server holds {self.num_held_bytes} bytes of bodies, and that is its limit", remedy="retry"
                        )
        except TimeoutError as exc:
            raise RuleError(
                "body_timeout",
                f"the body was not there after {self._timeout_s:g} s ({len(body)} bytes were)",
                remedy="send it at once, or in smaller requests",
            ) from exc


def check_media_type(given: str | None, allowed: Collection[str] = JSON_TYPES) -> None:
    """Refuse a body of a type that the route does not read.

    One without a type is read. Forms and plain text are not: a page of another site can send them from a browser without asking.

    Raises:
        RuleError: `unsupported_media_type`.
    """
    if given is None:
        return
    media_type, _, parameters = given.partition(";")
    media_type = media_type.strip().lower()
    json_of_some_kind = media_type.startswith("application/") and media_type.endswith("+json") and JSON_TYPES[0] in allowed
    if media_type not in allowed and not json_of_some_kind:
        raise RuleError(
            "unsupported_media_type",
            f"the content type is {media_type[:100]!r}; this path reads {', '.join(allowed)}",
            remedy=f"send the header `content-type: {next(iter(allowed))}`",
        )
    charset = parameters.lower().replace('"', "").replace(" ", "")
    if charset.startswith("charset=") and charset.removeprefix("charset=") not in ("utf-8", "utf8", "us-ascii"):
        raise RuleError("unsupported_media_type", f"the body is in {charset[8:50]!r}; the rule is UTF-8", remedy="send UTF-8")


def _encoding_of(given: str | None) -> str | None:
    name = (given or "identity").strip().lower()
    if name == "identity":
        return None
    if name not in _WINDOW:
        raise RuleError(
            "unsupported_encoding",
            f"the content encoding is {name[:100]!r}; gzip, deflate and identity are read",
            remedy="send the body as it is, or as gzip",
        )
    return name


def inflate(data: bytes, encoding: str, limits: Limits) -> bytes:
    """The body that was compressed; never more bytes than the limit are made of it.

    Raises:
        RuleError: it is too large, or is not what its header says.
    """
    found = bytearray()
    rest = data
    for _ in range(MAX_MEMBERS):
        inflater = zlib.decompressobj(_WINDOW[encoding])
        try:
            while not inflater.eof:
                block = inflater.decompress(rest, _BLOCK_BYTES)
                rest = inflater.unconsumed_tail
                found += block
                if len(found) > limits.max_body_bytes:
                    body_too_large(len(found), limits)
                if not block and not rest and not inflater.eof:
                    raise RuleError("invalid_encoding", f"the {encoding} body ends too early", remedy="send all of it")
        except zlib.error as exc:
            raise RuleError("invalid_encoding", f"the body is not {encoding} ({exc})", remedy="send what the header says") from exc
        # A file of gzip may be several, one after the other.
        rest = inflater.unused_data
        if not rest:
            return bytes(found)
    raise RuleError("invalid_encoding", f"the body is more than {MAX_MEMBERS} {encoding} streams in a row", remedy="compress it as one")
