"""What the interceptor tells of each call: a metric always, a span if traces are on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc


class Durations(Protocol):
    """Counts calls: :class:`hsm_pool.observability.metrics.CallMetrics`."""

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count a call."""


class Spans(Protocol):
    """Traces calls: :class:`hsm_pool.observability.traces.Tracing`."""

    def begin(self, method: str, metadata: Any) -> Any:
        """Begin a span."""

    def end(self, span: Any, code: str) -> None:
        """End a span."""


@dataclass(slots=True)
class Observation:
    """One call under way."""

    method: str
    span: Any
    code: str = "OK"
    """Name of a google.rpc.Code."""
    began: float = field(default_factory=time.perf_counter)


class CallObserver:
    """Observes the calls of all listeners of a partition. Thread-safe."""

    def __init__(self, durations: Durations, spans: Spans | None) -> None:
        self._durations = durations
        self._spans = spans

    def begin(self, method: str, context: grpc.ServicerContext) -> Observation:
        """Begin to observe a call."""
        span = self._spans.begin(method, context.invocation_metadata()) if self._spans else None
        return Observation(method, span)

    def end(self, observation: Observation) -> None:
        """Note how it ended."""
        seconds = time.perf_counter() - observation.began
        self._durations.observe(observation.method, observation.code, seconds)
        if self._spans:
            self._spans.end(observation.span, observation.code)
