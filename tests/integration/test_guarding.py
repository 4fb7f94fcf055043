"""The guarded endpoint behind Serve's own proxy: keys and their revocation, what bytes on the wire do, health, error bodies."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.models import make_export
from tests.helpers.processes import until

from rayward.config.scoring import ScoringConfig

# Ray Serve 2.60 is imported inside fixtures and tests: its own models warn about deprecated pydantic settings.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

SCORE, ADMIN, LEAVING = (f"{name}-0123456789abcdef" for name in ("score", "admin", "leaving"))
GOOD = {"items": [{"prompt": "Hi", "completions": ["Hello", "No!"]}]}
PATIENCE_S = 60.0


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def write(path: Path, *entries: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    beside.replace(path)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    names = {"ppo": SCORE, "leaving": LEAVING}
    write(path, *({"name": name, "key": key} for name, key in names.items()), {"name": "ops", "key": ADMIN, "scopes": ["admin"]})
    return path


@pytest.fixture(scope="module")
def url(ray_local: None, keys_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from rayward.serving.app import serve_model

    export = make_export(tmp_path_factory.mktemp("models") / "tiny")
    config = ScoringConfig(model=str(export), device="cpu", cpus_per_replica=0.25, keys_file=str(keys_file), body_timeout_s=2.0)
    yield serve_model(config, port=0, name=f"guarded-{os.getpid()}")
    serve.shutdown()


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_a_key_is_needed_and_its_scope_is_kept(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60.0) as http:
        assert (http.post("/v1/score", json=GOOD).status_code, http.get("/metrics").status_code) == (401, 401)
        reply = http.post("/v1/score", json=GOOD, headers={**bearer(SCORE), "x-request-id": "step-1"})
        assert (reply.status_code, reply.json()["id"], reply.headers.get_list("x-request-id")) == (200, "step-1", ["step-1"])
        assert http.post("/v1/score", json=GOOD, headers=bearer(ADMIN)).status_code == 403
        assert http.post("/admin/models/list", headers=bearer(SCORE)).status_code == 403
        assert http.post("/admin/models/list", headers=bearer(ADMIN)).status_code == 200


def test_a_key_is_revoked_on_an_open_connection(url: str, keys_file: Path) -> None:
    with httpx.Client(base_url=url, timeout=60.0) as http:
        assert http.post("/v1/score", json=GOOD, headers=bearer(LEAVING)).status_code == 200
        write(keys_file, {"name": "ppo", "key": SCORE}, {"name": "ops", "key": ADMIN, "scopes": ["admin"]})
        until(lambda: http.post("/v1/score", json=GOOD, headers=bearer(LEAVING)).status_code != 200)
        assert http.post("/v1/score", json=GOOD, headers=bearer(SCORE)).status_code == 200


def test_health_is_open_and_answers_head(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60.0) as http:
        for path in ("/livez", "/readyz", "/health"):
            assert (http.get(path).status_code, http.head(path).status_code) == (200, 200)
        assert (http.get("/nothing").status_code, code_of(http.get("/nothing"))) == (404, "not_found")


def test_bodies_that_are_compressed_too_large_or_of_another_kind(url: str) -> None:
    body = json.dumps(GOOD).encode()
    with httpx.Client(base_url=url, timeout=60.0, headers=bearer(SCORE)) as http:
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        assert http.post("/v1/score", content=gzip.compress(body), headers=packed).status_code == 200
        bomb = http.post("/v1/score", content=gzip.compress(b" " * 100_000_000), headers=packed)
        assert (bomb.status_code, code_of(bomb)) == (413, "body_too_large")
        assert code_of(http.post("/v1/score", data={"a": "b"})) == "unsupported_media_type"
        assert code_of(http.post("/v1/score", json={"items": [GOOD["items"][0]] * 100_000})) == "too_many_items"
        assert code_of(http.post("/v1/score", json={"items": [{"prompt": "x" * 10_000_000, "completions": ["a"]}]})) == "text_too_long"
        assert http.post("/v1/score", json=GOOD).status_code == 200


def test_expect_100_continue_and_a_body_that_drips(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(GOOD).encode()
    head = f"POST /v1/score HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nauthorization: Bearer {SCORE}\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as wire:
        wire.sendall(head + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body))
        assert wire.recv(4096).startswith(b"HTTP/1.1 100")
        wire.sendall(body)
        assert wire.recv(65536).startswith(b"HTTP/1.1 200")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as wire:
        wire.sendall(head + b"content-length: 1000\r\n\r\n{")
        assert wire.recv(65536).startswith(b"HTTP/1.1 408")
