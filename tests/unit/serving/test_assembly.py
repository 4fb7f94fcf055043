"""What an ingress asks of the manager by handle, and what it makes of the sums of all ingresses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rayward.errors import RuleError, UnavailableError
from rayward.serving import shadow
from rayward.serving.calls import Stats
from rayward.serving.drift import drift_of
from rayward.serving.front import Incoming

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Remote:
    """A method of a handle."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        return self._answer(*arguments)


class Handle:
    """The manager's handle, which notes what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._error = error
        self.administer = Remote(self._administer)

    async def _administer(self, *arguments: Any) -> dict[str, Any]:
        self.asked.append(arguments)
        if self._error is not None:
            raise self._error
        return {"models": {}}


def asked(handle: Handle, path: str, body: bytes = b"{}") -> Any:
    from rayward.serving.assembly import admin_endpoints

    (endpoint,) = (each for each in admin_endpoints(handle) if each.path == path)
    return asyncio.run(endpoint.answer(Incoming({}, {}, {}, body, "ops", "id")))


def test_every_verb_needs_a_key_of_scope_admin_and_reaches_the_manager() -> None:
    from rayward.serving.administration import VERBS
    from rayward.serving.assembly import admin_endpoints

    handle = Handle()
    endpoints = admin_endpoints(handle)
    assert {endpoint.scope for endpoint in endpoints} == {"admin"}
    assert {endpoint.path for endpoint in endpoints} == {"/admin/models", *(f"/admin/models/{verb}" for verb in VERBS)}
    assert asked(handle, "/admin/models/promote", b'{"model": "m"}') == {"models": {}}
    assert asked(handle, "/admin/models", b"") == {"models": {}}
    assert handle.asked == [("promote", b'{"model": "m"}'), ("list", b"")]


def test_what_the_manager_refuses_stays_what_it_is_and_a_manager_that_is_away_is_retryable() -> None:
    from ray.serve.exceptions import DeploymentUnavailableError

    with pytest.raises(RuleError, match="no such model"):
        asked(Handle(RuleError("unknown_model", "no such model", remedy="x")), "/admin/models/rollback")
    with pytest.raises(UnavailableError):
        asked(Handle(DeploymentUnavailableError("away")), "/admin/models/rollback")


def test_a_manager_that_does_not_answer_is_given_up() -> None:
    from rayward.serving.assembly import ask_manager

    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(UnavailableError, match="did not answer"):
        asyncio.run(ask_manager(Remote(never), timeout_s=0.01))


def test_a_drift_is_that_of_all_ingresses() -> None:
    labels = (("current", "a"), ("model", "m"), ("shadow", "b"))

    def of(completions: float, total: float, largest: float, pairs: float, agreeing: float) -> Stats:
        counters = {
            (shadow.COMPLETIONS, labels): completions, (shadow.ABS_DIFFERENCE, labels): total, (shadow.PAIRS, labels): pairs,
            (shadow.AGREEING_PAIRS, labels): agreeing, (shadow.COMPLETIONS, (("current", "z"), *labels[1:])): 100.0,
            (shadow.UNCOMPARED, (*labels, ("reason", "item"))): 1.0, (shadow.UNCOMPARED, (*labels, ("reason", "failed"))): 2.0,
        }  # fmt: skip
        return Stats(
            "s", "ingress", 0.0, counters=counters, gauges={(shadow.MAX_DIFFERENCE, labels): largest, (shadow.DIFFERENCE, labels): -total}
        )

    stats = [of(3.0, 3.0, 2.0, 4.0, 1.0), of(1.0, 5.0, 5.0, 0.0, 0.0)]
    drift = drift_of(stats, model="m", current="a", version="b")
    assert drift is not None
    assert (drift.num_completions, drift.mean_abs_difference, drift.mean_difference, drift.max_abs_difference) == (4, 2.0, -2.0, 5.0)
    assert (drift.num_pairs, drift.rank_agreement, drift.num_uncompared) == (4, 0.25, 6)
    alone = drift_of([of(1.0, 5.0, 5.0, 0.0, 0.0)], model="m", current="a", version="b")
    assert alone is not None
    assert alone.rank_agreement is None
    assert drift_of(stats, model="m", current="a", version="c") is None
    assert drift_of([], model="m", current="a", version="b") is None
