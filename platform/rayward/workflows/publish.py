"""Publishing to a running service over HTTP: `rayward models …`, and the end of a training job. Needs no Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rayward.errors import (
    AccessError,
    ConfigError,
    ModelLoadError,
    RaywardError,
    RequestError,
    RuleError,
    ServerError,
    UnavailableError,
    VersionError,
)

KEY_VARIABLE = "RAYWARD_API_KEY"
TIMEOUT_S = 600.0
"""A model that has to be copied first is answered for when it is there."""

POLL_S = 1.0
PATIENT_TRIES = 120


class Service:
    """The admin routes of one service.

    Args:
        url: base URL.
        key_file: holds a key of scope admin; None: RAYWARD_API_KEY.
        transport: of HTTP, for tests.

    Raises:
        ConfigError: the file cannot be read or is empty; the URL is none.
    """

    def __init__(self, url: str, key_file: Path | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the URL is {url!r}; the rule is http://… or https://…", remedy="give the base URL of the service")
        self.url = url.rstrip("/")
        key = key_of(key_file)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._transport = transport

    def ask(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do something; the models as they stand then.

        Raises:
            UnavailableError: nobody listens there.
            AccessError: without a key of scope admin.
            RuleError, VersionError, RequestError: it cannot be done.
            ServerError: the service failed.
        """
        try:
            with httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, connect=10.0), transport=self._transport) as http:
                response = http.post(f"{self.url}/admin/models/{verb}", json=dict(body), headers=self._headers)
        except httpx.TransportError as exc:
            raise UnavailableError(
                f"{self.url} does not answer ({type(exc).__name__})", remedy="check --url, and that the service runs"
            ) from exc
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if response.is_success and isinstance(reply, dict):
            return reply
        raise _error_of(response.status_code, reply, f"{self.url}/admin/models/{verb}")


def key_of(key_file: Path | None) -> str | None:
    """The key in a file, else the one in the environment.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the key file {key_file} cannot be read ({exc})", remedy="check the path") from exc
    if not key or "\n" in key:
        raise ConfigError(f"the key file {key_file} does not hold one line with a key", remedy="write the key into it, and nothing else")
    return key


def publish_model(
    service: Service,
    model: str,
    source: str,
    *,
    config: Mapping[str, Any] | None = None,
    promote: bool = False,
    wait: bool = True,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Any]:
    """Publish a directory, URI or hub name under a name; a path is taken from here.

    Args:
        config: settings of its replicas, where they differ from the service's.
        promote: let it answer as soon as it is verified.
        wait: until it is verified.

    Returns:
        The models of the service.

    Raises:
        ModelLoadError: the service could not load or verify it; what it served before, it serves.
        RaywardError: as `Service.ask`.
    """
    if "://" not in source and Path(source).expanduser().exists():
        source = str(Path(source).expanduser().resolve())
    listing = service.ask("publish", {"model": model, "source": source, "config": dict(config or {}), "promote": promote})
    published = str(listing["published"])
    while wait:
        versions = {version["version"]: version for version in listing["models"].get(model, {}).get("versions", ())}
        # A model without contract is called otherwise when it is loaded: then there is one more of its source.
        mine = versions.get(published) or next((v for v in reversed(versions.values()) if v["source"] == source), None)
        if mine is None:
            raise ServerError(f"version {published} of {model} was retired while it was loaded", remedy="publish it again")
        if mine["state"] == "failed":
            raise _typed(mine["error"]["type"], mine["error"]["message"], mine["error"]["remedy"])
        if mine["state"] == "ready":
            return {**listing, "published": mine["version"]}
        sleep(POLL_S)
        listing = _list_patiently(service, sleep)
    return listing


def _list_patiently(service: Service, sleep: Callable[[float], object]) -> dict[str, Any]:
    # A manager that is replaced meanwhile goes on where the table says, and answers again.
    for _ in range(PATIENT_TRIES):
        try:
            return service.ask("list", {})
        except RaywardError as exc:
            if not exc.retryable:
                raise
        sleep(POLL_S)
    return service.ask("list", {})


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a training job publishes what it exports.

    Attributes:
        model: its name there.
    """

    service: Service
    model: str

    def check(self) -> None:
        """That the service is there and would take it: asked before the work, not after it.

        Raises:
            RaywardError: as `Service.ask`.
        """
        self.service.ask("list", {})

    def publish(self, directory: Path) -> str:
        """The version that is ready there now; raises as `publish_model`."""
        return str(publish_model(self.service, self.model, str(directory))["published"])


def lines_of(listing: Mapping[str, Any]) -> Iterator[str]:
    """The models of a service, for people."""
    if listing.get("published"):
        yield f"published: {listing['published']}"
    if not listing["models"] and not listing["unreadable"]:
        yield "no models"
    for name, routes in listing["models"].items():
        yield f"{name}{' (default)' if name == listing['default_model'] else ''}"
        for version in routes["versions"]:
            parts = [f"{part} {routes['canary_share']:g}" if part == "canary" else part for part in version["roles"]]
            replicas = version["num_replicas"]
            yield f"  {version['version']}  {version['state']:<8} {', '.join(parts) or '-':<18} {replicas} replicas  {version['source']}"
            if version["error"]:
                yield f"    {version['error']['message']}\n    remedy: {version['error']['remedy']}"
            if version.get("drift"):
                yield f"    {_drift(version['drift'])}"
    for name, error in listing["unreadable"].items():
        yield f"{name} cannot be read: {error['message']}"


def _drift(drift: Mapping[str, Any]) -> str:
    agree = "" if drift["rank_agreement"] is None else f", {drift['rank_agreement']:.1%} of {drift['num_pairs']} pairs in one order"
    return (
        f"{drift['num_completions']} completions compared with {drift['current']}: |difference| mean {drift['mean_abs_difference']:.4g}, "
        f"max {drift['max_abs_difference']:.4g}{agree}"
    )


def _error_of(status: int, reply: Any, where: str) -> RaywardError:
    error = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(error, dict):
        if status == 404:
            return UnavailableError(
                f"{where}: no service of Rayward is there (404)", remedy="check --url; a service that starts answers later"
            )
        return ServerError(f"{where} answered {status}", remedy="look into the server's log")
    message, remedy = str(error.get("message", "")), str(error.get("remedy", ""))
    if status in (401, 403):
        return AccessError(message, remedy=remedy, status=status)
    if status == 409:
        return VersionError(message, remedy=remedy)
    if status in (404, 422):
        return RuleError(str(error.get("code", "")), message, remedy=remedy)
    if 400 <= status < 500:
        return RequestError(message, remedy=remedy)
    return UnavailableError(message, remedy=remedy) if status == 503 else ServerError(message, remedy=remedy)


def _typed(kind: str, problem: str, remedy: str) -> RaywardError:
    found = RaywardError.from_json(json.dumps({"types": [kind, ModelLoadError.__name__], "fields": {"problem": problem, "remedy": remedy}}))
    return found
