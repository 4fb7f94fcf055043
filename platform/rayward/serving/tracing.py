"""OpenTelemetry spans of a share of the requests; W3C trace context comes in by the header `traceparent`. Off by default.

    tracing = tracing_of(config)            None where trace_share is 0; OTEL_EXPORTER_OTLP_ENDPOINT names the collector
    Front(..., span=tracing.span)           one span per request, below it encode, queue and compute by their durations

A caller that samples its own trace has its requests sampled too, whatever the share. Names, versions, counts and codes stand in spans, and
no text that somebody sent. Spans leave in the background as OTLP over HTTP; a collector that is away costs spans and no request.
"""

from __future__ import annotations

import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError
from rayward.wire.dialect import Answered

logger = logging.getLogger("ray.serve")

ENDPOINT, TRACES_ENDPOINT, HEADERS = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"
EXPORT_TIMEOUT_S = 10.0


class Tracing:
    """The spans of one process.

    Args:
        share: of the requests that belong to no trace of their caller's.
        exporter: takes the spans, in a thread of its own.
        service: name of this service in traces.
    """

    def __init__(self, share: float, exporter: SpanExporter, *, service: str = "rayward") -> None:
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service)})
        # A provider of our own: Ray has its own use for the global one.
        self._provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), resource=resource, shutdown_on_exit=True)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rayward")

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[OpenSpan]:
        """Around one request; below the span that its headers name.

        Args:
            name: path of the request.
            headers: with lower-case names.
        """
        parent = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER, attributes={"url.path": name}) as span:
            yield OpenSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class OpenSpan:
    """`front.RequestSpan` of one request."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    def scored(self, answered: Answered) -> None:
        """Who answered, how much it was, and where the time went: the stages follow each other and end now."""
        if not self._span.is_recording():
            return
        failed = sum(result.error is not None for result in answered.results)
        self._span.set_attributes(
            {
                "rayward.model": answered.model,
                "rayward.version": answered.version,
                "rayward.items": len(answered.results),
                "rayward.failed_items": failed,
                "rayward.tokens": answered.tokens,
                "rayward.tokens_computed": sum(result.tokens_computed for result in answered.results),
            }
        )
        timings = answered.timings
        stages = (("encode", timings.encode_s), ("queue", timings.queue_s), ("compute", timings.compute_s))
        context = trace.set_span_in_context(self._span)
        begin_ns = time.time_ns() - sum(round(seconds * 1e9) for _, seconds in stages)
        for name, seconds in stages:
            part = self._tracer.start_span(name, context, start_time=begin_ns)
            begin_ns += round(seconds * 1e9)
            part.end(begin_ns)

    def ended(self, status: int, *, request_id: str, dialect: str) -> None:
        """What the client gets."""
        self._span.set_attributes({"http.response.status_code": status, "rayward.request_id": request_id, "rayward.dialect": dialect})
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR)


def tracing_of(config: ScoringConfig, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """As the settings say; None: no traces.

    Raises:
        ConfigError: traces are asked for, and no collector is named.
    """
    if config.trace_share <= 0.0:
        return None
    endpoint = environment.get(TRACES_ENDPOINT) or ""
    if not endpoint and environment.get(ENDPOINT):
        endpoint = f"{environment[ENDPOINT].rstrip('/')}/v1/traces"
    if urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(
            f"trace_share is {config.trace_share:g}, and {ENDPOINT} {'is ' + repr(endpoint) if endpoint else 'is not set'}",
            remedy=f"set {ENDPOINT}=http://collector:4318 (OTLP over HTTP) where the ingress runs, or trace_share: 0",
        )
    return Tracing(config.trace_share, OtlpExporter(endpoint, _headers(environment.get(HEADERS, ""))))


def _headers(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    return {unquote(name.strip()): unquote(value.strip()) for name, _, value in pairs}


class OtlpExporter(SpanExporter):
    """Posts spans to a collector: protobuf over HTTP. The messages are those of `opentelemetry-proto`, which Ray brings.

    Args:
        endpoint: URL of the collector's traces.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._headers = {**headers, "content-type": "application/x-protobuf"}
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send some."""
        request = urllib.request.Request(self._endpoint, encoded(spans), self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=EXPORT_TIMEOUT_S):
                self._away = False
                return SpanExportResult.SUCCESS
        except (OSError, urllib.error.URLError) as exc:
            if not self._away:
                logger.warning("spans do not reach %s (%s); requests go on without", self._endpoint, exc)
            self._away = True
            return SpanExportResult.FAILURE


def encoded(spans: Sequence[ReadableSpan]) -> bytes:
    """The body of an OTLP request."""
    message = ExportTraceServiceRequest()
    if not spans:
        return bytes(message.SerializeToString())
    of_resource = message.resource_spans.add()
    of_resource.resource.attributes.extend(_attributes(spans[0].resource.attributes))
    scope = of_resource.scope_spans.add()
    scope.scope.name = "rayward"
    for span in spans:
        context = span.get_span_context()
        assert context is not None
        scope.spans.append(
            ProtoSpan(
                trace_id=context.trace_id.to_bytes(16, "big"),
                span_id=context.span_id.to_bytes(8, "big"),
                parent_span_id=span.parent.span_id.to_bytes(8, "big") if span.parent is not None else b"",
                trace_state=context.trace_state.to_header(),
                name=span.name,
                # OTLP counts kinds from 1.
                kind=ProtoSpan.SpanKind.Name(span.kind.value + 1),
                start_time_unix_nano=span.start_time or 0,
                end_time_unix_nano=span.end_time or 0,
                attributes=_attributes(span.attributes or {}),
                status=Status(code=Status.StatusCode.Name(span.status.status_code.value), message=span.status.description or ""),
            )
        )
    return bytes(message.SerializeToString())


def _attributes(values: Mapping[str, object]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_value(value)) for key, value in values.items()]


def _value(value: object) -> AnyValue:
    # bool is an int too.
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=str(value))
