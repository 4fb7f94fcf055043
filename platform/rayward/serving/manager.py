"""The manager: makes the table of routes true, again and again, from whatever it finds. No Ray here; Serve is behind `Fleet`.

Nothing that it needs is kept in its memory alone: what should be is in storage, what is is asked of Serve. So it may die at any time, the
controller may, and the whole cluster: the next manager goes on where the table says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from rayward.config.scoring import ReplicaConfig, ScoringConfig
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ConfigError, RaywardError, RuleError
from rayward.schema import identity
from rayward.serving import rollout
from rayward.serving.administration import CanaryShare, Promote, Publish, Retire, Rollback, Shadow, parse_asked, replica_config
from rayward.serving.drift import Drift
from rayward.serving.preflight import check_model, startup_error
from rayward.serving.routes import Declared, ModelRoutes, Release, RouteTable
from rayward.serving.sources import is_elsewhere, localise, look_up
from rayward.serving.table_store import StaleTableError, TableStore
from rayward.wire.native import ModelInfo

logger = logging.getLogger("ray.serve")

AppState: TypeAlias = Literal["starting", "running", "failed", "stopping"]
LINGER_S = 10.0
"""How long an application that has no part any more still takes requests: longer than every ingress needs to read the new table."""
RETRY_S = 60.0
"""How long after a failure something that is wanted is tried again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One Serve application as it is.

    Attributes:
        message: what Serve says of it; the marked error of a constructor is in it.
        num_replicas: that run.
    """

    state: AppState
    message: str = ""
    num_replicas: int = 0


class Fleet(Protocol):
    """The applications of the versions."""

    def standing(self) -> dict[str, Standing]:
        """Every application of the cluster by its name."""
        ...

    def start(self, application: str, model: str, release: Release) -> None:
        """Deploy it, or its new settings in place; returns before it runs."""
        ...

    def stop(self, application: str) -> None:
        """Let its replicas finish what they hold and take it down; returns before it is gone."""
        ...

    def info(self, application: str) -> ModelInfo:
        """What its replicas say that they serve."""
        ...


def declared_models(config: ScoringConfig) -> dict[str, str]:
    """The models that the settings name: name -> source, the default one first.

    Raises:
        ConfigError: two have one name, or the default one is none of them.
    """
    models = dict(config.models)
    if config.model is not None:
        name = config.model_name or default_name(config.model)
        if name in models:
            raise ConfigError(f"model and models both have a model named {name!r}", remedy="name one of them otherwise, by model_name")
        models = {name: config.model, **models}
    elif config.model_name is not None:
        raise ConfigError(f"model_name is {config.model_name!r} and there is no model", remedy="set model, or name it in models")
    for name in models:
        try:
            rollout.check_name(name)
        except RuleError as exc:
            raise ConfigError(exc.problem, remedy="choose another name: model_name, or name=path") from exc
    return models


def default_name(source: str) -> str:
    """The last part of a directory, URI or hub name."""
    if is_elsewhere(source):
        return source.partition("?")[0].rstrip("/").rpartition("/")[2].partition("@")[0]
    return Path(source).expanduser().resolve().name


class Manager:
    """Makes the table true, and changes it when an administrator asks.

    Args:
        store: of the table.
        fleet: Serve.
        config: of the application: the models that it names are published, and each change of one of them too.
        front: name of the application.
        clock: monotonic, seconds.
        now: seconds since 1970.
        drift: what is known of a model's current version and its shadow.
    """

    def __init__(
        self,
        store: TableStore,
        fleet: Fleet,
        config: ScoringConfig,
        *,
        front: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        drift: Callable[[str, str, str], Drift | None] = lambda _model, _current, _shadow: None,
    ) -> None:
        self.front = rollout.check_front(front)
        self._store, self._fleet, self._config, self._clock, self._now = store, fleet, config, clock, now
        self._declared = {name: Declared(source=source, config=config.replica) for name, source in declared_models(config).items()}
        self._unread: dict[str, tuple[float, RaywardError]] = {}
        self._unwanted_since: dict[str, float] = {}
        self._tried_at: dict[str, float] = {}
        self._drift = drift
        self.table = RouteTable()
        self._standing: dict[str, Standing] = {}
        self._busy = True
        # One writer in this process; across processes the store watches the generation.
        self._writing = threading.Lock()

    # ---- what is asked for ----

    def administer(self, verb: str, body: bytes) -> dict[str, Any]:
        """Do what an administrator asks; the list of models as it stands then.

        Raises:
            RuleError, VersionError: it cannot be done; nothing was changed.
            ModelLoadError, ContractError: what is to be published cannot be read.
            UnavailableError: storage does not answer.
        """
        asked = parse_asked(verb, body)
        key: str | None = None
        match asked:
            case Publish():
                key = self.publish(asked)
            case Promote():
                self._change(lambda table: rollout.promote(table, asked.model, asked.version))
            case Rollback():
                self._change(lambda table: rollout.rollback(table, asked.model))
            case CanaryShare():
                self._change(lambda table: rollout.canary(table, asked.model, asked.version, asked.share))
            case Shadow():
                self._change(lambda table: rollout.shadow(table, asked.model, asked.version))
            case Retire():
                self._change(lambda table: rollout.retire(table, asked.model, asked.version))
            case _:
                pass
        return {**self.listing(), **({"published": key} if key else {})}

    def publish(self, asked: Publish) -> str:
        """Put a version into the table, to be loaded; what the table calls it for now.

        Raises:
            RuleError: name or settings are wrong.
            ModelLoadError, ContractError: there is no model there.
        """
        rollout.check_name(asked.model)
        if not is_elsewhere(asked.source) and not Path(asked.source).is_absolute():
            raise RuleError(
                "bad_source",
                f"source {asked.source[:200]!r} is no absolute path, no URI and no hub name org/model",
                remedy="send an absolute path",
            )
        defaults = self._declared[asked.model].config if asked.model in self._declared else self._config.replica
        config = replica_config(asked.config, defaults)
        release = self._release_of(asked.source, config, promote=asked.promote)
        self._change(lambda table: rollout.publish(table, asked.model, release))
        return release.version

    def listing(self) -> dict[str, Any]:
        """Models, versions, their parts and states, as JSON."""
        table = self._store.read()
        return {
            "generation": table.generation,
            "default_model": table.default_model,
            "models": {name: self._describe(table, name, routes) for name, routes in table.models.items()},
            "declared": {name: declared.source for name, declared in table.declared.items()},
            "unreadable": {name: _error(error) for name, (_, error) in self._unread.items()},
        }

    def _describe(self, table: RouteTable, model: str, routes: ModelRoutes) -> dict[str, Any]:
        versions = []
        for version, release in routes.releases.items():
            drift = self._drift(model, routes.current, version) if routes.shadow == version and routes.current else None
            application = table.application(self.front, model, version)
            standing = self._standing.get(application)
            versions.append(
                {
                    "version": version,
                    "state": release.state,
                    "roles": roles_of(routes, version),
                    "source": release.source,
                    "published_at": release.published_at,
                    "error": None if release.error is None else _error(RaywardError.from_json(release.error)),
                    "application": application,
                    "serve": None if standing is None else standing.state,
                    "message": "" if standing is None or standing.state == "running" else standing.message,
                    "num_replicas": 0 if standing is None else standing.num_replicas,
                    "drift": None if drift is None else drift.model_dump(),
                }
            )
        share = routes.canary.share if routes.canary else None
        return {
            "current": routes.current,
            "previous": routes.previous,
            "shadow": routes.shadow,
            "canary_share": share,
            "versions": versions,
        }

    # ---- what is made true ----

    def tick(self) -> None:
        """One round: start what is missing, note what has become of what was started, take down what nobody needs.

        Raises:
            UnavailableError: storage does not answer; the next round tries again.
            Exception: Serve does not answer; likewise.
        """
        self._declare()
        table = self._store.read()
        self._standing = self._fleet.standing()
        for model, version, release in list(rollout.releases(table)):
            try:
                self._settle(table, model, version, release)
            except StaleTableError:
                logger.info("the table of routes changed meanwhile; the next round goes on")
        table = self._store.read()
        self.table = table
        self._take_down(table)
        waits = any(
            release.state == "loading" or not self._runs(table, model, version) for model, version, release in rollout.releases(table)
        )
        self._busy = waits or bool(self._unwanted_since)

    def end(self) -> None:
        """This manager is being stopped; when that is because the whole application is, nobody comes after it, and its versions end too."""
        standing = self._fleet.standing()
        front = standing.get(self.front)
        if front is not None and front.state != "stopping":
            return
        for name, found in standing.items():
            if name.startswith(f"{self.front}.") and found.state != "stopping":
                self._fleet.stop(name)

    def is_busy(self) -> bool:
        """Whether something is being started or taken down, so that the next round should come soon."""
        return self._busy

    def _runs(self, table: RouteTable, model: str, version: str) -> bool:
        standing = self._standing.get(table.application(self.front, model, version))
        return standing is not None and standing.state == "running"

    def _settle(self, table: RouteTable, model: str, version: str, release: Release) -> None:
        application = table.application(self.front, model, version)
        standing = self._standing.get(application)
        if release.state == "failed":
            nobody_answers = table.models[model].current is None
            if nobody_answers and self._due(application):
                self._change(lambda t: rollout.again(t, model, version))
        elif standing is None or (release.deployed != deployed_as(release) and standing.state != "stopping"):
            self._tried_at[application] = self._clock()
            logger.info("starting %s", application)
            self._fleet.start(application, model, release)
            starting = release.state == "ready" and (standing is None or release.starting)
            self._change(lambda t: rollout.note(t, model, version, deployed=deployed_as(release), starting=starting))
        elif standing.state == "failed":
            self._has_failed(model, version, release, application, standing)
        elif standing.state == "running" and release.state == "ready":
            if release.error is not None or release.starting:
                self._change(lambda t: rollout.note(t, model, version, error=None, starting=False))
        elif standing.state == "running":
            info = self._fleet.info(application)
            self._change(lambda t: rollout.loaded(t, model, version, info, front=self.front))
            logger.info("%s is ready as version %s", application, info.version)

    def _has_failed(self, model: str, version: str, release: Release, application: str, standing: Standing) -> None:
        error = startup_error(standing.message)
        logger.error("%s did not start: %s", application, error)
        if release.state == "loading":
            self._change(lambda t: rollout.failed(t, model, version, error))
            self._fleet.stop(application)
            return
        # It has answered before, and replicas of its last settings may still: nothing is taken away, it is tried again.
        self._change(lambda t: rollout.note(t, model, version, error=error.to_json()))
        if self._due(application):
            self._tried_at[application] = self._clock()
            self._fleet.start(application, model, release)

    def _take_down(self, table: RouteTable) -> None:
        wanted = {
            table.application(self.front, model, version)
            for model, version, release in rollout.releases(table)
            if release.state != "failed"
        }
        mine = {name for name in self._standing if name.startswith(f"{self.front}.")}
        for name in set(self._unwanted_since) - (mine - wanted):
            del self._unwanted_since[name]
        for name in mine - wanted:
            since = self._unwanted_since.setdefault(name, self._clock())
            if self._clock() - since >= LINGER_S and self._standing[name].state != "stopping":
                logger.info("taking down %s", name)
                self._fleet.stop(name)

    def _declare(self) -> None:
        # The settings are compared with what they said last time: an administrator's promotion outlives a restart with the old settings.
        known = self._store.read().declared
        for name, declared in self._declared.items():
            if known.get(name) == declared or self._clock() < self._unread.get(name, (0.0, None))[0]:
                continue
            try:
                release = self._release_of(declared.source, declared.config, promote=True)
            except RaywardError as exc:
                logger.error("model %s cannot be read: %s", name, exc)
                self._unread[name] = (self._clock() + RETRY_S, exc)
                continue
            self._unread.pop(name, None)
            self._change(lambda t, n=name, r=release, d=declared: _declared(t, n, r, d))  # type: ignore[misc]
        default = self._config.default_model or next(iter(self._declared), None)
        if default is not None:
            self._change(
                lambda t: t if t.default_model == default or default not in t.models else t.model_copy(update={"default_model": default})
            )

    def _release_of(self, source: str, config: ReplicaConfig, *, promote: bool) -> Release:
        found = look_up(source)
        directory = localise(source, found.content)
        check_model(directory, verify=config.verify_golden)
        # Of a model without contract only the loaded weights tell.
        exported = (directory / CONTRACT_FILE).is_file()
        version = Contract.load(directory).model_version() if exported else rollout.unnamed(source, found.content or _traces(directory))
        return Release(version=version, source=source, config=config, published_at=self._now(), promote=promote, content=found.content)

    def _due(self, application: str) -> bool:
        return self._clock() - self._tried_at.get(application, float("-inf")) >= RETRY_S

    def _change(self, changed: Callable[[RouteTable], RouteTable]) -> RouteTable:
        with self._writing:
            return self._store.change(changed)


def deployed_as(release: Release) -> str:
    """Identity of what Serve is handed for a release."""
    return identity(release.config)


def roles_of(routes: ModelRoutes, version: str) -> list[str]:
    """The parts that a version has."""
    parts: Mapping[str, str | None] = {
        "current": routes.current,
        "previous": routes.previous,
        "canary": routes.canary.version if routes.canary else None,
        "shadow": routes.shadow,
    }
    return [part for part, held_by in parts.items() if held_by == version]


def _declared(table: RouteTable, model: str, release: Release, declared: Declared) -> RouteTable:
    table = rollout.publish(table, model, release)
    return table.model_copy(update={"declared": {**table.declared, model: declared}})


def _traces(directory: Path) -> str:
    # Sizes and times: enough to call a directory that was written again by another name until its replica says what it is.
    return repr(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir() if path.is_file()))


def _error(error: RaywardError) -> dict[str, str]:
    return {"type": type(error).__name__, "message": error.problem, "remedy": error.remedy}
