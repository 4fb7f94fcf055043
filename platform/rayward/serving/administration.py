"""What an administrator may ask for, as records: the bodies of `POST /admin/models/<verb>`. No Ray.

publish   load a version beside the others and verify it; it answers nothing yet, but the first version of a model
shadow    let it score what the current one scores, and compare
canary    let it answer a share of the requests
promote   let it answer everything
rollback  let the one before answer again
retire    take it down
list      what there is
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from rayward.config.load import parse_config
from rayward.config.scoring import ReplicaConfig
from rayward.errors import ConfigError, RuleError
from rayward.schema import Frozen


class Publish(Frozen):
    """A version to load beside those that run."""

    model: str
    """Name in requests and replies."""
    source: str
    """Directory, URI or hub name, as the cluster sees it."""
    config: dict[str, Any] = Field(default_factory=dict)
    """How its replicas run, where it differs from the application's settings: keys of `ReplicaConfig`."""
    promote: bool = False
    """Let it answer as soon as it is verified."""


class Shadow(Frozen):
    """A version that scores along, or none."""

    model: str
    version: str | None = None


class CanaryShare(Frozen):
    """A version that answers a share of the requests; 0 ends it."""

    model: str
    version: str
    share: float


class Promote(Frozen):
    """The version that answers from now on."""

    model: str
    version: str


class Rollback(Frozen):
    """Back to the version before."""

    model: str


class Retire(Frozen):
    """A version, or all of a model, that is taken down."""

    model: str
    version: str | None = None


class Listing(Frozen):
    """Asks for nothing but the list."""


VERBS: dict[str, type[Frozen]] = {
    "publish": Publish,
    "shadow": Shadow,
    "canary": CanaryShare,
    "promote": Promote,
    "rollback": Rollback,
    "retire": Retire,
    "list": Listing,
}


def parse_asked(verb: str, body: bytes) -> Frozen:
    """What is asked for.

    Args:
        verb: a key of `VERBS`.
        body: JSON; nothing means `{}`.

    Raises:
        RuleError: `not_found`, `invalid_json`, `missing_field`, `unknown_field`, `wrong_type`.
    """
    schema = VERBS.get(verb)
    if schema is None:
        raise RuleError("not_found", f"there is nothing to do by the name {verb[:80]!r}", remedy=f"one of {', '.join(VERBS)}")
    try:
        given = json.loads(body) if body.strip() else {}
    except ValueError as exc:
        raise RuleError("invalid_json", f"the body is not JSON ({exc})", remedy="send a JSON object") from exc
    if not isinstance(given, Mapping):
        raise RuleError("wrong_type", f"the body is a {type(given).__name__}; the rule is a JSON object", remedy="send a JSON object")
    try:
        return schema.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(first["type"], "wrong_type")
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(schema.model_fields) or "none"
        raise RuleError(code, f"{key}: {first['msg']}", remedy=f"the fields of {verb} are: {known}") from exc


def replica_config(given: Mapping[str, Any], defaults: ReplicaConfig) -> ReplicaConfig:
    """The settings of a published version's replicas.

    Raises:
        RuleError: `bad_config`, naming the keys that are wrong.
    """
    try:
        return parse_config({**defaults.model_dump(exclude_unset=True), **given}, ReplicaConfig)
    except ConfigError as exc:
        raise RuleError("bad_config", exc.problem, remedy="docs/configuration.md lists the keys of a replica") from exc
