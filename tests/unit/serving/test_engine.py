"""The engine of a replica over a model that counts words: what is computed together, who is answered when, and what faults do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest
from tests.helpers.units import WordsModel, WordsSpec, words_item

from rayward.config.scoring import ReplicaConfig
from rayward.errors import OverloadedError, ServerError, UnavailableError
from rayward.scoring.units import Unit
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoreCall, ScoredCall
from rayward.serving.engine.engine import Engine
from rayward.wire.items import ItemResult, ScoreItem

T = TypeVar("T")
WAIT_S = 60.0
Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[Engine, WordsModel]] = []

    def start(model: WordsModel, **config: Any) -> Engine:
        made.append((Engine(model, ReplicaConfig(**config), model_name="m", name="replica-1"), model))
        return made[-1][0]

    yield start
    for engine, model in made:
        model.gate.set()
        engine.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(WAIT_S):
            return await coroutine

    return asyncio.run(limited())


def call(*items: ScoreItem, caller: str = "a", **kwargs: Any) -> ScoreCall:
    return ScoreCall(items, request_id="r", caller=caller, **kwargs)


def outcomes(scored: ScoredCall) -> list[float | str]:
    return [outcome(result) for result in scored.results]


def outcome(result: ItemResult) -> float | str:
    if result.rewards is not None:
        return result.rewards[0]
    assert result.error is not None
    return result.error.code


async def forward_began(model: WordsModel) -> None:
    assert await asyncio.to_thread(model.started.acquire, timeout=WAIT_S)


async def waiting(engine: Engine, number: int) -> None:
    """Until so many units wait in the backlog."""

    def wait() -> None:
        with engine._changed:
            assert engine._changed.wait_for(lambda: len(engine._backlog) == number, WAIT_S)

    await asyncio.to_thread(wait)


def fault_at(length: int, error: type[Exception] = RuntimeError) -> Callable[[Sequence[Unit]], None]:
    """Raises where a unit has a prompt of so many words."""

    def fault(units: Sequence[Unit]) -> None:
        if any(unit.comparison.text_starts == (length,) for unit in units):
            raise error("CUDA error: the words of a text")

    return fault


def text(num_words: int) -> ScoreItem:
    return words_item(" ".join(["word"] * num_words))


@pytest.mark.parametrize("in_process", [False, True])
def test_rewards_and_errors_in_the_order_of_the_items(make: Make, in_process: bool) -> None:
    engine = make(WordsModel(in_process=in_process))
    scored = run(engine.score(call(text(3), words_item("refuse"), words_item("a b", "c", "d e"), text(5))))
    assert outcomes(scored) == [4.0, "too_long", 3.0, 6.0]
    assert scored.results[2].rewards == (3.0, 4.0)
    assert (scored.version, scored.replica) == ("words-1", "replica-1")
    timings = scored.timings
    assert min(timings.encode_s, timings.compute_s, timings.queue_s) >= 0
    assert timings.total_s >= timings.compute_s


def test_no_items_no_forward(make: Make) -> None:
    model = WordsModel()
    assert run(make(model).score(call())).results == ()
    assert model.forwards == []


def test_the_next_forward_takes_what_came_meanwhile_from_all_callers(make: Make) -> None:
    model = WordsModel()
    engine = make(model)

    async def scenario() -> None:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        others = [asyncio.create_task(engine.score(call(text(number), caller=str(number)))) for number in range(2, 8)]
        await waiting(engine, 6)
        model.gate.set()
        assert outcomes(await first) == [2.0]
        assert [outcomes(scored) for scored in await asyncio.gather(*others)] == [[float(number + 1)] for number in range(2, 8)]

    run(scenario())
    assert [len(units) for units in model.forwards] == [1, 6]


def test_a_request_is_answered_before_those_that_came_with_it_but_are_computed_later(make: Make) -> None:
    model = WordsModel()
    engine = make(model, tokens_per_batch=64)

    async def scenario() -> None:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(40))))
        await forward_began(model)
        second = asyncio.create_task(engine.score(call(text(50))))
        await waiting(engine, 1)
        third = asyncio.create_task(engine.score(call(text(60))))
        await waiting(engine, 2)
        model.gate.set()
        await first
        await second
        await third

    run(scenario())
    assert [unit.num_tokens for units in model.forwards for unit in units] == [41, 51, 61]
    assert [len(units) for units in model.forwards] == [1, 1, 1]


def test_a_caller_with_many_items_does_not_stand_before_one_with_one(make: Make) -> None:
    model = WordsModel()
    engine = make(model, tokens_per_batch=64)

    async def scenario() -> None:
        model.gate.clear()
        many = asyncio.create_task(engine.score(call(*(words_item(f"{number} " * 30) for number in range(200)), caller="many")))
        await forward_began(model)
        one = asyncio.create_task(engine.score(call(text(31), caller="one")))
        with engine._changed:
            pass
        await asyncio.to_thread(lambda: _until(engine, lambda: engine._backlog.num_callers == 2))
        model.gate.set()
        await one
        assert not many.done()
        await many

    run(scenario())
    lengths = [unit.num_tokens for units in model.forwards for unit in units]
    assert lengths.index(32) <= 4


def _until(engine: Engine, condition: Callable[[], bool]) -> None:
    with engine._changed:
        assert engine._changed.wait_for(condition, WAIT_S)


def test_a_deadline_answers_what_is_there_and_drops_the_rest_before_its_forward(make: Make) -> None:
    model = WordsModel()
    engine = make(model, tokens_per_batch=64)

    async def scenario() -> ScoredCall:
        model.gate.clear()
        blocker = asyncio.create_task(engine.score(call(text(40))))
        await forward_began(model)
        late = await engine.score(call(text(41), words_item("refuse"), text(42), budget_s=0.5))
        model.gate.set()
        await blocker
        return late

    late = run(scenario())
    assert outcomes(late) == ["deadline_exceeded", "too_long", "deadline_exceeded"]
    assert late.results[0].error is not None
    assert late.results[0].error.retryable
    assert [unit.num_tokens for units in model.forwards for unit in units] == [41]
    assert engine.load()[QUEUED_TOKENS] == 0


def test_a_caller_that_goes_away_takes_its_work_along(make: Make) -> None:
    model = WordsModel()
    engine = make(model)

    async def scenario() -> None:
        model.gate.clear()
        blocker = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        gone = asyncio.create_task(engine.score(call(*[text(10)] * 20)))
        await waiting(engine, 20)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await waiting(engine, 0)
        model.gate.set()
        await blocker

    run(scenario())
    assert [len(units) for units in model.forwards] == [1]
    assert engine.load()[QUEUED_TOKENS] == 0
    assert engine.stats().counters[("dropped_units_total", (("reason", "cancelled"),))] == 20


def test_a_full_backlog_refuses_before_any_work_is_done(make: Make) -> None:
    model = WordsModel()
    engine = make(model, max_queued_tokens=1024)

    async def scenario() -> None:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(900))))
        await forward_began(model)
        with pytest.raises(OverloadedError) as caught:
            await engine.score(call(text(800), caller="b"))
        assert caught.value.retry_after_s > 0
        # A replica with a full queue is healthy.
        engine.check_health()
        model.gate.set()
        await first

    run(scenario())
    assert engine.stats().counters[("refusals_total", (("reason", "overloaded"),))] == 1
    assert len(model.forwards) == 1


@pytest.mark.parametrize("number", [1, 5])
def test_a_broken_forward_is_repeated_unit_by_unit_and_only_the_culprit_is_interrupted(make: Make, number: int) -> None:
    model = WordsModel(fault=fault_at(7, MemoryError))
    engine = make(model)

    async def scenario() -> list[ScoredCall]:
        model.gate.clear()
        blocker = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        calls = [asyncio.create_task(engine.score(call(text(7 if i == number - 1 else 20 + i), caller=str(i)))) for i in range(number)]
        await waiting(engine, number)
        model.gate.set()
        return [*(await asyncio.gather(*calls)), await blocker]

    *scored, _ = run(scenario())
    assert [outcomes(each) for each in scored] == [[21.0 + i] for i in range(number - 1)] + [["interrupted"]]
    error = scored[-1].results[0].error
    assert error is not None
    assert error.retryable
    assert "words" not in error.message
    with pytest.raises(ServerError, match="MemoryError"):
        engine.check_health()


def test_a_broken_device_answers_all_that_waits_and_takes_nothing_more(make: Make) -> None:
    def broken(units: Sequence[Unit]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = WordsModel(fault=broken)
    engine = make(model, tokens_per_batch=64)

    async def scenario() -> None:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(40))))
        await forward_began(model)
        others = asyncio.create_task(engine.score(call(*[text(50)] * 30)))
        await waiting(engine, 30)
        model.gate.set()
        assert outcomes(await first) == ["interrupted"]
        assert outcomes(await others) == ["interrupted"] * 30
        with pytest.raises(UnavailableError, match="RuntimeError"):
            await engine.score(call(text(3)))

    run(scenario())
    assert len(model.forwards) == 1
    assert engine.load()[QUEUED_TOKENS] == 0


def test_suspects_are_computed_alone(make: Make) -> None:
    model = WordsModel()
    engine = make(model)

    async def scenario() -> None:
        model.gate.clear()
        blocker = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        suspects = asyncio.create_task(engine.score(call(text(2), text(3), alone=True)))
        others = asyncio.create_task(engine.score(call(text(4), text(5), caller="b")))
        await waiting(engine, 4)
        model.gate.set()
        await asyncio.gather(blocker, suspects, others)

    run(scenario())
    for units in model.forwards:
        assert len(units) == 1 or not {3, 4} & {unit.num_tokens for unit in units}


def test_shadow_calls_wait_for_all_others_and_do_not_count(make: Make) -> None:
    model = WordsModel()
    engine = make(model, tokens_per_batch=64)

    async def scenario() -> None:
        model.gate.clear()
        blocker = asyncio.create_task(engine.score(call(text(40))))
        await forward_began(model)
        shadow = asyncio.create_task(engine.score(call(text(41), charged=False)))
        await waiting(engine, 1)
        assert engine.load()[QUEUED_TOKENS] == 41
        others = asyncio.create_task(engine.score(call(text(42), text(43))))
        await waiting(engine, 3)
        model.gate.set()
        await asyncio.gather(blocker, shadow, others)

    run(scenario())
    assert [unit.num_tokens for units in model.forwards for unit in units] == [41, 43, 44, 42]


def test_requests_of_several_event_loops_are_answered_in_their_own(make: Make) -> None:
    engine = make(WordsModel())
    found: list[list[float | str]] = []
    threads = [threading.Thread(target=lambda: found.append(outcomes(run(engine.score(call(text(3))))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [[4.0]] * 4


def test_statistics_add_up(make: Make) -> None:
    engine = make(WordsModel())
    run(engine.score(call(text(3), words_item("refuse"), words_item("a b", "c", "d e"))))
    stats = engine.stats()
    assert (stats.role, stats.model, stats.version, stats.source) == ("replica", "m", "words-1", "replica-1")
    assert stats.counters[("items_total", (("outcome", "scored"),))] == 2
    assert stats.counters[("items_total", (("outcome", "too_long"),))] == 1
    assert stats.counters[("completions_total", ())] == 3
    assert stats.counters[("tokens_total", ())] == 4 + 3 + 4
    assert stats.gauges[(QUEUED_TOKENS, ())] == 0
    assert stats.gauges[(TOKENS_PER_S, ())] > 0
    assert stats.gauges[("queued_items", ())] == 0
    assert stats.gauges[("healthy", ())] == 1
    assert stats.gauges[("reward_sums", (("of", "n"),))] == 3
    assert stats.gauges[("reward_mean", ())] == pytest.approx(11 / 3)
    assert stats.gauges[("reward_length_correlation", ())] == pytest.approx(1.0)
    assert sum(stats.histograms[("reward", ())].counts) == 3
    assert sum(stats.histograms[("batch_fill_ratio", ())].counts) == stats.counters[("forwards_total", ())]
    assert sum(stats.histograms[("stage_seconds", (("stage", "queue"),))].counts) == 1


def test_closing_answers_what_waits(make: Make) -> None:
    model = WordsModel()
    engine = make(model)

    async def scenario() -> list[list[float | str]]:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        waits = asyncio.create_task(engine.score(call(text(2))))
        await waiting(engine, 1)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        found = [outcomes(await waits)]
        model.gate.set()
        found.append(outcomes(await first))
        await closing
        with pytest.raises(UnavailableError):
            await engine.score(call(text(1)))
        return found

    assert run(scenario()) == [["interrupted"], [2.0]]


def test_a_fault_of_the_engine_itself_answers_everybody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WordsModel()
    engine = make(model)

    async def scenario() -> None:
        model.gate.clear()
        first = asyncio.create_task(engine.score(call(text(1))))
        await forward_began(model)
        waits = asyncio.create_task(engine.score(call(text(2))))
        await waiting(engine, 1)
        monkeypatch.setattr(engine.counts, "forward", None)
        model.gate.set()
        assert outcomes(await waits) == ["interrupted"]
        assert outcomes(await first) in ([2.0], ["interrupted"])

    run(scenario())
    with pytest.raises(ServerError, match="TypeError"):
        engine.check_health()


def test_items_that_the_model_itself_encodes_are_encoded_together(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WordsModel(in_process=True)
    engine = make(model)
    sizes: list[int] = []
    encode = model.encode

    def counted(items: Sequence[ScoreItem]) -> list[Any]:
        sizes.append(len(items))
        return encode(items)

    monkeypatch.setattr(model, "encode", counted)
    assert len(outcomes(run(engine.score(call(*[text(4)] * 10))))) == 10
    assert sizes == [10]


def test_a_device_that_breaks_while_items_are_encoded_interrupts_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WordsModel(in_process=True)
    engine = make(model)
    monkeypatch.setattr(model, "encode", None)
    assert outcomes(run(engine.score(call(text(4))))) == ["interrupted"]
    with pytest.raises(ServerError, match="TypeError"):
        engine.check_health()


def test_an_engine_whose_encoder_cannot_be_loaded_does_not_start() -> None:
    with pytest.raises(ServerError, match="no such tokenizer"):
        Engine(WordsModel(spec=WordsSpec("no such tokenizer")), ReplicaConfig())


def test_lost_encoders_make_the_replica_unhealthy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(WordsModel())
    encoders = engine._encoders
    assert encoders is not None
    encoders._fail("no memory")
    assert outcomes(run_or_unavailable(engine)) == []


def run_or_unavailable(engine: Engine) -> ScoredCall:
    with pytest.raises(ServerError):
        engine.check_health()
    with pytest.raises(UnavailableError, match="no memory"):
        run(engine.score(call(text(1))))
    return ScoredCall("", ())
