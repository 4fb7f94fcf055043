"""The ingress's deployment: the HTTP application of `serving.http` in a replica of Serve. Holds no model, invents no reward.

    Ingress.bind(config, assemble, *handles)      assemble(config, *handles) -> Front, called in the replica

`assemble` decides who scores and what is mounted beside (`serving.assembly`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from rayward.config.scoring import ScoringConfig
from rayward.errors import marking
from rayward.serving.auth import Keys
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.loopback import stay_on_loopback

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
