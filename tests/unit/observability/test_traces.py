"""Spans reach a collector with the caller's trace context, and hold nothing else of him (G3, G8)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from hsm_pool.observability.traces import Tracing
from hsm_pool.settings import TraceSettings

SIGN = "/mhsm.crypto.v1.CryptoService/Sign"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, _context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"127.0.0.1:{port}"
    server.stop(0).wait()


def traced(endpoint: str, *calls: tuple[list[tuple[str, str | bytes]], str]) -> None:
    tracing = Tracing(TraceSettings(endpoint), "0" * 32, 1)
    for metadata, code in calls:
        tracing.end(tracing.begin(SIGN, metadata), code)
    tracing.close()


def test_a_span_continues_the_callers_trace(collector: tuple[Collector, str]) -> None:
    made, endpoint = collector
    secret = ("authorization", "Bearer canary-token")
    traced(endpoint, ([secret, ("traceparent", SAMPLED), ("baggage", "canary=1")], "OK"))
    (span,) = made.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.name == SIGN.removeprefix("/")
    attributes = {entry.key: entry.value.string_value for entry in span.attributes}
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": SIGN.removeprefix("/"),
        "rpc.response.status_code": "OK",
    }
    assert not any(b"canary" in request.SerializeToString() for request in made.requests)


def test_a_caller_may_ask_for_no_trace(collector: tuple[Collector, str]) -> None:
    made, endpoint = collector
    traced(endpoint, ([("traceparent", NOT_SAMPLED)], "OK"), ([], "INTERNAL"))
    (span,) = made.spans()
    assert span.status.code == 2, "an internal error is an error of the span"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("traceparent", "")],
        [("traceparent", "x" * 10_000)],
        [("traceparent", SAMPLED + "-more")],
        [("traceparent", SAMPLED.upper())],
        [("traceparent", SAMPLED), ("traceparent", SAMPLED)],
        [("traceparent", f"00-{'0' * 32}-{PARENT_ID}-01")],
        [("traceparent", b"\xff")],
    ],
)
def test_a_trace_context_that_is_none_is_ignored(
    collector: tuple[Collector, str], metadata: list[tuple[str, str | bytes]]
) -> None:
    """G8: the call is served and begins a trace of its own."""
    made, endpoint = collector
    traced(endpoint, (metadata, "OK"))
    (span,) = made.spans()
    assert span.trace_id.hex() != TRACE_ID
    assert span.parent_span_id == b""


def test_without_a_collector_nothing_grows_and_the_end_is_bounded() -> None:
    before = threading.active_count()
    tracing = Tracing(TraceSettings("127.0.0.1:1"), "0" * 32, 0)
    for _ in range(10_000):
        tracing.end(tracing.begin(SIGN, []), "OK")
    tracing.close()
    assert threading.active_count() <= before
