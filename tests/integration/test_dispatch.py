"""The dispatcher over real replicas of Serve: processes that die, hang, refuse and fail, and what their callers are told.

The scorer is one that a test can kill by an item, as no text kills the real one; everything between it and the caller is real.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayward.config.scoring import ReplicaConfig
from rayward.errors import DeadlineError, OverloadedError, ServerError
from rayward.serving.calls import ScoreCall, ScoredCall
from rayward.serving.dispatch import DEATHS, Dispatcher
from rayward.serving.routes import ModelRoutes, Release, RouteTable
from rayward.wire.items import ItemResult, ScoreItem
from rayward.wire.native import ModelInfo

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

APP = f"dispatch-test-{os.getpid()}"


def item(text: str) -> ScoreItem:
    return ScoreItem(({"role": "user", "content": text},), ("x",))


class Mortal:
    """Rewards are the lengths of prompts; some prompts are orders. Note of a cancelled call goes to a file."""

    def __init__(self, notes: str) -> None:
        self._notes = Path(notes)

    async def score(self, call: ScoreCall) -> ScoredCall:
        texts = [str(each.prompt[0]["content"]) for each in call.items]
        if "die" in texts:
            os._exit(1)
        if "refuse" in texts:
            raise OverloadedError("full", remedy="later", retry_after_s=7.0).marked()
        if "fail" in texts:
            raise ValueError("a secret text")
        if "hang" in texts:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self._notes.write_text("cancelled")
                raise
        return ScoredCall("v1", tuple(ItemResult(rewards=(float(len(text)),)) for text in texts), replica=str(os.getpid()))

    async def info(self) -> ModelInfo:
        return ModelInfo(id="m", version="v1", max_tokens=1, outputs=["reward"])


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes") / "notes"


@pytest.fixture(scope="module")
def run(ray_local: None, notes: Path) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines in one event loop, as an ingress has one."""
    from ray import cloudpickle, serve

    # The replicas cannot import the tests.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deployment = serve.deployment(
        Mortal, name="scorer", num_replicas=2, max_ongoing_requests=64, graceful_shutdown_timeout_s=1.0, ray_actor_options={"num_cpus": 0.1}
    )
    serve.run(deployment.bind(str(notes)), name=APP, route_prefix=None)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=120.0)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    serve.shutdown()


@pytest.fixture(scope="module")
def dispatcher(run: Callable[[Coroutine[Any, Any, Any]], Any]) -> Iterator[Dispatcher]:
    from rayward.serving.handles import ServeHandles

    release = Release(version="v1", source="/m", state="ready", config=ReplicaConfig(max_replicas=2))
    table = RouteTable(generation=1, default_model="m", models={"m": ModelRoutes(releases={"v1": release}, current="v1")})

    async def make() -> Dispatcher:
        return Dispatcher(lambda: table, ServeHandles("none", lambda _model, _version: APP))

    made: Dispatcher = run(make())
    yield made
    run(made.close())


async def score(dispatcher: Dispatcher, *texts: str, budget_s: float = 90.0) -> list[float | str]:
    items = [item(text) for text in texts]
    _, scored = await dispatcher.score(items, request_id=texts[0], caller="test", budget_s=budget_s, model=None, version=None)
    return [result.rewards[0] if result.rewards else result.error.code if result.error else "" for result in scored.results]


def deaths(dispatcher: Dispatcher) -> float:
    return sum(value for (name, _), value in dispatcher.stats().counters.items() if name == DEATHS)


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_an_item_that_kills_two_replicas_fails_alone_and_nobody_else_notices(run: Run, dispatcher: Dispatcher) -> None:
    async def many() -> list[list[float | str]]:
        around = [score(dispatcher, f"n{i}", "bb") for i in range(20)]
        return await asyncio.gather(*around, score(dispatcher, "a", "die", "ccc"), *(score(dispatcher, f"m{i}") for i in range(20)))

    got = run(many())
    assert got[20] == [1.0, "poisoned", 3.0]
    assert got[:20] == [[float(len(f"n{i}")), 2.0] for i in range(20)]
    assert got[21:] == [[float(len(f"m{i}"))] for i in range(20)]
    # It is known now, and kills nobody any more.
    before = deaths(dispatcher)
    assert run(score(dispatcher, "die", "ok")) == ["poisoned", 2.0]
    assert deaths(dispatcher) == before


def test_a_deadline_ends_the_call_in_the_replica(run: Run, dispatcher: Dispatcher, notes: Path) -> None:
    with pytest.raises(DeadlineError):
        run(score(dispatcher, "hang", budget_s=1.0))

    async def noted() -> None:
        while not notes.exists():
            await asyncio.sleep(0.05)

    run(asyncio.wait_for(noted(), 30.0))


def test_the_word_of_a_replica_comes_through_with_its_type(run: Run, dispatcher: Dispatcher) -> None:
    with pytest.raises(OverloadedError) as refused:
        run(score(dispatcher, "refuse"))
    assert refused.value.retry_after_s == 7.0
    with pytest.raises(ServerError) as failed:
        run(score(dispatcher, "fail"))
    assert "secret" not in str(failed.value)
    assert "ValueError" in failed.value.problem
