"""Spans to an OpenTelemetry collector, over HTTP, in the background; imported only where a collector is set."""

from __future__ import annotations

import atexit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from serve.tracing import Span

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OtlpExporter:
    """Batches of spans to where the OTEL_EXPORTER_OTLP_* variables say; what cannot be sent is dropped and logged."""

    def __init__(self, service: str) -> None:
        # create() lets OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
        self._resource = Resource.create().merge(Resource({SERVICE_NAME: service}))
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        atexit.register(self._processor.shutdown)

    def export(self, span: Span) -> None:
        """Takes the span; returns at once."""
        started_ns = int(span.started_at * 1e9)
        trace_id = int(span.trace.trace_id, 16)
        parent = SpanContext(trace_id, int(span.parent_id, 16), True, _SAMPLED) if span.parent_id else None
        readable = ReadableSpan(
            name=span.name,
            context=SpanContext(trace_id, int(span.trace.span_id, 16), False, _SAMPLED),
            parent=parent,
            resource=self._resource,
            attributes={name: value for name, value in span.fields.items() if value is not None},
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=started_ns,
            end_time=started_ns + int(span.seconds * 1e9),
        )
        self._processor.on_end(readable)

    def flush(self) -> None:
        """Sends what waits."""
        self._processor.force_flush()
