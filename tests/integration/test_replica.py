"""A scorer replica on a real local Serve, without an ingress: what handles, processes and signals do to its engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.helpers.models import CONVERSATIONS, change_contract, make_export
from tests.helpers.processes import named

from rayward.config.placement import Placement
from rayward.config.scoring import ReplicaConfig
from rayward.scoring.load import load_scored_model
from rayward.serving.calls import ScoreCall, Stats
from rayward.wire.items import ScoreItem

# Ray Serve 2.60 is imported inside fixtures: its own models warn about deprecated pydantic settings.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

APP = f"replica-test-{os.getpid()}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'loop' %}" + LOOP + "{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
)
ITEMS = tuple(ScoreItem(prompt, (text, f"{text} Really.")) for prompt, text in CONVERSATIONS)
LOOPING = ScoreItem(({"role": "user", "content": "loop"},), ("yes",))
CONFIG = ReplicaConfig(device="cpu", tokens_per_batch=512, verify_golden=False, encoding_timeout_s=20.0, cpus_per_replica=0.25)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_export(tmp_path_factory.mktemp("models") / "tiny")
    # Golden scores are those of the other template.
    change_contract(made, template=TEMPLATE, golden=())
    return made


@pytest.fixture(scope="module")
def replica(ray_local: None, export: Path) -> Iterator[Any]:
    from ray import serve

    from rayward.serving.replica import ScorerDeployment

    deployment: Any = ScorerDeployment
    options = {"max_ongoing_requests": 100, "ray_actor_options": {"num_cpus": 0.25}, "health_check_period_s": 1.0}
    yield serve.run(deployment.options(**options).bind(str(export), CONFIG, "tiny"), name=APP, route_prefix=None)
    serve.shutdown()


def call(*items: ScoreItem, caller: str = "a") -> ScoreCall:
    return ScoreCall(items, request_id="r", caller=caller)


def stats_when(replica: Any, condition: Callable[[Stats], bool]) -> Stats:
    """The first statistics for which the condition holds; every question is a round trip, so nothing spins."""
    for _ in range(20_000):
        stats: Stats = replica.stats.remote().result(timeout_s=60)
        if condition(stats):
            return stats
    raise AssertionError(f"the condition never held; the last: {stats}")


def queued(stats: Stats) -> float:
    return stats.gauges[("queued_items", ())]


def test_it_scores_by_handle_what_the_scorer_scores(replica: Any, export: Path) -> None:
    scored = replica.score.remote(call(*ITEMS)).result(timeout_s=120)
    scorer = load_scored_model(export, Placement(device="cpu", tokens_per_batch=512, verify=False))
    assert scored.version == scorer.version
    for found, expected in zip(scored.results, scorer.score(ITEMS), strict=True):
        assert found.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert scored.replica == replica.stats.remote().result(timeout_s=60).source


def test_a_template_that_loops_holds_up_nobody_and_ends_with_its_caller(replica: Any) -> None:
    looping = replica.score.remote(call(LOOPING, caller="b"))
    stats_when(replica, lambda stats: queued(stats) == 1)
    for _ in range(3):
        scored = replica.score.remote(call(*ITEMS)).result(timeout_s=120)
        assert all(result.rewards is not None for result in scored.results)
    looping.cancel()
    stats_when(replica, lambda stats: queued(stats) == 0)


def test_a_template_that_loops_fails_alone(replica: Any) -> None:
    scored = replica.score.remote(call(ITEMS[0], LOOPING, ITEMS[1])).result(timeout_s=180)
    first, looped, last = scored.results
    assert first.rewards is not None
    assert last.rewards is not None
    assert looped.error is not None
    assert looped.error.code == "encoding_timeout"
    stats_when(replica, lambda stats: stats.counters.get(("encoder_restarts_total", (("reason", "timeout"),)), 0) >= 1)


def test_a_killed_replica_takes_its_encoders_along_and_another_one_answers(replica: Any) -> None:
    before = replica.stats.remote().result(timeout_s=60).source
    (process,) = named(f"ServeReplica:{APP}")
    encoders = process.children(recursive=True)
    assert encoders
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(encoders, timeout=60)
    assert alive == []
    found = _answered_again(replica)
    assert found.replica != before
    assert all(result.rewards is not None for result in found.results)


def _answered_again(replica: Any) -> Any:
    from ray.exceptions import RayActorError

    for _ in range(100):
        try:
            return replica.score.remote(call(*ITEMS)).result(timeout_s=120)
        # The handle learns of the death by asking.
        except RayActorError:
            continue
    raise AssertionError("no replica answered")
