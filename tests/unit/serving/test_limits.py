"""What a caller may send, by a clock that a test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayward.errors import OverloadedError
from rayward.serving import limits
from rayward.serving.auth import Caller, KeyLimits
from rayward.serving.limits import Bucket, Gate


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def caller(name: str = "a", **given: float) -> Caller:
    return Caller(name, frozenset({"score"}), KeyLimits(**given))  # type: ignore[arg-type]


def test_requests_a_second_and_when_the_next_has_room() -> None:
    clock = Clock()
    gate = Gate(100, clock)
    who = caller(requests_per_s=2.0)
    for _ in range(2):
        with gate.admit(who):
            pass
    with pytest.raises(OverloadedError) as caught:
        gate.admit(who)
    assert caught.value.retry_after_s == pytest.approx(0.5)
    clock.now += caught.value.retry_after_s
    with gate.admit(who):
        pass
    with gate.admit(caller("b", requests_per_s=2.0)):
        pass


def test_less_than_one_request_a_second() -> None:
    clock = Clock()
    gate = Gate(100, clock)
    who = caller(requests_per_s=0.1)
    gate.admit(who)
    with pytest.raises(OverloadedError) as caught:
        gate.admit(who)
    assert caught.value.retry_after_s == pytest.approx(10.0)


def test_tokens_are_charged_as_they_were_counted_and_a_large_request_is_let_in_once() -> None:
    clock = Clock()
    gate = Gate(100, clock)
    who = caller(tokens_per_s=1000.0)
    with gate.admit(who) as admission:
        admission.expect(40)
        admission.settle(5000)
    with pytest.raises(OverloadedError) as caught:
        gate.admit(who)
    assert caught.value.retry_after_s == pytest.approx(4.0)
    clock.now += 4.001
    gate.admit(who)


def test_what_was_refused_later_is_charged_nothing() -> None:
    gate = Gate(100, Clock())
    who = caller(tokens_per_s=1000.0)
    for _ in range(10):
        with gate.admit(who) as admission:
            admission.expect(100_000)
    assert gate.num_in_flight == 0
    gate.admit(who)


def test_a_burst_before_the_first_reply_is_charged_by_its_bytes() -> None:
    gate = Gate(100, Clock())
    who = caller(tokens_per_s=1000.0)
    gate.admit(who).expect(8000)
    with pytest.raises(OverloadedError):
        gate.admit(who)


def test_requests_in_flight_of_one_caller_and_of_all() -> None:
    gate = Gate(3, Clock(), defaults=KeyLimits(max_concurrent=2))
    first, second = gate.admit(caller()), gate.admit(caller())
    with pytest.raises(OverloadedError, match="a has 2 requests in flight"):
        gate.admit(caller())
    third = gate.admit(caller("b"))
    with pytest.raises(OverloadedError, match="this server holds 3 requests"):
        gate.admit(caller("c"))
    for admission in (first, second, third):
        with admission:
            pass
    assert gate.num_in_flight == 0
    with gate.admit(caller()):
        pass


def test_each_process_allows_its_share() -> None:
    gate = Gate(100, Clock(), defaults=KeyLimits(requests_per_s=8.0), share=0.25)
    for _ in range(2):
        gate.admit(caller())
    with pytest.raises(OverloadedError, match="may send 8 requests a second"):
        gate.admit(caller())


def test_a_clock_that_jumps_back_neither_fills_nor_empties() -> None:
    clock = Clock()
    gate = Gate(100, clock)
    who = caller(requests_per_s=1.0)
    gate.admit(who)
    clock.now -= 1000.0
    with pytest.raises(OverloadedError):
        gate.admit(who)
    clock.now += 1.0
    gate.admit(who)


def test_callers_who_have_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 3)
    gate = Gate(1000, Clock(), defaults=KeyLimits(max_concurrent=1))
    gate.admit(caller("stays"))
    for number in range(20):
        with gate.admit(caller(f"address-{number}")):
            pass
    assert len(gate._uses) <= 4
    with pytest.raises(OverloadedError):
        gate.admit(caller("stays"))


@given(
    rate=st.floats(0.1, 100.0),
    steps=st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 500.0)), max_size=40),
)
def test_a_bucket_gives_no_more_than_came_in(rate: float, steps: list[tuple[float, float]]) -> None:
    now, taken, largest = 0.0, 0.0, 0.0
    bucket = Bucket.full(rate, now)
    for pause, units in steps:
        now += pause
        if bucket.wait_s(now) == 0.0:
            bucket.take(units)
            taken += units
            largest = max(largest, units)
    # What it held, what came, and the one that overdrew it.
    assert taken <= max(rate, 1.0) + rate * now + largest + 1e-6
