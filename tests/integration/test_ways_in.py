"""HAProxy and the throughput-optimised paths of Ray Serve, chosen by its environment variables: the same service behind each.

Each starts a cluster of its own: a drill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.helpers.command import Command, serving
from tests.helpers.models import make_export
from tests.helpers.processes import kill, named

from rayward import AsyncRewardClient
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ScoreItem

pytestmark = pytest.mark.drill

WAYS = {
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "optimised": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "both": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
PROMPT, COMPLETIONS = "Hi", ["Hello", "No!"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def rewards(export: Path) -> list[float]:
    (result,) = Scorer.load(export, device="cpu").score([ScoreItem(({"role": "user", "content": PROMPT},), tuple(COMPLETIONS))])
    assert result.rewards is not None
    return list(result.rewards)


@pytest.fixture(scope="module", params=list(WAYS))
def service(request: pytest.FixtureRequest, export: Path) -> Iterator[Command]:
    with serving(export, variables=WAYS[request.param]) as command:
        yield command


def score(service: Command, times: int) -> list[list[float]]:
    async def ask() -> list[list[float]]:
        async with AsyncRewardClient(service.url, deadline_s=120.0) as client:
            return await asyncio.gather(*(client.score(PROMPT, COMPLETIONS) for _ in range(times)))

    return asyncio.run(ask())


def test_it_scores(service: Command, rewards: list[float]) -> None:
    assert score(service, 20) == [pytest.approx(rewards, abs=1e-5)] * 20


def test_a_request_of_many_megabytes_is_answered(service: Command) -> None:
    # Serve's gRPC between deployments would refuse it at four.
    items = [{"prompt": "p " * 75_000, "completions": ["a"]}] * 60
    reply = httpx.post(f"{service.url}/v1/score", json={"items": items}, timeout=120.0)
    assert reply.status_code == 200
    assert [result["error"]["code"] for result in reply.json()["results"]] == ["too_long"] * 60


def test_a_killed_scorer_loses_nothing(service: Command, rewards: list[float]) -> None:
    before = named(":scorer", service.processes())
    assert len(before) == 1
    kill(before)
    assert score(service, 20) == [pytest.approx(rewards, abs=1e-5)] * 20


def test_sigterm_takes_everything_down(service: Command) -> None:
    # The last test here: the service is gone afterwards.
    assert service.interrupted() == (0, [])
