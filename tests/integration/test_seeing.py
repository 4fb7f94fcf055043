"""A real service as it is seen: every count of every process under a name of the list, the status, and the page's trace of a real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.helpers.models import make_export

from rayward.config.scoring import ScoringConfig
from rayward.serving.metrics import BY_NAME, PREFIX
from rayward.serving.status import ServiceStatus

# Ray Serve 2.60 is imported inside fixtures and tests: its own models warn about deprecated pydantic settings.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]


@pytest.fixture(scope="module")
def http(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    from ray import serve

    from rayward.serving import app

    export = make_export(tmp_path_factory.mktemp("models") / "tiny")
    config = ScoringConfig(model=str(export), device="cpu", tokens_per_batch=512, cpus_per_replica=0.25)
    url = app.serve_model(config, port=0, name=f"rayward-seeing-{os.getpid()}")
    with httpx.Client(base_url=url, timeout=60.0) as client:
        yield client
    serve.shutdown()


def _samples(http: httpx.Client) -> dict[tuple[str, str], float]:
    families = list(text_string_to_metric_families(http.get("/metrics").raise_for_status().text))
    unknown = {family.name for family in families if not family.documentation}
    assert unknown == set(), "not in the list of metrics"
    return {(sample.name.removeprefix(PREFIX), sample.labels["role"]): sample.value for family in families for sample in family.samples}


def _poll_until(http: httpx.Client, name: str, role: str, value: float) -> dict[tuple[str, str], float]:
    # Reports come once a second; each look is a request, and the timeout of the test is the end of it.
    while True:
        samples = _samples(http)
        if samples.get((name, role), 0.0) >= value:
            return samples


def test_counts_of_all_processes_reach_a_scrape(http: httpx.Client) -> None:
    items = [{"prompt": f"Question {number}?", "completions": ["Yes.", "No, because of this."]} for number in range(20)]
    reply = http.post("/v1/score", json={"items": items}).raise_for_status().json()
    assert http.post("/v1/score", json={"items": []}).status_code == 422
    samples = _poll_until(http, "completions_total", "replica", 40)
    assert samples["completions_total", "replica"] == 40
    assert samples["tokens_total", "replica"] == reply["usage"]["tokens"]
    assert samples["tokens_computed_total", "replica"] == reply["usage"]["tokens_computed"]
    assert samples["reward_count", "replica"] == 40
    assert samples["manager_up", "ingress"] == 1
    assert samples["replicas", "manager"] == 1
    replicas = {name for name, role in samples if role == "replica"}
    assert {"queued_tokens", "tokens_per_second", "healthy", "stage_seconds_count", "batch_fill_ratio_sum"} <= replicas
    assert {name for name in replicas if "replica" not in BY_NAME.get(name, BY_NAME["reward"]).role} == set()


def test_the_status_is_that_of_the_service(http: httpx.Client) -> None:
    _poll_until(http, "replicas", "manager", 1)
    status = ServiceStatus.model_validate_json(http.get("/v1/status").raise_for_status().content)
    (model,) = status.models
    (version,) = model.versions
    assert (model.model, model.is_default, version.state, version.parts) == ("tiny", True, "ready", {"current": 1.0})
    assert version.version == http.get("/v1/models").json()["data"][0]["version"]
    (replica,) = version.replicas
    assert replica.queued_tokens == 0
    assert replica.up_s > 0
    assert status.ingresses == 1
    assert [stage.stage for stage in status.latencies] == ["encode", "queue", "compute", "total"]


def test_request_ids_go_in_and_come_out(http: httpx.Client) -> None:
    body = {"items": [{"prompt": "a", "completions": ["b"]}]}
    given = http.post("/v1/score", json=body, headers={"x-request-id": "rollout-17"})
    assert given.headers["x-request-id"] == "rollout-17"
    assert given.json()["id"] == "rollout-17"
    assert http.post("/v1/score", json=body).headers["x-request-id"]


def test_the_page_shows_a_real_trace(http: httpx.Client, chromium: str, tmp_path: Path) -> None:
    from tests.helpers.chromium import Chromium

    prompt, completion = "What is two plus two?", "It is four, because two and two are four."
    with Chromium(chromium, tmp_path / "profile") as page:
        page.size(1400, 1000)
        page.open(str(http.base_url).rstrip("/") + "/")
        page.wait_for("document.querySelector('#live .version')")
        page.evaluate(f"setTimeout(() => 0); document.getElementById('prompt').value = {prompt!r}")
        page.evaluate(f"document.querySelector('#completions textarea').value = {completion!r}")
        page.press("Enter", ctrl=True)
        page.wait_for("document.querySelector('.heat')")
        shown = float(page.evaluate("document.querySelector('.reward').textContent").replace("\u2212", "-"))
        traced = page.evaluate("document.querySelector('.heat').textContent")
        assert page.problems() == []
    (reward,) = http.post("/v1/score", json={"items": [{"prompt": prompt, "completions": [completion]}]}).json()["results"][0]["rewards"]
    assert shown == pytest.approx(reward, rel=1e-2, abs=1e-4)
    assert completion in traced
