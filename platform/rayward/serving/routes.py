"""The table of routes: which versions of which models there are, and who answers. A pure record, kept in storage by the manager.

    publish -> loading -> ready -> (shadow | canary) -> current -> previous -> retired

Every version is a Serve application of its own. Nothing here starts or stops one: the table says what should be, the manager makes it so,
and every ingress reads the table from storage by itself, so that it outlives all processes.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from rayward.config.scoring import ReplicaConfig
from rayward.errors import RuleError, UnavailableError, VersionError
from rayward.schema import Frozen, Versioned
from rayward.wire.native import ModelInfo

State: TypeAlias = Literal["loading", "ready", "failed"]


class Release(Frozen):
    """One version of one model."""

    version: str
    """What its contract, or its files, say that it is."""
    source: str
    """Directory, URI or hub name, as given."""
    config: ReplicaConfig = ReplicaConfig()
    """How its replicas run."""
    state: State = "loading"
    """`ready` once a replica has verified its golden scores."""
    error: str | None = None
    """Why it failed: `RaywardError.to_json`."""
    published_at: float = 0.0
    """Seconds since 1970."""
    promote: bool = False
    """Becomes current as soon as it is ready."""
    application: str | None = None
    """Serve application that runs it; None: `application_of`. A model without contract is started before its version is known."""
    content: str | None = None
    """What identifies the files that were published, where they are not in a directory of the cluster: another content is refused."""
    deployed: str | None = None
    """Identity of what was handed to Serve last; another one is handed over again."""
    starting: bool = False
    """Verified before, and started anew (on a new cluster, say): none of its replicas runs yet."""
    info: ModelInfo | None = None
    """What its replicas say that it is; None until one has."""


class Canary(Frozen):
    """A version that answers a share of the requests which pin none."""

    version: str
    share: float = Field(gt=0.0, lt=1.0)


class ModelRoutes(Frozen):
    """The versions of one model, and their parts."""

    releases: dict[str, Release] = Field(default_factory=dict)
    current: str | None = None
    """Answers; None until the first one is ready."""
    previous: str | None = None
    """Answered before, and is kept for a rollback."""
    canary: Canary | None = None
    shadow: str | None = None
    """Scores what the current one scores; its rewards are compared and thrown away."""

    def in_use(self) -> set[str]:
        """The versions that have a part; others are taken down."""
        named = {self.current, self.previous, self.shadow, self.canary.version if self.canary else None}
        return {version for version in named if version is not None}


class Declared(Frozen):
    """What the configuration of the application said of a model when it was last read: only a change of it changes the routes."""

    source: str
    config: ReplicaConfig = ReplicaConfig()


class Choice(Frozen):
    """Who answers one request."""

    model: str
    version: str
    shadow: str | None = None


class RouteTable(Versioned):
    """All models of one application."""

    kind: ClassVar[str] = "table of routes"
    remedy: ClassVar[str] = "name another `state`, or delete the file and publish the models again"
    version: int = 1
    generation: int = 0
    """Grows by one with every change."""
    default_model: str | None = None
    models: dict[str, ModelRoutes] = Field(default_factory=dict)
    declared: dict[str, Declared] = Field(default_factory=dict)

    def application(self, front: str, model: str, version: str) -> str:
        """Name of the Serve application that runs a version of this table."""
        release = self.models[model].releases.get(version) if model in self.models else None
        return (release.application if release else None) or application_of(front, model, version)

    def choose(self, model: str | None, version: str | None, request_id: str) -> Choice:
        """Who answers a request: the pinned version, else the canary for its share of the request ids, else the current one.

        The whole request goes to one version, so the completions of a group are judged by one.

        Raises:
            RuleError: `unknown_model`.
            VersionError: the pinned version is not served.
            UnavailableError: no version is ready yet.
        """
        name = self.default_model if model is None else model
        routes = self.models.get(name or "")
        if name is None or routes is None:
            known = ", ".join(sorted(self.models)) or "none"
            raise RuleError(
                "unknown_model", f"model {(name or '')[:200]!r} is not served here; served: {known}", remedy="ask for one of these"
            )
        if version is not None:
            release = routes.releases.get(version)
            if release is None or release.state != "ready":
                ready = ", ".join(sorted(v for v, r in routes.releases.items() if r.state == "ready")) or "none"
                raise VersionError(
                    f"version {version[:80]!r} of {name} is not served, and nothing was scored; served: {ready}",
                    remedy="pin one of these, or none",
                )
            return Choice(model=name, version=version)
        if routes.current is None:
            raise UnavailableError(f"no version of {name} is ready", remedy="retry; see GET /v1/models for what it is doing")
        if routes.canary is not None and _share_of(request_id) < routes.canary.share:
            return Choice(model=name, version=routes.canary.version)
        return Choice(model=name, version=routes.current, shadow=routes.shadow)


def _share_of(request_id: str) -> float:
    # The same on every ingress, and for every try of one request.
    return int.from_bytes(hashlib.blake2b(request_id.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2.0**64


def application_of(front: str, model: str, version: str) -> str:
    """Name of the Serve application of one version; `front` is that of the ingress."""
    return f"{front}.{model}.{version}"
