"""Traces: one span a call, sent to a collector on this machine by OTLP. Off unless the settings say so.

Spans hold method, code and the caller's trace context (W3C traceparent) and nothing else: no name of a
key, no identity. What the collector does not take is dropped, in bounded memory.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hsm_pool.settings import TraceSettings

_SPANS_MAX = 2_048
_BATCH_SPANS = 256
_DELAY_MS = 1_000
_EXPORT_SECONDS = 1
_QUIET_SECONDS = 60.0
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00: 55 characters."""
_SERVICE_FAULTS = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"})
"""Codes that are errors of a server's span (semantic conventions for gRPC)."""

Metadata = Iterable[tuple[str, str | bytes]]


class _ToLog(logging.Handler):
    """The library's warnings become our own log lines, one a minute: a missing collector is no flood."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() < self._quiet_until:
            return
        self._quiet_until = time.monotonic() + _QUIET_SECONDS
        structlog.get_logger().warning("traces", logger=record.name, level=record.levelname)


class Tracing:
    """Makes spans and sends them."""

    def __init__(self, settings: TraceSettings, pool_id: str, index: int) -> None:
        library = logging.getLogger("opentelemetry")
        library.handlers, library.propagate = [_ToLog()], False
        resource = Resource(
            {
                "service.name": "mhsm-partition",
                "service.namespace": pool_id,
                "service.instance.id": str(index),
            }
        )
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=settings.endpoint, insecure=True, timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_SPANS_MAX,
                schedule_delay_millis=_DELAY_MS,
                max_export_batch_size=_BATCH_SPANS,
            )
        )
        self._tracer = self._provider.get_tracer("hsm_pool")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Metadata) -> Span:
        """Begin the span of a call.

        Args:
            method: gRPC method (/package.Service/Method).
            metadata: Of the call; exactly one well-formed traceparent counts.
        """
        name = method.removeprefix("/")
        return self._tracer.start_span(
            name,
            context=self._parent(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": name},
        )

    def _parent(self, metadata: Metadata) -> Context:
        found = [value for name, value in metadata if name == "traceparent"]
        if len(found) != 1 or not isinstance(found[0], str) or not _TRACEPARENT.fullmatch(found[0]):
            return Context()
        return self._propagator.extract({"traceparent": found[0]}, Context())

    def end(self, span: Span, code: str) -> None:
        """End the span of a call that ended with this google.rpc.Code."""
        span.set_attribute("rpc.response.status_code", code)
        if code in _SERVICE_FAULTS:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, bounded, and end the thread."""
        self._provider.shutdown()
