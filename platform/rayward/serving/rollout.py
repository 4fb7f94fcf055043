"""What may be done to the table of routes: pure functions from one table to the next. The manager stores what they return."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rayward.errors import ConfigError, RaywardError, RuleError, VersionError
from rayward.schema import digest
from rayward.serving.routes import Canary, ModelRoutes, Release, RouteTable
from rayward.wire.native import ModelInfo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
UNNAMED = "loading-"
"""Begins what a release is called until its first replica has said which version it is."""


def check_name(name: str, what: str = "model") -> str:
    """The name itself.

    Raises:
        RuleError: `bad_name`: it cannot be part of the name of a Serve application, or of its log files.
    """
    if NAME.fullmatch(name) is None:
        raise RuleError(
            "bad_name",
            f"the {what} name {name[:200]!r} is not of letters, digits, '.', '_' and '-', 1 to 100 of them and a letter or digit first",
            remedy="choose such a name",
        )
    return name


def check_front(name: str) -> str:
    """The name of an application with an ingress.

    Raises:
        ConfigError: it has a point, which separates it from the models and versions in the names of their applications.
    """
    if NAME.fullmatch(name) is None or "." in name:
        raise ConfigError(
            f"the application's name {name[:200]!r} is not of letters, digits, '_' and '-', a letter or digit first",
            remedy="choose such a name",
        )
    return name


def unnamed(source: str, content: str | None) -> str:
    """What a release is called until its version is known."""
    return f"{UNNAMED}{digest([source, content])[:12]}"


def releases(table: RouteTable) -> Iterator[tuple[str, str, Release]]:
    """Model, version and release of everything in the table."""
    for model, routes in table.models.items():
        for version, release in routes.releases.items():
            yield model, version, release


def publish(table: RouteTable, model: str, release: Release) -> RouteTable:
    """One version more, to be loaded beside the others; one that failed is loaded again, one that is there gets the new settings.

    Raises:
        RuleError: `bad_name`.
    """
    check_name(model)
    routes = table.models.get(model, ModelRoutes())
    standing = routes.releases.get(release.version)
    if standing is not None and standing.state != "failed":
        promote = standing.promote or release.promote
        release = standing.model_copy(update={"config": release.config, "promote": promote, "content": release.content or standing.content})
    routes = routes.model_copy(update={"releases": {**routes.releases, release.version: release}})
    if release.state == "ready" and release.promote:
        routes = _promoted(routes, release.version)
    return _with(table, model, routes).model_copy(update={"default_model": table.default_model or model})


def loaded(table: RouteTable, model: str, version: str, info: ModelInfo, *, front: str) -> RouteTable:
    """A replica of the release has verified its model and says what it is.

    The first version of a model that is ready becomes its current one, else nobody would answer.
    """
    routes = table.models[model]
    release = routes.releases[version]
    if version.startswith(UNNAMED):
        others = {name: other for name, other in routes.releases.items() if name != version}
        twin = others.get(info.version)
        if twin is not None and twin.state != "failed":
            # The same files from another place: what runs goes on, and the second copy is taken down.
            routes = routes.model_copy(update={"releases": others})
            return publish(_with(table, model, routes), model, release.model_copy(update={"version": info.version}))
        release = release.model_copy(update={"version": info.version, "application": table.application(front, model, version)})
        routes = routes.model_copy(update={"releases": others})
    elif info.version != version:
        error = VersionError(
            f"{release.source} was published as version {version} and holds {info.version} now",
            remedy="publish it again; a directory that is served must not change",
        )
        return failed(table, model, version, error)
    release = release.model_copy(update={"state": "ready", "error": None, "info": info})
    routes = routes.model_copy(update={"releases": {**routes.releases, release.version: release}})
    if routes.current is None or release.promote:
        routes = _promoted(routes, release.version)
    return _with(table, model, routes)


def failed(table: RouteTable, model: str, version: str, error: RaywardError) -> RouteTable:
    """The release could not be loaded or is not what its contract says; whatever else runs is not touched."""
    return _changed(table, model, version, state="failed", error=error.to_json(), deployed=None)


def again(table: RouteTable, model: str, version: str) -> RouteTable:
    """A release that failed is loaded once more."""
    return _changed(table, model, version, state="loading", error=None, deployed=None)


def note(table: RouteTable, model: str, version: str, **facts: object) -> RouteTable:
    """Facts of a release that change no route; none where it was retired meanwhile."""
    there = model in table.models and version in table.models[model].releases
    return _changed(table, model, version, **facts) if there else table


def promote(table: RouteTable, model: str, version: str) -> RouteTable:
    """The version answers from now on; the one before is kept for a rollback, and the one before that is taken down.

    Raises:
        RuleError: `unknown_model`, `unknown_version`.
        VersionError: it is not ready.
    """
    routes = _ready(table, model, version)
    return _with(table, model, _promoted(routes, version))


def _promoted(routes: ModelRoutes, version: str) -> ModelRoutes:
    release = routes.releases[version].model_copy(update={"promote": False})
    kept = {**routes.releases, version: release}
    if routes.current != version:
        last = routes.previous
        routes = routes.model_copy(
            update={
                "previous": routes.current,
                "current": version,
                "canary": None if routes.canary and routes.canary.version == version else routes.canary,
                "shadow": None if routes.shadow == version else routes.shadow,
            }
        )
        if last is not None and last not in routes.in_use():
            kept.pop(last, None)
    return routes.model_copy(update={"releases": kept})


def rollback(table: RouteTable, model: str) -> RouteTable:
    """The version that answered before does again; the one that it takes the place of is kept.

    Raises:
        RuleError: `unknown_model`.
        VersionError: there is none, or it is not ready.
    """
    routes = _routes(table, model)
    if routes.previous is None:
        raise VersionError(f"no version of {model} answered before {routes.current}", remedy="promote one of those that are ready")
    return promote(table, model, routes.previous)


def canary(table: RouteTable, model: str, version: str, share: float) -> RouteTable:
    """The version answers a share of the requests that pin none; share 0 ends that.

    Raises:
        RuleError: `unknown_model`, `unknown_version`, `bad_share`.
        VersionError: it is not ready, or answers already.
    """
    if not 0.0 <= share < 1.0:
        raise RuleError(
            "bad_share", f"share is {share}; the rule is 0 <= share < 1", remedy="promote the version to let it answer everything"
        )
    routes = _ready(table, model, version)
    if share == 0.0:
        ends = routes.canary is not None and routes.canary.version == version
        return _with(table, model, routes.model_copy(update={"canary": None})) if ends else table
    if routes.current == version:
        raise VersionError(f"version {version} of {model} is the current one already", remedy="name another version")
    return _with(table, model, routes.model_copy(update={"canary": Canary(version=version, share=share)}))


def shadow(table: RouteTable, model: str, version: str | None) -> RouteTable:
    """The version scores what the current one scores, and its rewards are compared; None ends that.

    Raises:
        RuleError: `unknown_model`, `unknown_version`.
        VersionError: it is not ready, or answers already.
    """
    routes = _routes(table, model) if version is None else _ready(table, model, version)
    if version is not None and routes.current == version:
        raise VersionError(f"version {version} of {model} is the current one already", remedy="name another version")
    return _with(table, model, routes.model_copy(update={"shadow": version}))


def retire(table: RouteTable, model: str, version: str | None) -> RouteTable:
    """The version loses its parts and is taken down after what it holds; None: the model as a whole.

    Raises:
        RuleError: `unknown_model`, `unknown_version`.
        VersionError: it answers, and another one would have to be promoted first.
    """
    routes = _routes(table, model)
    if version is None:
        models = {name: other for name, other in table.models.items() if name != model}
        default = table.default_model if table.default_model != model else next(iter(models), None)
        return table.model_copy(update={"models": models, "default_model": default})
    _known(routes, model, version)
    if routes.current == version:
        raise VersionError(f"version {version} of {model} answers", remedy="promote another one first, or retire the model as a whole")
    update = {
        "releases": {name: release for name, release in routes.releases.items() if name != version},
        "previous": None if routes.previous == version else routes.previous,
        "canary": None if routes.canary and routes.canary.version == version else routes.canary,
        "shadow": None if routes.shadow == version else routes.shadow,
    }
    return _with(table, model, routes.model_copy(update=update))


def _routes(table: RouteTable, model: str) -> ModelRoutes:
    if model not in table.models:
        known = ", ".join(sorted(table.models)) or "none"
        raise RuleError("unknown_model", f"model {model[:200]!r} is not served here; served: {known}", remedy="name one of these")
    return table.models[model]


def _known(routes: ModelRoutes, model: str, version: str) -> Release:
    if version not in routes.releases:
        known = ", ".join(sorted(routes.releases)) or "none"
        raise RuleError(
            "unknown_version", f"{model} has no version {version[:80]!r}; it has: {known}", remedy="name one of these, or publish it"
        )
    return routes.releases[version]


def _ready(table: RouteTable, model: str, version: str) -> ModelRoutes:
    routes = _routes(table, model)
    release = _known(routes, model, version)
    if release.state != "ready":
        raise VersionError(
            f"version {version} of {model} is {release.state}, not ready",
            remedy="publish it again after its error was mended" if release.state == "failed" else "wait until it is ready",
        )
    return routes


def _changed(table: RouteTable, model: str, version: str, **facts: object) -> RouteTable:
    routes = table.models[model]
    release = routes.releases[version].model_copy(update=facts)
    return _with(table, model, routes.model_copy(update={"releases": {**routes.releases, version: release}}))


def _with(table: RouteTable, model: str, routes: ModelRoutes) -> RouteTable:
    return table.model_copy(update={"models": {**table.models, model: routes}})
