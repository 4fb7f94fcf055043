"""Spans of requests as a collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.helpers.backends import MODEL, VERSION, FakeBackends

from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError, ServerError
from rayward.serving.auth import Keys
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.mounts import all_routes
from rayward.serving.tracing import tracing_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET_TEXT = "what my patient told me"


class Collector(ThreadingHTTPServer):
    """Keeps what is posted to /v1/traces."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, str | None, ExportTraceServiceRequest]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for _, _, message in self.received
            for of_resource in message.resource_spans
            for scope in of_resource.scope_spans
            for span in scope.spans
        ]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, self.headers["x-token"], ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def _ask(collector_url: str, *, share: float, headers: dict[str, str] | None = None, backends: FakeBackends | None = None) -> int:
    config = ScoringConfig(model="x", trace_share=share)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector_url, "OTEL_EXPORTER_OTLP_HEADERS": "x-token=a%20b"}
    tracing = tracing_of(config, environment)
    assert tracing is not None
    app = build_http(Front(backends or FakeBackends(), all_routes(), span=tracing.span), config, Keys())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        body = {"items": [{"prompt": SECRET_TEXT, "completions": ["fine"]}, {"prompt": "b", "completions": ["error:too_long"]}]}
        reply = await client.post("/v1/score", json=body, headers={"x-request-id": "req-1", **(headers or {})})
    tracing.close()
    return reply.status_code


def _attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}


@pytest.mark.anyio
async def test_a_request_of_a_traced_caller_is_a_span_below_its_own(collector: Collector) -> None:
    # A share of nearly nothing: the caller's word decides.
    assert await _ask(collector.url, share=1e-9, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) == 200
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"/v1/score", "encode", "queue", "compute"}
    whole = spans["/v1/score"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex(), whole.kind) == (TRACE, PARENT, Span.SPAN_KIND_SERVER)
    assert _attributes(whole) == {
        "url.path": "/v1/score",
        "rayward.model": MODEL,
        "rayward.version": VERSION,
        "rayward.items": 2,
        "rayward.failed_items": 1,
        "rayward.tokens": 14,
        "rayward.tokens_computed": 14,
        "rayward.dialect": "rayward",
        "rayward.request_id": "req-1",
        "http.response.status_code": 200,
    }
    stages = [spans[name] for name in ("encode", "queue", "compute")]
    assert all(span.parent_span_id == whole.span_id and span.trace_id == whole.trace_id for span in stages)
    assert [one.end_time_unix_nano for one in stages[:-1]] == [other.start_time_unix_nano for other in stages[1:]]
    assert whole.start_time_unix_nano <= whole.end_time_unix_nano
    (path, token, message), *_ = collector.received
    assert (path, token) == ("/v1/traces", "a b")
    assert SECRET_TEXT not in str(message)


@pytest.mark.anyio
@pytest.mark.parametrize(("share", "num"), [(1.0, 4), (1e-12, 0)])
async def test_a_share_of_the_others_is_traced(collector: Collector, share: float, num: int) -> None:
    assert await _ask(collector.url, share=share) == 200
    assert len(collector.spans) == num


@pytest.mark.anyio
async def test_a_failed_request_is_a_failed_span(collector: Collector) -> None:
    failing = FakeBackends(failure=ServerError("the scorer failed", remedy="retry"))
    assert await _ask(collector.url, share=1.0, backends=failing) == 502
    (span,) = collector.spans
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert _attributes(span)["http.response.status_code"] == 502


@pytest.mark.anyio
async def test_a_collector_that_is_away_costs_no_request(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    assert await _ask("http://127.0.0.1:1", share=1.0) == 200
    assert [record.levelname for record in caplog.records if "spans do not reach" in record.message] == ["WARNING"]


def test_nothing_is_traced_unless_it_is_asked_for() -> None:
    assert tracing_of(ScoringConfig(model="x"), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}) is None


@pytest.mark.parametrize("environment", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}])
def test_traces_without_a_collector_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT") as refused:
        tracing_of(ScoringConfig(model="x", trace_share=0.5), environment)
    assert "4318" in refused.value.remedy


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
