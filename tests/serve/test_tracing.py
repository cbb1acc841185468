from __future__ import annotations

import asyncio
import gzip
import http.server
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serve import tracing
from serve.tracing import Trace, current, entered, from_traceparent, key_hash, record_span, span

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans_of(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if hasattr(record, "span")]


@pytest.mark.parametrize("header", [HEADER, f" {HEADER} ", HEADER.replace("00-0a", "cc-0a") + "-what-comes-later"])
def test_the_trace_of_a_caller_is_continued(header: str) -> None:
    trace = from_traceparent(header)
    assert trace == Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


@pytest.mark.parametrize("header", [
    None, "", "nonsense", HEADER[:-1], HEADER.upper(), "ff" + HEADER[2:], f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01", HEADER + "\nforged: line", "x" * 10_000,
])  # fmt: skip
def test_what_is_no_traceparent_begins_a_new_trace(header: str | None) -> None:
    trace = from_traceparent(header)
    assert re.fullmatch("[0-9a-f]{32}", trace.trace_id)
    assert trace.span_id == ""
    assert trace != from_traceparent(header)


def test_a_trace_goes_on_in_another_process_by_its_traceparent() -> None:
    assert from_traceparent(Trace("a" * 32, "b" * 16).traceparent) == Trace("a" * 32, "b" * 16)
    assert from_traceparent(Trace("a" * 32).traceparent).trace_id == "a" * 32


def test_spans_nest_and_say_how_long_they_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve")
    with entered(Trace("a" * 32, "b" * 16)):
        with span("restore", steps=2), span("encode"):
            assert current() != Trace("a" * 32, "b" * 16)
        assert current() == Trace("a" * 32, "b" * 16)
    assert current() is None
    encode, restore = spans_of(caplog)
    assert (encode.span, restore.span) == ("encode", "restore")
    assert encode.trace_id == restore.trace_id == "a" * 32
    assert (encode.parent_id, restore.parent_id) == (restore.span_id, "b" * 16)
    assert 0 <= encode.seconds <= restore.seconds < 5
    assert restore.steps == 2


def test_a_span_that_fails_names_the_error_and_passes_it_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve")
    with pytest.raises(ValueError, match="no"), span("decode"):
        raise ValueError("no")
    assert spans_of(caplog)[0].error == "ValueError"
    assert current() is None


def test_requests_that_run_at_once_keep_their_traces() -> None:
    async def request(trace_id: str) -> str:
        with entered(Trace(trace_id)):
            await asyncio.sleep(0.01)
            return await asyncio.to_thread(lambda: (current() or Trace("")).trace_id)

    async def both() -> list[str]:
        return list(await asyncio.gather(request("a" * 32), request("b" * 32)))

    assert asyncio.run(both()) == ["a" * 32, "b" * 32]


def test_steps_are_told_at_debug_and_cost_nothing_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace("a" * 32, "b" * 16)
    caplog.set_level(logging.INFO, "serve")
    record_span(trace, "step", 0.25, step=1)
    assert spans_of(caplog) == []
    caplog.set_level(logging.DEBUG, "serve")
    record_span(trace, "step", 0.25, step=1, job_id="j1")
    (step,) = spans_of(caplog)
    assert (step.span, step.trace_id, step.parent_id, step.step) == ("step", "a" * 32, "b" * 16, 1)
    assert step.getMessage() == "span step: 0.250 s"


def test_a_line_of_json_carries_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from sr_platform.observability import _JsonFormatter

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter({"replica": "r"}))
    logger = logging.getLogger("serve.tracing")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with entered(Trace("a" * 32), job_id="j1", key=key_hash("nora")), span("encode"):
        logger.info("reading")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["trace_id"] for line in lines] == ["a" * 32] * 2
    assert {line["job_id"] for line in lines} == {"j1"}
    assert "nora" not in stream.getvalue()


class Collector(http.server.BaseHTTPRequestHandler):
    """What an OpenTelemetry collector is to who sends spans."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    """What arrives at the collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""
    received: list[ExportTraceServiceRequest] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Collector,), {"received": received}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    server.server_close()


def test_spans_reach_a_collector_where_one_is_set(
    collector: list[ExportTraceServiceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_exporter", None)
    assert tracing.export_spans("restorer")
    with entered(Trace("a" * 32, "b" * 16)), span("restore", job_id="j1"):
        record_span(current() or Trace(""), "step", 0.25, step=1)
    exporter: Any = tracing._exporter
    exporter.flush()
    (sent,) = [scope.scope_spans[0].spans for request in collector for scope in request.resource_spans]
    step, restore = sorted(sent, key=lambda one: one.name == "restore")
    assert [one.trace_id.hex() for one in sent] == ["a" * 32] * 2
    assert (step.parent_span_id, restore.parent_span_id.hex()) == (restore.span_id, "b" * 16)
    assert step.end_time_unix_nano - step.start_time_unix_nano == 250_000_000
    assert restore.attributes[0].value.string_value == "j1"
    about = {
        attribute.key: attribute.value.string_value for attribute in collector[0].resource_spans[0].resource.attributes
    }
    assert about["service.name"] == "restorer"


def test_without_a_collector_nothing_of_opentelemetry_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delitem(sys.modules, "serve.span_export", raising=False)
    assert not tracing.export_spans("gateway")
    assert "serve.span_export" not in sys.modules
