"""Encoder processes: what an item can do to the process that encodes it, and what becomes of the items beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.units import WordsSpec, words_item

from rayward.errors import ServerError
from rayward.scoring.units import EncodedItem
from rayward.serving.engine.encoders import NUM_SPARE, Encoders
from rayward.serving.engine.work import Job
from rayward.wire.items import ScoreItem

WAIT_S = 60.0


class Told:
    """What the pool has said, and a way to wait for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.found: dict[object, EncodedItem] = {}
        self.order: list[object] = []
        self.restarts: Counter[str] = Counter()

    def __call__(self, encoded: Sequence[tuple[Job, EncodedItem]]) -> None:
        with self.changed:
            for job, found in encoded:
                assert job.owner not in self.found, "an item was answered twice"
                self.found[job.owner] = found
                self.order.append(job.owner)
            self.changed.notify_all()

    def restart(self, reason: str) -> None:
        with self.changed:
            self.restarts[reason] += 1
            self.changed.notify_all()

    def wait(self, *names: object) -> list[EncodedItem]:
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) <= set(self.found), WAIT_S), f"only {self.order} of {names}"
            return [self.found[name] for name in names]

    def codes(self, *names: object) -> list[str]:
        return ["" if found.error is None else found.error.code for found in self.wait(*names)]


@pytest.fixture
def told() -> Told:
    return Told()


Make = Callable[..., Encoders]


@pytest.fixture
def make(told: Told) -> Iterator[Make]:
    made: list[Encoders] = []

    def start(num_processes: int = 1, timeout_s: float = 1.0, at_start: str = "", **kwargs: Any) -> Encoders:
        made.append(
            Encoders(
                WordsSpec(at_start),
                num_processes=num_processes,
                timeout_s=timeout_s,
                done=told,
                restarted=told.restart,
                memory_bytes=2**29,
                **kwargs,
            )
        )
        return made[-1]

    yield start
    for encoders in made:
        encoders.close()
        assert encoders.pids == set()


def job(name: str, item: ScoreItem, caller: str = "a") -> Job:
    return Job(name, item, caller, len(item.prompt[0]["content"]))


def jobs(prefix: str, number: int, caller: str = "a") -> list[Job]:
    return [job(f"{prefix}{index}", words_item(f"the text {prefix} {index}"), caller) for index in range(number)]


def named(prefix: str, number: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(number)]


def test_items_become_units_in_order(make: Make, told: Told) -> None:
    encoders = make()
    item = words_item("one two three", "four five", "six")
    encoders.submit([job("x", item), *jobs("y", 100)])
    (found, *_) = told.wait("x", *named("y", 100))
    assert found.item is item
    (unit,) = found.units
    assert len(unit.comparison.prefix_ids) == 3
    assert [len(ids) for ids in unit.comparison.branch_ids] == [2, 1]
    assert unit.comparison.prefix_ids.dtype == "int32"
    assert told.order == ["x", *named("y", 100)]


def test_a_process_loads_neither_torch_nor_ray(make: Make) -> None:
    program = (
        "import sys, rayward.serving.engine.encoder_process as p;"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("bad", ["loop", "backtrack"])
def test_what_stands_behind_an_item_that_does_not_end_goes_to_another_process(make: Make, told: Told, bad: str) -> None:
    encoders = make(timeout_s=1000.0)
    encoders.submit([*jobs("before", 3), job("bad", words_item(bad)), *jobs("behind", 30), *jobs("other", 3, caller="b")])
    every = named("before", 3) + named("behind", 30) + named("other", 3)
    assert told.codes(*every) == [""] * len(every)
    assert "bad" not in told.found


@pytest.mark.parametrize("bad", ["loop", "backtrack"])
def test_an_item_that_does_not_end_in_time_fails_alone(make: Make, told: Told, bad: str) -> None:
    encoders = make(timeout_s=3.0)
    encoders.wait_ready()
    encoders.submit([*jobs("before", 3), job("bad", words_item(bad)), *jobs("behind", 20)])
    every = named("before", 3) + named("behind", 20)
    assert told.codes("bad", *every) == ["encoding_timeout"] + [""] * len(every)
    assert "3 s" in (told.found["bad"].error.message if told.found["bad"].error else "")
    assert dict(told.restarts) == {"timeout": 1}


def test_a_loop_ends_when_its_caller_is_gone(make: Make, told: Told) -> None:
    encoders = make(timeout_s=1000.0)
    looping = job("bad", words_item("loop"))
    encoders.submit([looping, *jobs("behind", 3)])
    told.wait(*named("behind", 3))
    looping.gone = True
    with told.changed:
        assert told.changed.wait_for(lambda: told.restarts["timeout"] == 1, WAIT_S)
    assert "bad" not in told.found


def test_an_item_that_is_tried_again_does_not_wait_for_a_quiet_moment(make: Make, told: Told, tmp_path: Path) -> None:
    encoders = make(timeout_s=1000.0)
    encoders.submit([*jobs("a", 40), job("x", words_item(f"kill-once {tmp_path / 'was-there'}")), *jobs("b", 200)])
    told.wait("x", *named("b", 200))
    assert told.order.index("x") < told.order.index("b100")


def test_items_that_loop_hold_up_their_own_caller_only(make: Make, told: Told) -> None:
    encoders = make(timeout_s=1000.0)
    encoders.submit([job(f"bad{index}", words_item("loop"), "attacker") for index in range(6)])
    encoders.submit(jobs("good", 50, caller="b"))
    assert told.codes(*named("good", 50)) == [""] * 50
    assert len(encoders.pids) <= 1 + NUM_SPARE
    assert len(told.found) == 50


def test_a_process_that_is_one_too_many_goes_when_it_is_idle(make: Make, told: Told) -> None:
    encoders = make(timeout_s=1000.0, spare_s=0.05)
    encoders.submit([job("slow", words_item("sleep 3")), *jobs("behind", 5)])
    told.wait("slow", *named("behind", 5))
    with encoders._changed:
        assert encoders._changed.wait_for(lambda: len(encoders._threads) == 1, WAIT_S)
    # Whichever stayed works on.
    encoders.submit(jobs("later", 5))
    assert told.codes(*named("later", 5)) == [""] * 5


@pytest.mark.parametrize("bad", ["kill", "fill"])
def test_an_item_that_takes_its_process_down_fails_alone(make: Make, told: Told, bad: str) -> None:
    encoders = make(timeout_s=30.0)
    encoders.submit([*jobs("before", 3), job("bad", words_item(bad)), *jobs("behind", 20)])
    assert told.codes("bad") == ["failed"]
    every = named("before", 3) + named("behind", 20)
    assert told.codes(*every) == [""] * len(every)
    # Memory ends in a MemoryError of the item, and the process lives.
    assert dict(told.restarts) == ({"died": 2} if bad == "kill" else {})


def test_an_item_whose_process_was_killed_by_somebody_else_is_tried_again(make: Make, told: Told, tmp_path: Path) -> None:
    encoders = make(timeout_s=30.0)
    encoders.submit([job("x", words_item(f"kill-once {tmp_path / 'was-there'}")), *jobs("y", 5)])
    assert told.codes("x", *named("y", 5)) == [""] * 6
    assert dict(told.restarts) == {"died": 1}


@pytest.mark.parametrize("bad", ["recurse", "memory", "raise the secret"])
def test_an_item_that_raises_fails_alone_and_is_not_quoted(make: Make, told: Told, bad: str) -> None:
    encoders = make()
    encoders.submit([job("bad", words_item(bad)), *jobs("good", 3)])
    assert told.codes("bad", *named("good", 3)) == ["failed", "", "", ""]
    error = told.found["bad"].error
    assert error is not None
    assert "secret" not in error.message
    assert dict(told.restarts) == {}


def test_what_the_encoder_refuses_is_passed_on(make: Make, told: Told) -> None:
    make().submit([job("x", words_item("refuse"))])
    assert told.codes("x") == ["too_long"]


def test_texts_far_larger_than_a_pipe_go_through(make: Make, told: Told) -> None:
    encoders = make(num_processes=2, timeout_s=60.0)
    long = "word " * 400_000
    encoders.submit([job(f"x{index}", words_item(long)) for index in range(4)] + jobs("y", 40))
    assert told.codes(*named("x", 4), *named("y", 40)) == [""] * 44
    assert told.found["x0"].num_tokens == 400_001


def test_a_killed_idle_process_is_replaced(make: Make, told: Told) -> None:
    encoders = make()
    encoders.wait_ready()
    (pid,) = encoders.pids
    os.kill(pid, signal.SIGKILL)
    encoders.submit(jobs("x", 5))
    assert told.codes(*named("x", 5)) == [""] * 5
    assert encoders.pids != {pid}


def test_what_nobody_waits_for_is_not_encoded(make: Make, told: Told) -> None:
    encoders = make(timeout_s=30.0)
    gone = jobs("gone", 50)
    encoders.submit([job("slow", words_item("sleep 0.3")), *jobs("x", 20), *gone, job("last", words_item("end"))])
    for each in gone:
        each.gone = True
    told.wait("last")
    assert [name for name in told.order if str(name).startswith("gone")] == []


def test_shadow_work_is_encoded_last(make: Make, told: Told) -> None:
    encoders = make(timeout_s=30.0)
    encoders.submit([job("slow", words_item("sleep 0.3")), *jobs("first", 16)])
    shadow = jobs("shadow", 30)
    for each in shadow:
        each.charged = False
    encoders.submit(shadow)
    encoders.submit(jobs("x", 30, caller="b"))
    told.wait(*named("shadow", 30), *named("x", 30))
    assert max(told.order.index(name) for name in named("x", 30)) < min(told.order.index(name) for name in named("shadow", 30)[16:])


def test_an_encoder_that_cannot_be_loaded_says_why(make: Make) -> None:
    encoders = make(at_start="no such tokenizer")
    with pytest.raises(ServerError, match="ValueError: no such tokenizer"):
        encoders.wait_ready()


def test_processes_that_never_start_lose_what_waits(make: Make, told: Told) -> None:
    encoders = make(at_start="die")
    encoders.submit(jobs("x", 3))
    assert told.codes(*named("x", 3)) == ["encoder_lost"] * 3
    assert all(found.error is not None and found.error.retryable for found in told.found.values())
    encoders.submit(jobs("y", 1))
    assert told.codes("y0") == ["encoder_lost"]
    assert encoders.failure is not None


def test_closing_tells_everybody(make: Make, told: Told) -> None:
    encoders = make(timeout_s=1000.0)
    encoders.submit([job("x", words_item("loop")), *jobs("y", 40)])
    encoders.wait_ready()
    encoders.close()
    assert set(told.codes("x", *named("y", 40))) <= {"", "encoder_lost"}
    assert told.codes("x") == ["encoder_lost"]


def test_closing_ends_a_process_that_hangs(make: Make, told: Told) -> None:
    encoders = make(timeout_s=600.0)
    encoders.submit([job("x", words_item("loop"))])
    encoders.wait_ready()
    encoders.close()
    assert encoders.pids == set()


def test_a_process_ends_with_its_parent() -> None:
    program = (
        "import os, signal, sys\n"
        "from rayward.serving.engine.encoders import Encoders\n"
        "from rayward.serving.engine.work import Job\n"
        "from tests.helpers.units import WordsSpec, words_item\n"
        "pool = Encoders(WordsSpec(), num_processes=1, timeout_s=600, done=print)\n"
        "pool.submit([Job(0, words_item('loop'), 'a', 4)])\n"
        "pool.wait_ready()\n"
        "print(*pool.pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    # The process has inherited the pipe of stdout: this returns when the last of them has ended.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0
