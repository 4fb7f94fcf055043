"""Publishing over HTTP, and what the command line of serving reads: against an in-process service that is a list of replies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayward.cli.serving import serving_settings
from rayward.config.load import load_config
from rayward.config.scoring import ScoringConfig
from rayward.errors import AccessError, ConfigError, ContractMismatchError, RuleError, ServerError, UnavailableError, VersionError
from rayward.workflows.publish import Publication, Service, key_of, lines_of, publish_model
from rayward.workflows.serve import left_behind

Answer = Callable[[httpx.Request], httpx.Response]


def service(answer: Answer, key_file: Path | None = None) -> Service:
    return Service("http://service/", key_file, transport=httpx.MockTransport(answer))


def version(name: str, state: str, source: str = "/models/a", **facts: Any) -> dict[str, Any]:
    error = {"type": "ContractMismatchError", "message": "head: changed", "remedy": "restore it"} if state == "failed" else None
    parts = {"roles": [], "num_replicas": 1, "error": error, "drift": None}
    return {"version": name, "state": state, "source": source, **parts, **facts}


def listing(*versions: dict[str, Any], **more: Any) -> dict[str, Any]:
    routes = {"current": None, "canary_share": 0.1, "versions": list(versions)}
    return {"generation": 1, "default_model": "m", "models": {"m": routes}, "unreadable": {}, **more}


def replies(*bodies: dict[str, Any]) -> tuple[Answer, list[httpx.Request]]:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=bodies[min(len(asked), len(bodies)) - 1])

    return answer, asked


def test_a_directory_is_published_by_its_absolute_path_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    key = tmp_path / "key"
    key.write_text("secret\n")
    answer, asked = replies(
        listing(version("v", "loading"), published="v"), listing(version("v", "loading")), listing(version("v", "ready"))
    )
    waits: list[float] = []
    done = publish_model(service(answer, key), "m", "export", config={"max_replicas": 2}, sleep=waits.append)
    assert done["published"] == "v"
    assert len(waits) == 2
    assert [request.url.path for request in asked] == ["/admin/models/publish", "/admin/models/list", "/admin/models/list"]
    assert asked[0].headers["authorization"] == "Bearer secret"
    sent = {"model": "m", "source": str(tmp_path / "export"), "config": {"max_replicas": 2}, "promote": False}
    assert json.loads(asked[0].content) == sent


def test_a_version_that_is_called_otherwise_when_it_is_loaded_is_found() -> None:
    first = listing(version("loading-1", "loading", "s3://b/m"), published="loading-1")
    answer, _ = replies(first, listing(version("old", "ready", "/x"), version("unverified-1", "ready", "s3://b/m")))
    assert publish_model(service(answer), "m", "s3://b/m", sleep=lambda _: None)["published"] == "unverified-1"


def test_a_manager_that_is_replaced_meanwhile_is_waited_for() -> None:
    bodies = iter([listing(version("v", "loading"), published="v"), None, None, listing(version("v", "ready"))])

    def answer(_: httpx.Request) -> httpx.Response:
        body = next(bodies)
        return httpx.Response(503, text="away") if body is None else httpx.Response(200, json=body)

    assert publish_model(service(answer), "m", "/models/a", sleep=lambda _: None)["published"] == "v"


def test_a_version_that_fails_is_its_typed_error() -> None:
    answer, _ = replies(listing(version("v", "loading"), published="v"), listing(version("v", "failed")))
    with pytest.raises(ContractMismatchError, match="head: changed"):
        publish_model(service(answer), "m", "/models/a", sleep=lambda _: None)
    answer, _ = replies(listing(version("v", "loading"), published="v"), listing())
    with pytest.raises(ServerError, match="retired"):
        publish_model(service(answer), "m", "/models/b", sleep=lambda _: None)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": {"code": "unauthorized", "message": "no key", "remedy": "send one"}}, AccessError),
        (403, {"error": {"code": "forbidden", "message": "scope", "remedy": "another key"}}, AccessError),
        (404, {"error": {"code": "unknown_model", "message": "no model", "remedy": "x"}}, RuleError),
        (409, {"error": {"code": "version", "message": "loading", "remedy": "wait"}}, VersionError),
        (404, "Path '/admin/models/list' not found.", UnavailableError),
        (503, {"error": {"code": "unavailable", "message": "away", "remedy": "retry"}}, UnavailableError),
        (500, "oops", ServerError),
        (200, [], ServerError),
    ],
)
def test_what_a_service_refuses_is_typed(status: int, body: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        service(lambda _: httpx.Response(status, json=body)).ask("list", {})


def test_nobody_there_and_no_url() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(UnavailableError, match="does not answer"):
        Publication(service(refuse), "m").check()
    with pytest.raises(ConfigError, match="URL"):
        Service("localhost:8000")


def test_a_key_is_one_line_of_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_API_KEY", "of-environment")
    assert key_of(None) == "of-environment"
    for text in ("", "one\ntwo\n"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(ConfigError, match="one line"):
            key_of(tmp_path / "key")
    with pytest.raises(ConfigError, match="cannot be read"):
        key_of(tmp_path / "absent")


def test_the_list_names_parts_failures_and_drift() -> None:
    drift = {
        "current": "a", "num_completions": 4, "mean_difference": 0.1, "mean_abs_difference": 0.25, "max_abs_difference": 1.5,
        "num_pairs": 8, "rank_agreement": 0.75, "num_uncompared": 0,
    }  # fmt: skip
    told = listing(version("a", "ready", roles=["current", "canary"]), version("b", "failed"), version("c", "ready", drift=drift))
    text = "\n".join(lines_of({**told, "unreadable": {"n": {"message": "no network", "remedy": "x"}}}))
    assert "m (default)" in text
    for words in ("current, canary 0.1", "head: changed", "4 completions", "max 1.5", "75.0% of 8 pairs", "n cannot be read: no network"):
        assert words in text


KEYS = set(ScoringConfig.model_fields)


def test_models_and_settings_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    given = ["/a/m", f"second={tmp_path}/b", "third=hf:org/model", "s3://b/m?region=x", "f.yaml", "max_replicas=2"]
    files, overrides = serving_settings(given, KEYS)
    assert files == ["f.yaml"]
    config = load_config((), overrides, schema=ScoringConfig)
    assert (config.model, config.max_replicas) == ("/a/m", 2)
    assert config.models == {"second": f"{tmp_path}/b", "third": "hf:org/model", "m": "s3://b/m?region=x"}


def test_neither_a_key_nor_a_model() -> None:
    with pytest.raises(ConfigError, match="max_replica"):
        serving_settings(["m", "max_replica=2"], KEYS)


def test_a_cluster_whose_starter_is_gone_is_known(tmp_path: Path) -> None:
    mark = tmp_path / "cluster.json"
    assert left_behind(mark, "here:1") is None
    mark.write_text("{")
    assert left_behind(mark, "here:1") is None
    # No process has a number above the kernel's largest.
    for pid, address, expected in ((2**22 + 1, "here:1", 2**22 + 1), (2**22 + 1, "there:1", None), (os.getpid(), "here:1", None)):
        mark.write_text(json.dumps({"pid": pid, "address": address}))
        assert left_behind(mark, "here:1") == expected
