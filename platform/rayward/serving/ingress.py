"""The ingress's deployment: the HTTP application of `serving.http` in a replica of Serve. Holds no model, invents no reward.

    Ingress.bind(config, assemble, *handles)      assemble(config, *handles) -> Front, called in the replica

`assemble` decides who scores and what is mounted beside (`serving.front`); `one_scorer` is the smallest one: a single deployment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from rayward.config.scoring import ScoringConfig
from rayward.errors import OverloadedError, RuleError, ServerError, UnavailableError, VersionError, marking
from rayward.serving.auth import Keys
from rayward.serving.calls import ScoredCall
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.loopback import stay_on_loopback
from rayward.serving.mounts import all_routes
from rayward.serving.seeing import page_endpoint
from rayward.wire.items import ScoreItem
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

Assemble: TypeAlias = Callable[..., Front]


@serve.deployment(name="ingress")
@serve.ingress()
class Ingress:
    """HTTP in front of the scorers.

    Args:
        assemble: called with the configuration and the handles.
    """

    @marking
    def __init__(self, config: ScoringConfig, assemble: Assemble, *handles: DeploymentHandle[Any]) -> None:
        stay_on_loopback()
        self._config = config
        self._keys = Keys.of(config)
        self._front = assemble(config, *handles)

    def __serve_build_asgi_app__(self) -> Starlette:
        # Serve's proxy reads x-request-id, makes one where there is none, and puts it into the reply.
        return build_http(self._front, self._config, self._keys, echo_request_id=False)


class OneScorer:
    """`Backends` of one deployment that serves one model."""

    def __init__(self, scorer: DeploymentHandle[Any], model_name: str) -> None:
        self._scorer = scorer
        self._model_name = model_name
        self._info: ModelInfo | None = None

    async def score(
        self, items: Sequence[ScoreItem], *, request_id: str, caller: str, budget_s: float | None, model: str | None, version: str | None
    ) -> tuple[str, ScoredCall]:
        """As `Backends.score`."""
        if model not in (None, self._model_name):
            raise RuleError("unknown_model", "the model that was asked for is not served here", remedy=f"ask for {self._model_name!r}")
        if version is not None and (self._info is None or version != self._info.version):
            raise VersionError("the pinned version is not served, and nothing was scored", remedy="pin another one, or none")
        try:
            scored = await self._scorer.score.remote(items)
        except BackPressureError as exc:
            raise OverloadedError("the queue is full", remedy="send less at once and retry after the given delay") from exc
        except (DeploymentUnavailableError, RayActorError) as exc:
            logger.error("request %s: no scorer replica answered", request_id)
            raise UnavailableError("no scorer replica answered", remedy="retry; a replica is being started") from exc
        except RayTaskError as exc:
            # Its text may quote the request.
            logger.error("request %s: the scorer failed (%s)", request_id, type(exc.cause).__name__)
            raise ServerError(f"the scorer failed ({type(exc.cause).__name__})", remedy="retry; look into the server's log") from exc
        return self._model_name, ScoredCall(scored.version, tuple(scored.results))

    def models(self) -> list[ModelInfo]:
        """As `Backends.models`."""
        return [] if self._info is None else [self._info]

    def ready(self) -> bool:
        """As `Backends.ready`."""
        return self._info is not None

    async def learn(self) -> None:
        """Ask the scorer what it serves."""
        self._info = await self._scorer.info.remote()


def one_scorer(config: ScoringConfig, scorer: DeploymentHandle[Any]) -> Front:
    """The native schema over one deployment."""
    name = config.model_name or (config.model or "").rstrip("/").rsplit("/", 1)[-1]
    backends = OneScorer(scorer, name)
    return Front(backends, routes=all_routes(), endpoints=(page_endpoint(),), background=(backends.learn,))
