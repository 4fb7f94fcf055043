"""Checks before the scoring server starts, and the typed error when it does not. No Serve here."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

from rayward.config.scoring import ScoringConfig
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ConfigError, ModelLoadError, RaywardError, ServerError, find_in
from rayward.scoring.combining import EnsembleRule, ImplicitRule, rule_kind
from rayward.serving.auth import Keys, check_exposure
from rayward.serving.sources import is_elsewhere, look_up


def check_model(directory: Path, *, verify: bool = True) -> None:
    """Catch the usual mistakes before anything starts.

    Args:
        verify: the scorer will verify golden scores, so there must be some.

    Raises:
        ModelLoadError: the directory is not there, or holds no model.
        ContractError: its contract cannot be read, or (`UnverifiedError`) holds no golden scores.
    """
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory", remedy="point at an exported or downloaded model")
    rule = rule_kind(directory)
    if rule is EnsembleRule:
        for member in EnsembleRule.load(directory).members:
            check_model(directory / member, verify=verify)
    elif rule is ImplicitRule:
        ImplicitRule.load(directory)
    elif (directory / CONTRACT_FILE).exists():
        contract = Contract.load(directory)
        if verify:
            contract.require_golden(directory)
    elif not (directory / "config.json").is_file():
        raise ModelLoadError(f"{directory} has neither {CONTRACT_FILE} nor config.json", remedy="point at an exported or downloaded model")


def check_sources(config: ScoringConfig) -> None:
    """Catch the usual mistakes of every model that the settings name, and places that do not answer, before anything starts.

    Raises:
        ConfigError: there is nothing to serve.
        ModelLoadError, ContractError: as `check_model`; a place elsewhere does not answer, or has no model there.
    """
    sources = [*([config.model] if config.model is not None else []), *config.models.values()]
    if not sources and config.state is None:
        raise ConfigError("there is no model to serve", remedy="name one: `rayward serve MODEL`; or the `state` of a service that had some")
    for source in sources:
        look_up(source)
        if not is_elsewhere(source):
            check_model(Path(source).expanduser(), verify=config.verify_golden)


def check_listening(host: str | None, port: int | None, config: ScoringConfig) -> None:
    """What can be said of an address before anything is started.

    Raises:
        ConfigError: it is no port; or others would reach the address and no key is asked for.
    """
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; the rule is 0 (any free one) to 65535", remedy="choose another port")
    if host is not None:
        check_exposure(host, config, Keys.of(config))


def free_port(host: str, port: int) -> int:
    """The port if it can be bound, any free one for 0.

    Raises:
        ConfigError: it is taken or not allowed; or the host is no address of this machine.
    """
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({exc.strerror})", remedy="choose another port, or another host"
            ) from exc
        chosen: int = probe.getsockname()[1]
        return chosen


def startup_error(message: str) -> RaywardError:
    """The error that a constructor marked in the status message of a failed application, else the message as a whole."""
    return find_in(message) or ServerError(
        f"the application did not start: {message}", remedy="read the scorer's log under the Ray session directory"
    )
