"""How much one ingress takes at once, and how much one caller may send: refused early, with the time at which another try has room.

    with gate.admitted(caller, expected_tokens) as admission:     raises OverloadedError, and nothing was done
        ...
        admission.settle(tokens)                                  what it really was

Rates are buckets that hold one second's worth. A request is let in while the bucket is not empty and may overdraw it, so that one which is
larger than the bucket is not refused for ever; who has overdrawn waits until it is filled again. One thread, one event loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from rayward.errors import OverloadedError
from rayward.serving.auth import NO_LIMITS, Caller, KeyLimits

BYTES_PER_TOKEN = 4
"""Guess of a body's tokens, for the time until they are counted."""

MAX_CALLERS = 10_000
"""Callers that are remembered; of those who have nothing in flight, the ones not seen for longest are forgotten."""


@dataclass(slots=True)
class Bucket:
    """What may be taken of something that comes in at a rate.

    Attributes:
        rate: units per second; the bucket holds as much as comes in one second, and at least one unit.
        level: what is there; below zero after a large request.
    """

    rate: float
    level: float
    filled_at_s: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """A bucket from which nothing was taken."""
        return cls(rate, max(rate, 1.0), now)

    def wait_s(self, now: float, units: float = 0.0) -> float:
        """How long until a request is let in; 0: now.

        Args:
            units: that must be there; more than the bucket holds is asked of nobody.
        """
        # A clock that jumps back fills nothing.
        self.level = min(max(self.rate, 1.0), self.level + max(now - self.filled_at_s, 0.0) * self.rate)
        self.filled_at_s = now
        missing = min(units, max(self.rate, 1.0)) - self.level
        return missing / self.rate if missing > 1e-9 else 0.0

    def take(self, units: float) -> None:
        """Take, or with a negative number give back."""
        self.level -= units


@dataclass(slots=True)
class _Use:
    # What one caller has in flight, and its buckets.
    requests: Bucket | None
    tokens: Bucket | None
    num_in_flight: int = 0


@dataclass(slots=True)
class Admission:
    """A request that was let in; leaves with the `with` block."""

    _gate: Gate
    _use: _Use
    _expected_tokens: float
    _settled: bool = field(default=False, init=False)

    def expect(self, num_bytes: int) -> None:
        """The body is read, and so large."""
        self._charge(num_bytes / BYTES_PER_TOKEN - self._expected_tokens)
        self._expected_tokens = num_bytes / BYTES_PER_TOKEN

    def settle(self, tokens: int) -> None:
        """Charge the tokens that it really had; a request that is never settled is charged none."""
        self._charge(tokens - self._expected_tokens)
        self._settled = True

    def _charge(self, tokens: float) -> None:
        if self._use.tokens is not None:
            self._use.tokens.take(tokens)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._settled:
            self._charge(-self._expected_tokens)
        self._use.num_in_flight -= 1
        self._gate.leave()


class Gate:
    """What one ingress process lets in.

    Args:
        max_requests: in flight, of all callers.
        defaults: for callers whose key says nothing.
        share: of every caller's rates that is this process's: 1 / number of ingress processes.
    """

    def __init__(self, max_requests: int, clock: Callable[[], float], defaults: KeyLimits = NO_LIMITS, share: float = 1.0) -> None:
        self._max_requests = max_requests
        self._clock = clock
        self._defaults = defaults
        self._share = share
        self._uses: OrderedDict[tuple[str, KeyLimits], _Use] = OrderedDict()
        self.num_in_flight = 0

    def admit(self, caller: Caller) -> Admission:
        """Let a request in.

        Raises:
            OverloadedError: the process is full, or the caller has sent too much.
        """
        if self.num_in_flight >= self._max_requests:
            raise OverloadedError(
                f"this server holds {self.num_in_flight} requests, and that is its limit", remedy="retry after the given delay"
            )
        use = self._use_of(caller)
        self._check(caller, use)
        if use.requests is not None:
            use.requests.take(1.0)
        use.num_in_flight += 1
        self.num_in_flight += 1
        return Admission(self, use, 0.0)

    def leave(self) -> None:
        """A request is done."""
        self.num_in_flight -= 1

    def _check(self, caller: Caller, use: _Use) -> None:
        now = self._clock()
        bound = self._value(caller, "max_concurrent")
        if bound is not None and use.num_in_flight >= max(1, math.floor(bound * self._share)):
            raise OverloadedError(
                f"{caller.name} has {use.num_in_flight} requests in flight, and that is the limit of its key", remedy="send less at once"
            )
        for what, bucket, units in (("requests", use.requests, 1.0), ("tokens", use.tokens, 0.0)):
            wait_s = 0.0 if bucket is None else bucket.wait_s(now, units)
            if bucket is not None and wait_s > 0.0:
                raise OverloadedError(
                    f"{caller.name} may send {bucket.rate / self._share:g} {what} a second and has sent more",
                    remedy="retry after the given delay",
                    retry_after_s=wait_s,
                )

    def _use_of(self, caller: Caller) -> _Use:
        # By the limits too: a key whose limits were changed in the file begins anew.
        key = (caller.name, caller.limits)
        use = self._uses.get(key)
        if use is None:
            now = self._clock()
            requests, tokens = (
                None if rate is None else Bucket.full(rate * self._share, now)
                for rate in (self._value(caller, "requests_per_s"), self._value(caller, "tokens_per_s"))
            )
            use = _Use(requests, tokens)
            self._uses[key] = use
            self._forget()
        self._uses.move_to_end(key)
        return use

    def _forget(self) -> None:
        if len(self._uses) > MAX_CALLERS:
            idle = next((key for key, use in self._uses.items() if use.num_in_flight == 0), None)
            if idle is not None:
                del self._uses[idle]

    def _value(self, caller: Caller, name: str) -> float | None:
        own = getattr(caller.limits, name)
        found: float | None = getattr(self._defaults, name) if own is None else own
        return found
