"""Load on a real local Serve with bad items in it, replicas that are killed, a promotion and a rollback: the books agree."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from tests.helpers.ledger import Ledger, make_pool, offline_rewards, when
from tests.helpers.models import make_export
from tests.helpers.processes import kill, named, until

from rayward.config.scoring import ScoringConfig
from rayward.scoring.scorer import Scorer
from rayward.serving.routes import application_of
from rayward.workflows.publish import Service, publish_model

# Ray Serve 2.60 is imported inside fixtures and tests: its own models warn about deprecated pydantic settings.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

APP = f"ledger-{os.getpid()}"
KEY = "for-the-administrator-of-the-ledger"


@pytest.fixture(scope="module")
def app(ray_local: None) -> Iterator[ModuleType]:
    """The module that imports ray.serve; Serve is gone afterwards."""
    from ray import serve

    from rayward.serving import app

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAYWARD_API_KEYS", f"ops:{KEY}:score+admin")
        environment.setenv("RAYWARD_API_KEY", KEY)
        yield app
    serve.shutdown()


def kill_one(title: str) -> None:
    """SIGKILL, when there is one that runs."""
    kill(until(lambda: named(title), otherwise=lambda: f"no {title} runs")[:1])


def replica_of(version: str) -> str:
    return f"ray::ServeReplica:{application_of(APP, 'm', version)}:"


INGRESS, MANAGER = (f"ray::ServeReplica:{APP}:{part}" for part in ("ingress", "manager"))
PROXY, CONTROLLER = "ray::ProxyActor", "ray::ServeController"


@pytest.mark.parametrize(
    ("num_completions", "num_kills", "killed_beside"),
    [
        (4_000, 1, ()),
        pytest.param(20_000, 0, (INGRESS, MANAGER, PROXY, CONTROLLER, PROXY), marks=[pytest.mark.drill, pytest.mark.timeout(1200)]),
        pytest.param(100_000, 3, (), marks=[pytest.mark.drill, pytest.mark.timeout(3600)]),
    ],
    ids=["small", "whatever-stands-before-the-scorers", "hundred-thousand"],
)
def test_nothing_is_lost_and_nothing_invented(
    app: ModuleType, tmp_path: Path, num_completions: int, num_kills: int, killed_beside: tuple[str, ...]
) -> None:
    exports = [make_export(tmp_path / "one"), make_export(tmp_path / "two", seed=5)]
    scorers = [Scorer.load(path, device="cpu") for path in exports]
    first, second = (scorer.version for scorer in scorers)
    pool = make_pool(200)
    ledger = Ledger(pool, {scorer.version: offline_rewards(scorer, pool) for scorer in scorers})
    config = ScoringConfig(
        model=str(exports[0]), model_name="m", state=str(tmp_path / "state"), device="cpu", tokens_per_batch=2048, cpus_per_replica=0.25,
        min_replicas=2, max_replicas=2,
    )  # fmt: skip
    url = app.serve_model(config, port=0, name=APP)
    service = Service(url)
    publish_model(service, "m", str(exports[1]))
    steps: dict[float, Callable[[], object]] = {
        0.3: lambda: service.ask("promote", {"model": "m", "version": second}),
        0.7: lambda: service.ask("rollback", {"model": "m"}),
    }
    kills = {0.1: first, 0.5: second, 0.85: first}
    steps |= {share: partial(kill_one, replica_of(version)) for share, version in list(kills.items())[:num_kills]}
    steps |= {0.15 + 0.16 * index: partial(kill_one, title) for index, title in enumerate(killed_beside)}

    async def load() -> None:
        faults = asyncio.create_task(when(lambda: ledger.num_completions / num_completions, steps))
        await ledger.run(url, num_completions=num_completions, in_flight=24, deadline_s=300.0, seed=1, api_key=KEY)
        await faults

    asyncio.run(load())
    ledger.close()
    assert ledger.num_completions >= num_completions
    assert set(ledger.versions) == {first, second}
    assert ledger.outcomes["rewarded"] > 0.8 * ledger.num_sent
    assert set(ledger.outcomes) == {"rewarded", "refused", "too_long", "already_templated", "unsupported_message", "template"}
    print(f"{ledger.num_completions} completions in {ledger.num_sent} items: {dict(ledger.outcomes)}, versions {dict(ledger.versions)}, "
          f"largest difference {ledger.largest_gap:.1e}")  # fmt: skip
    app.take_down(config, APP)
