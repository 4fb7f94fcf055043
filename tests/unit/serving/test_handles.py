"""What Serve's and Ray's errors of a call become."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayward.errors import OverloadedError, RaywardError, ServerError, UnavailableError
from rayward.serving.calls import ScoreCall
from rayward.serving.dispatch import ReplicaDiedError

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def errors() -> dict[str, tuple[BaseException, type[RaywardError]]]:
    from ray import exceptions as of_ray
    from ray.serve import exceptions as of_serve
    from ray.serve._private.common import DeploymentID

    refused = OverloadedError("full", remedy="later", retry_after_s=7.0)
    return {
        "crash": (of_ray.ActorDiedError(), ReplicaDiedError),
        "memory": (of_ray.OutOfMemoryError("low on memory"), ReplicaDiedError),
        "node": (of_ray.NodeDiedError("gone"), ReplicaDiedError),
        "unavailable": (of_ray.ActorUnavailableError("network", None), UnavailableError),
        "failed to deploy": (of_serve.DeploymentUnavailableError(DeploymentID("scorer", "a")), UnavailableError),
        "cancelled": (of_ray.TaskCancelledError(), UnavailableError),
        "reply lost": (of_ray.ObjectLostError("00" * 28, None, ""), UnavailableError),
        "back pressure": (of_serve.BackPressureError(3, 2), OverloadedError),
        "our own": (of_ray.RayTaskError("score", "traceback", refused).as_instanceof_cause(), OverloadedError),
        "a bug": (of_ray.RayTaskError("score", "traceback", ValueError("secret")).as_instanceof_cause(), ServerError),
        "somebody else's death": (of_ray.RayTaskError("score", "t", of_ray.ActorDiedError()).as_instanceof_cause(), ServerError),
    }


@pytest.mark.parametrize(
    "case",
    ["crash", "memory", "node", "unavailable", "failed to deploy", "cancelled", "reply lost", "back pressure", "our own", "a bug",
     "somebody else's death"],
)  # fmt: skip
def test_every_error_of_a_call_becomes_ours(case: str) -> None:
    from rayward.serving.handles import our_error

    exc, kind = errors()[case]
    error = our_error(exc)
    assert type(error) is kind
    assert "secret" not in str(error)
    if isinstance(error, ReplicaDiedError):
        assert error.by_order == (case == "node")
    if case == "our own":
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s == 7.0


@pytest.mark.parametrize(
    ("account", "by_order"),
    [
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", False),
        ("The actor died because its node has died. Node Id: 3a", True),
        ("The actor is dead because it was killed by `ray.kill`.", True),
    ],
)
def test_a_death_that_no_item_caused_is_told_apart(account: str, by_order: bool) -> None:
    from ray.core.generated.common_pb2 import ActorDiedErrorContext
    from ray.exceptions import ActorDiedError

    from rayward.serving.handles import our_error

    error = our_error(ActorDiedError(ActorDiedErrorContext(actor_id=b"0" * 16, error_message=account)))
    assert isinstance(error, ReplicaDiedError)
    assert error.by_order is by_order


def test_a_cancelled_call_is_cancelled_at_the_replica() -> None:
    from rayward.serving.handles import ServeHandle

    class Response:
        cancelled = False

        def __await__(self) -> Any:
            return asyncio.Event().wait().__await__()

        def cancel(self) -> None:
            self.cancelled = True

    class Method:
        def __init__(self) -> None:
            self.response = Response()

        def remote(self, _: ScoreCall) -> Response:
            return self.response

    class Handle:
        score = Method()

    async def go() -> None:
        handle: Any = Handle()
        task = asyncio.create_task(ServeHandle(handle).score(ScoreCall((), request_id="r")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert Handle.score.response.cancelled
