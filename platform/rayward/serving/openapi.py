"""The OpenAPI document of what is mounted; made of the same records that are mounted, so that it cannot name another path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayward.serving.front import Endpoint
from rayward.wire.dialect import JSON, Route
from rayward.wire.native import ErrorReply

VERSION = "1"
"""Of the native schema: /v1."""

_KEY: list[dict[str, list[str]]] = [{"bearer": []}]

REFUSALS = {
    400: "The body cannot be read",
    401: "No key, or one that is not known",
    403: "The key may not do this",
    404: "No such model",
    405: "Not with this method",
    408: "The body did not come in time",
    409: "The pinned version is not served; nothing was scored",
    413: "Too large: split it",
    415: "Not of a type that this path reads",
    422: "A rule is broken",
    429: "Full; retry after the given delay",
    500: "The server failed",
    502: "The scorer failed; retry",
    503: "Nobody can score now; retry",
    504: "The deadline passed",
}


def document(routes: Sequence[Route], endpoints: Sequence[Endpoint], *, keys_required: bool) -> dict[str, JSON]:
    """The document, as JSON values.

    Args:
        keys_required: whether who scores needs a key; administrators always do.
    """
    key = _KEY if keys_required else []
    schemas: dict[str, JSON] = {}
    paths: dict[str, dict[str, JSON]] = {}
    native = _lifted(ErrorReply.model_json_schema(mode="serialization"), "error", schemas)
    for route in routes:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = _scoring(route, method, key, native, schemas)
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _other(endpoint, key, native, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rayward scoring", "version": VERSION, "description": "Rewards of completions, by reward models."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _scoring(route: Route, method: str, key: JSON, native: JSON, schemas: dict[str, JSON]) -> dict[str, JSON]:
    name = _name_of(method, route.path)
    request = _lifted(route.request, f"{name}_request", schemas)
    reply = _lifted(route.reply, f"{name}_reply", schemas)
    refusals = {route.statuses.get(status, status): text for status, text in REFUSALS.items()}
    if route.pick is not None:
        # The body decides whose statuses these are.
        refusals |= {**REFUSALS, 424: REFUSALS[502]}
    # Another system's clients know its own error bodies; their form is in the documentation of that dialect.
    error = native if route.dialect == "rayward" else {"type": "object"}
    found: dict[str, JSON] = {
        "operationId": name,
        "summary": route.summary,
        "tags": [route.dialect],
        "security": key if route.asks == "scores" else [],
        "responses": {"200": _content("Scored", reply)} | _refusals(refusals, error),
    }
    if method != "GET":
        found["requestBody"] = {"required": True, "content": {media_type: {"schema": request} for media_type in route.media_types}}
    return found


def _other(endpoint: Endpoint, key: JSON, native: JSON, schemas: dict[str, JSON]) -> dict[str, JSON]:
    name = _name_of(endpoint.method, endpoint.path)
    reply = {} if endpoint.reply is None else _lifted(endpoint.reply, f"{name}_reply", schemas)
    found: dict[str, JSON] = {
        "operationId": name,
        "summary": endpoint.summary,
        "tags": ["admin" if endpoint.scope == "admin" else "service"],
        "security": [] if endpoint.scope is None else _KEY if endpoint.scope == "admin" else key,
        "responses": {"200": _content("Done", reply, endpoint.media_type)} | _refusals(REFUSALS, native),
    }
    if endpoint.request is not None:
        schema = _lifted(endpoint.request, f"{name}_request", schemas)
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters = re.findall(r"\{(\w+)(?::\w+)?\}", endpoint.path)
    if parameters:
        found["parameters"] = [{"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in parameters]
    return found


def _refusals(texts: Mapping[int, str], error: JSON) -> dict[str, JSON]:
    found = {}
    for status, text in sorted(texts.items()):
        found[str(status)] = _content(text, error)
        if status in (429, 503):
            found[str(status)]["headers"] = {"retry-after": {"description": "Seconds", "schema": {"type": "integer"}}}
    return found


def _content(text: str, schema: JSON, media_type: str = "application/json") -> dict[str, Any]:
    return {"description": text, "content": {media_type: {"schema": schema}}}


def _name_of(method: str, path: str) -> str:
    return f"{method.lower()}_{re.sub(r'[^A-Za-z0-9]+', '_', path).strip('_') or 'root'}"


def _lifted(schema: Mapping[str, JSON], name: str, schemas: dict[str, JSON]) -> JSON:
    # The definitions inside a schema move to the components of the document, under the name of who needs them.
    whole = _moved(dict(schema), name)
    for inner, definition in whole.pop("$defs", {}).items():
        schemas[f"{name}_{inner}"] = definition
    schemas[name] = whole
    return {"$ref": f"#/components/schemas/{name}"}


def _moved(value: JSON, name: str) -> JSON:
    if isinstance(value, Mapping):
        moved = {key: _moved(each, name) for key, each in value.items()}
        target = moved.get("$ref")
        if isinstance(target, str) and target.startswith("#/$defs/"):
            moved["$ref"] = f"#/components/schemas/{name}_{target.removeprefix('#/$defs/')}"
        return moved
    if isinstance(value, list | tuple):
        return [_moved(each, name) for each in value]
    return value
