"""Whatever is sent to any path of the OpenAPI document: no 5xx, no undocumented status, no reply that breaks its own schema."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, checks
from tests.helpers.backends import FakeBackends, FakeManager
from tests.unit.serving.test_ingress import call, send

from rayward.config.scoring import ScoringConfig
from rayward.serving.auth import Keys, parse_variable
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.metrics import Recorder
from rayward.serving.mounts import all_routes
from rayward.serving.seeing import Seeing
from rayward.wire.dialect import Route

# Ray Serve 2.60's own models warn about deprecated pydantic settings when they are imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from rayward.serving.assembly import admin_endpoints

KEY = "fuzz-0123456789abcdef"
MANAGER = FakeManager()
RECORDER = Recorder("fuzz", "ingress")
APP = build_http(
    Front(
        FakeBackends(),
        routes=all_routes(),
        endpoints=(*admin_endpoints(MANAGER), *Seeing(MANAGER, RECORDER.stats).endpoints()),
        recorder=RECORDER,
    ),
    ScoringConfig(max_items_per_request=64),
    Keys(parse_variable(f"fuzz:{KEY}:score+admin")),
)
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
"""Rules that JSON schema cannot say (a prompt ends with a user's turn) refuse requests that the schema allows: that is no failure."""

SECOND_NAMES = "^/(vllm|sglang|tei|infinity)/"
"""Of the dialects' paths; the code behind them is the same."""

schema = schemathesis.openapi.from_asgi("/openapi.json", APP).exclude(path_regex=SECOND_NAMES)


@schema.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_of_the_document_breaks_the_server(case: Case[Any]) -> None:
    case.call_and_validate(headers={"authorization": f"Bearer {KEY}"}, checks=CHECKS)


def test_every_path_that_needs_a_key_says_so_and_asks_for_it() -> None:
    num_asked = 0
    for path, operations in schema.raw_schema["paths"].items():
        for method, operation in operations.items():
            response = send(APP, method.upper(), path.replace("{", "").replace("}", ""))
            assert (response.status_code == 401) == bool(operation["security"]), f"{method} {path}: {response.status_code}"
            num_asked += bool(operation["security"])
    assert num_asked > 20


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


WEIRD = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"{}",
    b"1",
    b'"text"',
    b"{",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"1" * 5000 + b"}",
    _nested(900),
    _nested(100_000),
    b'{"a":' * 900 + b"1" + b"}" * 900,
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "\x00",
    "\ud800",
    "x" * 300_000,
    [],
    [[]],
    [None],
    [1],
    [[1, 2]],
    {},
    {"a": {}},
    [{}],
    [[["a"]]],
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    ["a"] * 2000,
]
"""Put in place of every field of a body, one at a time and all at once."""


ROUTES = [route for route in all_routes() if "POST" in route.methods and not re.match(SECOND_NAMES, route.path)]


def _fields_of(route: Route) -> list[str]:
    shapes = route.request.get("anyOf", [route.request])
    return sorted({name for shape in shapes for name in shape.get("properties", {})})


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_no_value_of_any_field_breaks_the_server(route: Route) -> None:
    fields = _fields_of(route)
    bodies = [*WEIRD, *(json.dumps(dict.fromkeys(fields, value)).encode() for value in VALUES)]
    for index, name in enumerate(fields):
        others = {other: "a" for other in fields if other != name}
        bodies += [json.dumps({**others, name: value}).encode() for value in VALUES[index % 3 :: 3]]
    statuses: Counter[int] = Counter()

    async def work(client: httpx.AsyncClient) -> None:
        for body in bodies:
            response = await client.post(route.path, content=body, headers={"authorization": f"Bearer {KEY}"})
            statuses[response.status_code] += 1
            assert response.status_code < 500, f"{body[:200]!r}: {response.text[:500]}"
            response.json()

    call(APP, work)
    assert sum(statuses.values()) == len(bodies)
