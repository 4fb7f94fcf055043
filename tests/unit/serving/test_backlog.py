"""Whose turn it is, what goes into one forward, and what is refused or dropped before it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from tests.helpers.units import comparison

from rayward.errors import OverloadedError
from rayward.scoring.units import Unit
from rayward.serving.engine.backlog import Backlog, Entry
from rayward.serving.engine.fair import FairQueue


def entry(caller: str = "a", length: int = 100, *, prompt: int | None = None, name: str = "", **kwargs: Any) -> Entry:
    ids = [prompt] * 50 if prompt is not None else random.Random(length).choices(range(1000), k=10)
    return Entry(name or caller, Unit(comparison(ids, [1] * (length - len(ids)))), caller, **kwargs)


def backlog(**kwargs: Any) -> Backlog:
    return Backlog(**({"max_tokens": 100_000, "max_s": 10.0} | kwargs))


def names(entries: list[Entry]) -> list[str]:
    return [found.owner for found in entries]


def test_first_come_first_served_within_a_caller() -> None:
    queue = backlog()
    queue.put([entry(name=str(number)) for number in range(10)])
    assert names(queue.take(500, 0.0).entries) == ["0", "1", "2", "3", "4"]
    assert names(queue.take(500, 0.0).entries) == ["5", "6", "7", "8", "9"]
    assert queue.take(500, 0.0).entries == []


def test_ten_thousand_of_one_do_not_stand_before_one_of_another() -> None:
    queue = backlog(max_tokens=10**9)
    queue.put([entry("many") for _ in range(10_000)])
    queue.take(1000, 0.0)
    queue.put([entry("one")])
    assert "one" in names(queue.take(1000, 0.0).entries)


def test_callers_that_wait_get_the_same_number_of_tokens_whatever_the_size_of_their_items() -> None:
    queue = backlog(max_tokens=10**9)
    queue.put(
        [entry("small", 20) for _ in range(2000)] + [entry("large", 400) for _ in range(100)] + [entry("middle", 90) for _ in range(450)]
    )
    given: Counter[str] = Counter()
    for _ in range(20):
        for found in queue.take(1000, 0.0).entries:
            given[found.owner] += found.num_tokens
    assert max(given.values()) - min(given.values()) <= 2 * 400


def test_nobody_saves_up_turns() -> None:
    queue = backlog(max_tokens=10**9)
    queue.put([entry("busy") for _ in range(1000)])
    for _ in range(50):
        queue.take(1000, 0.0)
    # Somebody who was not there for 500 turns gets half of the next, not all of them.
    queue.put([entry("new") for _ in range(100)])
    taken = Counter(name for _ in range(4) for name in names(queue.take(1000, 0.0).entries))
    assert 18 <= taken["new"] <= 22


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_put_is_taken_once_or_expires_or_is_discarded(seed: int) -> None:
    rng = random.Random(seed)
    queue = backlog(max_tokens=10**9, padded=seed % 2 == 1)
    everything, seen, now = [], [], 0.0
    for _ in range(200):
        fresh = [
            entry(
                rng.choice("abcd"),
                rng.randint(52, 400),
                prompt=rng.choice([None, 1, 2]),
                deadline=now + rng.choice([1.0, 50.0, float("inf")]),
                charged=rng.random() > 0.2,
                alone=rng.random() < 0.1,
            )
            for _ in range(rng.randint(0, 6))
        ]
        everything += fresh
        queue.put(fresh)
        for found in rng.sample(everything, min(len(everything), 2)):
            if queue.discard(found):
                seen.append(found)
        taken = queue.take(1000, now)
        assert len(taken.entries) == 1 or not any(found.alone for found in taken.entries)
        assert len({found.charged for found in taken.entries}) <= 1
        assert all(found.deadline > now for found in taken.entries)
        seen += taken.entries + taken.expired
        for found in taken.entries:
            queue.release(found.num_tokens, charged=found.charged)
        now += 0.5
    seen += queue.drain()
    assert Counter(map(id, seen)) == Counter(map(id, everything))
    assert (queue.queued_tokens, queue.shadow_tokens, len(queue)) == (0, 0, 0)


def test_a_forward_keeps_to_its_budget_and_a_larger_unit_is_alone() -> None:
    queue = backlog()
    queue.put([entry(length=400, name="x"), entry(length=3000, name="large"), entry(length=400, name="y")])
    assert names(queue.take(1000, 0.0).entries) == ["x"]
    assert names(queue.take(1000, 0.0).entries) == ["large"]
    assert names(queue.take(1000, 0.0).entries) == ["y"]


def test_units_with_the_prompt_of_one_that_is_computed_go_along_for_the_price_of_their_completions() -> None:
    queue = backlog()
    queue.put([entry("a", 60, prompt=7, name="a0"), *(entry("a", 100, name=f"a{number}") for number in range(1, 30))])
    queue.put([entry("b", 60, prompt=7, name="b0"), entry("b", 60, prompt=8, name="b1"), entry("c", 60, prompt=7, name="c0")])
    taken = names(queue.take(90, 0.0).entries)
    assert taken == ["a0", "b0", "c0"]
    # They were taken once.
    assert sorted(names(queue.drain())) == sorted(["b1", *(f"a{number}" for number in range(1, 30))])


def test_a_model_that_pads_takes_similar_lengths_and_the_oldest_among_them() -> None:
    queue = backlog(padded=True)
    lengths = [100, 900, 110, 800, 95, 850, 105, 820]
    queue.put([entry(length=length, name=str(length)) for length in lengths])
    assert sorted(names(queue.take(1000, 0.0).entries)) == ["100", "105", "110", "95"]
    assert names(queue.take(2000, 0.0).entries) == ["900", "850"]
    assert names(queue.take(2000, 0.0).entries) == ["800", "820"]


def test_alone_means_alone() -> None:
    queue = backlog()
    queue.put([entry(name="x"), entry(name="suspect", alone=True), entry(name="y")])
    assert [names(queue.take(1000, 0.0).entries) for _ in range(3)] == [["x"], ["suspect"], ["y"]]


def test_what_is_too_late_is_dropped_before_the_forward() -> None:
    queue = backlog()
    queue.put([entry(name="late", deadline=5.0), entry(name="in time", deadline=6.0)])
    taken = queue.take(1000, 5.0)
    assert (names(taken.entries), names(taken.expired)) == (["in time"], ["late"])


def test_discarded_units_leave_at_once_and_are_not_kept() -> None:
    queue = backlog(max_tokens=10**9)
    entries = [entry(charged=False) for _ in range(5000)]
    queue.put(entries)
    assert all(queue.discard(found) for found in entries)
    assert not any(queue.discard(found) for found in entries)
    assert queue.shadow_tokens == 0
    assert len(queue._uncharged) < 2000


def test_shadow_work_waits_for_all_other_work() -> None:
    queue = backlog()
    queue.put([entry("s", name="shadow", charged=False), entry(name="x")])
    assert names(queue.take(1000, 0.0).entries) == ["x"]
    assert names(queue.take(1000, 0.0).entries) == ["shadow"]


def test_the_bound_holds_for_any_number_of_callers() -> None:
    queue = backlog(max_tokens=1000)
    for number in range(10):
        queue.hold(100)
        queue.release(100)
        queue.put([entry(str(number))])
    with pytest.raises(OverloadedError, match="1000 tokens wait on this replica, and 100 more are over its bound of 1000") as caught:
        queue.hold(100)
    assert caught.value.retry_after_s == 1.0
    assert queue.queued_tokens == 1000


def test_what_is_computed_counts_until_it_is_released() -> None:
    queue = backlog(max_tokens=1000)
    queue.put([entry(length=900)])
    (found,) = queue.take(1000, 0.0).entries
    with pytest.raises(OverloadedError):
        queue.hold(200)
    queue.release(found.num_tokens)
    queue.hold(200)


def test_the_bound_in_seconds_follows_the_measured_speed_and_says_when_to_come_back() -> None:
    queue = backlog(max_tokens=100_000, max_s=10.0)
    queue.speed.add(500, 1.0)
    assert queue.bound == 5000
    queue.hold(4900)
    with pytest.raises(OverloadedError, match="10 s of its work") as caught:
        queue.hold(1100)
    assert caught.value.retry_after_s == pytest.approx(2.0)


def test_a_call_larger_than_the_bound_has_room_when_nothing_else_is_there() -> None:
    queue = backlog(max_tokens=1000)
    queue.hold(5000)
    with pytest.raises(OverloadedError):
        queue.hold(1)


def test_shadow_work_is_refused_first_and_never_takes_the_room_of_others() -> None:
    queue = backlog(max_tokens=1000)
    queue.hold(200, charged=False)
    with pytest.raises(OverloadedError):
        queue.hold(100, charged=False)
    queue.hold(900)
    queue.release(200, charged=False)
    with pytest.raises(OverloadedError):
        queue.hold(10, charged=False)
    assert (queue.queued_tokens, queue.shadow_tokens) == (900, 0)


def test_speed_is_that_of_most_tokens_of_the_last_forwards() -> None:
    speed = backlog().speed
    assert speed.tokens_per_s == 0
    # The first forward, for which kernels were compiled, and small ones, say little.
    speed.add(1000, 100.0)
    assert speed.tokens_per_s == 10
    speed.add(2000, 2.0)
    assert speed.tokens_per_s == 1000
    for _ in range(10):
        speed.add(10, 0.1)
    assert speed.tokens_per_s == 1000
    for _ in range(200):
        speed.add(100, 1.0)
    assert speed.tokens_per_s == 100


def test_a_fair_queue_passes_over_callers_that_may_not() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a0", 1)
    queue.push("b", "b0", 5)
    queue.push("a", "a1", 1)
    assert queue.pop(lambda caller: caller != "a") == "b0"
    assert queue.pop(lambda caller: caller != "a") is None
    assert [queue.pop(), queue.pop(), queue.pop()] == ["a0", "a1", None]
    assert len(queue) == 0


def test_a_fair_queue_takes_back_what_was_popped_for_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.push("a", f"a{number}", 10)
        queue.push("b", f"b{number}", 10)
    first = queue.pop()
    assert first == "a0"
    queue.push("a", first, 10, first=True)
    assert [queue.pop() for _ in range(6)] == ["a0", "b0", "a1", "b1", "a2", "b2"]
