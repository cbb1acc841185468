"""One trace id from a request to its denoising steps, W3C Trace Context on the wire, spans as lines of the log.

    trace = from_traceparent(request.headers.get("traceparent"))     the caller's trace, or a new one
    with entered(trace), span("decode"): ...                         its lines carry trace_id, and say how long it took

Searching the logs for a trace id gives what happened to a request, in which process and how long each part took.
Where OTEL_EXPORTER_OTLP_ENDPOINT is set, `export_spans` sends the same spans to a collector as well.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from sr_platform.errors import ConfigError
from sr_platform.observability import log_fields

logger = logging.getLogger(__name__)

# A version other than 00 may carry more after the flags.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True)
class Trace:
    """A place in a trace: its id (32 hex digits) and the span (16) that what comes next is part of; "" at its root."""

    trace_id: str
    span_id: str = ""

    @property
    def traceparent(self) -> str:
        """As a header. At the root of a trace, where the format wants a span all the same, a made-up one."""
        return f"00-{self.trace_id}-{self.span_id or secrets.token_hex(8)}-01"


@dataclass(frozen=True)
class Span:
    """Something that took from `started_at` (seconds since the epoch) for `seconds`."""

    name: str
    trace: Trace
    parent_id: str
    started_at: float
    seconds: float
    error: str
    fields: dict[str, Any]


class SpanExporter(Protocol):
    """Where spans go beside the log."""

    def export(self, span: Span) -> None: ...


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)
_exporter: SpanExporter | None = None


def from_traceparent(header: str | None) -> Trace:
    """The trace that a caller is part of; a new one where the header is missing or no traceparent."""
    found = _TRACEPARENT.fullmatch((header or "").strip())
    return Trace(found[1], found[2]) if found else Trace(secrets.token_hex(16))


def current() -> Trace | None:
    """The trace that was entered here."""
    return _current.get()


@contextmanager
def entered(trace: Trace, **fields: Any) -> Iterator[None]:
    """Makes `trace` the current one of the block: every line it logs carries the trace id, and `fields`."""
    token = _current.set(trace)
    try:
        with log_fields(trace_id=trace.trace_id, **fields):
            yield
    finally:
        _current.reset(token)


@contextmanager
def span(name: str, *, level: int = logging.INFO, **fields: Any) -> Iterator[Trace]:
    """Logs at its end how long the block took, as a part of the current trace, or of a new one.

    What the block raises passes through; the line names its type.
    """
    around = _current.get() or Trace(secrets.token_hex(16))
    inside = Trace(around.trace_id, secrets.token_hex(8))
    started_at, start_s, error = time.time(), time.perf_counter(), ""
    try:
        with entered(inside):
            yield inside
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        _tell(Span(name, inside, around.span_id, started_at, time.perf_counter() - start_s, error, fields), level)


def record_span(trace: Trace, name: str, seconds: float, *, level: int = logging.DEBUG, **fields: Any) -> None:
    """A span of `trace` that ends now and took `seconds`; for threads that work on several pictures at once.

    Costs next to nothing where the log leaves `level` out and nobody collects spans.
    """
    if _exporter is None and not logger.isEnabledFor(level):
        return
    inside = Trace(trace.trace_id, secrets.token_hex(8))
    _tell(Span(name, inside, trace.span_id, time.time() - seconds, seconds, "", fields), level)


def key_hash(name: str) -> str:
    """12 hex digits that stand for a key's name in logs."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def export_spans(service: str) -> bool:
    """Sends spans to the collector of OTEL_EXPORTER_OTLP_ENDPOINT from now on; False where none is set.

    Raises:
        ConfigError: it is set, and the package that speaks OTLP is not installed.
    """
    global _exporter
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return False
    try:
        from serve.span_export import OtlpExporter
    except ImportError as error:
        raise ConfigError(
            f"tracing: {_ENDPOINTS[1]} is set, and spans cannot be sent ({error}); "
            "install opentelemetry-exporter-otlp-proto-http, or unset it"
        ) from error
    _exporter = OtlpExporter(service)
    return True


def _tell(span: Span, level: int) -> None:
    if _exporter is not None:
        _exporter.export(span)
    if not logger.isEnabledFor(level):
        return
    extra = {**span.fields, "trace_id": span.trace.trace_id, "span": span.name, "span_id": span.trace.span_id}
    extra |= {"parent_id": span.parent_id, "seconds": round(span.seconds, 6)}
    if span.error:
        extra["error"] = span.error
    logger.log(
        level, "span %s: %.3f s%s", span.name, span.seconds, f", {span.error}" if span.error else "", extra=extra
    )
