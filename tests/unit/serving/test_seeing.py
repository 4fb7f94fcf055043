"""What is mounted beside the scores, in the real HTTP application, and the page's document."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from tests.helpers.backends import FakeBackends

from rayward.config.scoring import ScoringConfig
from rayward.serving.auth import Keys, parse_variable
from rayward.serving.calls import Stats
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.metrics import BY_NAME, PREFIX, Recorder
from rayward.serving.mounts import all_routes
from rayward.serving.page import SCRIPTS, document
from rayward.serving.reporting import Board
from rayward.serving.routes import RouteTable
from rayward.serving.seeing import Seeing
from rayward.serving.status import ServiceStatus, build_status

KEY = "sk-0123456789abcdef"


class Manager:
    def __init__(self) -> None:
        self.board = Board(lambda: 0.0)
        self.away = False

    async def report(self, stats: Stats) -> None:
        self._look()
        self.board.report(stats)

    async def stats(self) -> Sequence[Stats]:
        self._look()
        return self.board.stats()

    async def status(self) -> ServiceStatus:
        self._look()
        return build_status(RouteTable(), self.board)

    def _look(self) -> None:
        if self.away:
            raise ConnectionError("no manager")


class Mounted:
    """The application with `Seeing` in it, as an ingress has it; `ask` is one process's client."""

    def __init__(self, *, keys: str = "", page: bool = True, source: str = "ingress-1") -> None:
        self.manager = Manager()
        recorder = Recorder(source, "ingress")
        recorder.add("poisoned_items_total", 2)
        self.seeing = Seeing(self.manager, recorder.stats, page=page)
        front = Front(
            FakeBackends(), routes=all_routes(), endpoints=self.seeing.endpoints(), background=[self.seeing.report], recorder=recorder
        )
        self.app: Starlette = build_http(front, ScoringConfig(model="x"), Keys(parse_variable(keys)))

    def share(self, other: Mounted) -> None:
        """Have the other one's manager."""
        self.manager.board = other.manager.board

    async def ask(self, *paths: str, headers: dict[str, str] | None = None) -> list[httpx.Response]:
        transport = httpx.ASGITransport(self.app)
        async with self.app.router.lifespan_context(self.app), httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await client.post("/v1/score", json={"items": [{"prompt": "a", "completions": ["b"]}]}, headers=headers)
            return [await client.get(path, headers=headers) for path in paths]


@pytest.mark.anyio
async def test_metrics_are_those_of_all_processes() -> None:
    mounted = Mounted()
    replica = Recorder("r1", "replica", model="rm", version="v")
    replica.add("completions_total", 5)
    mounted.manager.board.report(replica.stats())
    (reply,) = await mounted.ask("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = {
        (sample.name.removeprefix(PREFIX), sample.labels["source"]): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    assert values["completions_total", "r1"] == 5
    assert values["poisoned_items_total", "ingress-1"] == 2
    assert values["requests_total", "ingress-1"] == 1
    assert values["manager_up", "ingress-1"] == 1


@pytest.mark.anyio
async def test_no_counter_falls_when_two_ingresses_are_scraped_in_turn() -> None:
    first, second = Mounted(source="ingress-1"), Mounted(source="ingress-2")
    second.share(first)
    counted = []
    for ingress in (first, second, first, second):
        (reply,) = await ingress.ask("/metrics")
        counted += [
            sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
            if sample.name == f"{PREFIX}requests_total" and sample.labels["source"] == "ingress-1" and sample.labels["dialect"] == "rayward"
        ]
    assert counted == [1, 1, 2, 2]


@pytest.mark.anyio
async def test_what_the_application_counts_is_in_the_list_of_metrics() -> None:
    (reply,) = await Mounted().ask("/metrics")
    named = {
        f"{family.name}{'_total' if family.type == 'counter' else ''}".removeprefix(PREFIX)
        for family in text_string_to_metric_families(reply.text)
    }
    assert len(named) > 5
    assert named <= set(BY_NAME)


@pytest.mark.anyio
async def test_without_the_manager_a_scrape_has_this_process_and_says_so() -> None:
    mounted = Mounted()
    mounted.manager.away = True
    metrics, status, page = await mounted.ask("/metrics", "/v1/status", "/")
    assert f'{PREFIX}manager_up{{role="ingress",source="ingress-1"}} 0' in metrics.text.splitlines()
    assert f"{PREFIX}requests_total" in metrics.text
    assert status.status_code == 503
    assert status.json()["error"]["code"] == "unavailable"
    assert page.status_code == 200


@pytest.mark.anyio
async def test_status_is_its_schema() -> None:
    status, openapi = await Mounted().ask("/v1/status", "/openapi.json")
    assert ServiceStatus.model_validate_json(status.content).models == []
    assert {"/v1/status", "/metrics", "/"} <= set(openapi.json()["paths"])


@pytest.mark.anyio
async def test_numbers_need_a_key_where_there_are_keys_and_the_page_does_not() -> None:
    mounted = Mounted(keys=f"ppo:{KEY}")
    paths = ("/metrics", "/v1/status", "/")
    assert [reply.status_code for reply in await mounted.ask(*paths)] == [401, 401, 200]
    assert [reply.status_code for reply in await mounted.ask(*paths, headers={"authorization": f"Bearer {KEY}"})] == [200, 200, 200]


@pytest.mark.anyio
async def test_the_page_can_be_left_out() -> None:
    (page,) = await Mounted(page=False).ask("/")
    assert page.status_code == 404


def test_the_document_allows_its_own_script_and_style_alone() -> None:
    content, headers = document()
    text = content.decode("utf-8")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for name, directive in (("script", "script-src"), ("style", "style-src")):
        (inner,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert policy[directive] == "'sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode() + "'"
    assert "unsafe" not in headers["content-security-policy"]


def test_the_document_asks_for_nothing_outside() -> None:
    text = document()[0].decode("utf-8")
    assert re.findall(r"(?:src|href)=\"(?!#|data:|openapi\.json)[^\"]*\"", text) == []
    assert "@import" not in text
    # Besides names of XML spaces, which nobody fetches.
    assert set(re.findall(r"https?://[\w./-]+", text)) == {"http://www.w3.org/2000/svg"}
    assert " on" not in json.dumps(re.findall(r"<[a-z]+ [^>]*\son\w+=", text)), "handlers in markup would not run"


def test_no_script_writes_markup() -> None:
    text = document()[0].decode("utf-8")
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "eval(",
        "new Function",
        'setAttribute("style"',
    ):
        assert way not in text, way
    assert len(SCRIPTS) == len(set(SCRIPTS))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
