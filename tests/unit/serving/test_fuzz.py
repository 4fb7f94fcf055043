"""Whatever is sent to any path of the OpenAPI document: no 5xx, no undocumented status, no reply that breaks its own schema."""

from __future__ import annotations

import warnings
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, checks
from tests.helpers.backends import FakeBackends, FakeManager
from tests.unit.serving.test_ingress import send

from rayward.config.scoring import ScoringConfig
from rayward.serving.auth import Keys, parse_variable
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.metrics import Recorder
from rayward.serving.mounts import all_routes
from rayward.serving.seeing import Seeing

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

schema = schemathesis.openapi.from_asgi("/openapi.json", APP).exclude(path_regex="^/(vllm|sglang|tei|infinity)/")
"""Without the second names of the dialects' paths, which are the same code."""


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
