"""Metrics of one partition, for Prometheus.

Calls are measured as OpenTelemetry's semantic conventions name it (rpc.server.call.duration,
seconds); Azure's three metrics of a Managed HSM (ServiceApiHit, ServiceApiLatency, Availability) are
made of the same figures when they are asked for. Labels are methods, codes and kinds: closed
sets, never the name of a key or of a caller.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.metrics_core import Metric

from hsm_pool.audit import record
from hsm_pool.net.admission import CallAdmission, CallKind
from hsm_pool.net.authorization import PERMISSIONS, Kind
from hsm_pool.partition.partition import Partition, PartitionState

_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_OTHER = "other"
_AVAILABILITY_SECONDS = 60.0
"""Azure's time grain (PT1M)."""
_CONNECTION_SECONDS = 2.0
"""How long one scrape may be silent: they are served one after the other."""
_STOP_POLL_SECONDS = 0.2

_log = structlog.get_logger()


class CallMetrics:
    """How often which method was called, with which result, and how long it took. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.durations = Histogram(
            "rpc_server_call_duration_seconds",
            "Duration of calls; each message of a stream counts as a call (rpc.server.call.duration).",
            ("rpc_method", "rpc_response_status_code"),
            buckets=_BUCKETS_SECONDS,
            registry=registry,
        )
        self._children: dict[tuple[str, str], Histogram] = {}

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count a call.

        Args:
            method: gRPC method (/package.Service/Method).
            code: Name of a google.rpc.Code.
            seconds: How long it took.
        """
        child = self._children.get((method, code))
        if child is None:
            name = method.removeprefix("/") if method in PERMISSIONS else _OTHER
            child = self.durations.labels(name, code)
            if name != _OTHER:
                self._children[method, code] = child
        child.observe(seconds)


class _Availability:
    """Share of calls of the last minute that the service itself did not fail, in percent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._older = self._newer = (time.monotonic(), 0.0, 0.0)

    def percent(self, calls: float, failures: float) -> float:
        """Return it, from the counts since the start; how often it is asked for makes no difference."""
        now = time.monotonic()
        with self._lock:
            if now - self._newer[0] >= _AVAILABILITY_SECONDS:
                self._older, self._newer = self._newer, (now, calls, failures)
            _, calls_then, failures_then = self._older
        recent = calls - calls_then
        return 100.0 if recent <= 0 else 100.0 * (1 - (failures - failures_then) / recent)


class AzureCollector:
    """Azure's metrics of a Managed HSM (namespace microsoft.keyvault/managedhsms), from our own."""

    def __init__(self, calls: CallMetrics) -> None:
        self._calls = calls
        self._availability = _Availability()

    def collect(self) -> Iterator[Metric]:
        """Give the three metrics."""
        labels = ("activity_type", "activity_name", "status_code", "status_code_class")
        hits = CounterMetricFamily("mhsm_service_api_hit", "Calls (Azure: ServiceApiHit).", labels=labels)
        latency = SummaryMetricFamily(
            "mhsm_service_api_latency_milliseconds",
            "Latency of calls in milliseconds (Azure: ServiceApiLatency).",
            labels=labels,
        )
        total = failed = 0.0
        for key, (count, seconds) in self._by_activity().items():
            hits.add_metric(key, count)
            latency.add_metric(key, int(count), seconds * 1000)
            total += count
            failed += count if key[3] == "5xx" else 0.0
        yield hits
        yield latency
        percent = self._availability.percent(total, failed)
        yield GaugeMetricFamily(
            "mhsm_availability_percent",
            "Calls of the last minute or two that did not fail for a reason of the service's own "
            "(Azure: Availability).",
            value=percent,
        )

    def _by_activity(self) -> dict[tuple[str, str, str, str], tuple[float, float]]:
        found: dict[tuple[str, str, str, str], tuple[float, float]] = {}
        for metric in self._calls.durations.collect():
            for sample in metric.samples:
                if not sample.name.endswith(("_count", "_sum")):
                    continue
                method = f"/{sample.labels['rpc_method']}"
                if Kind.CLIENT not in PERMISSIONS.get(method, ()) or method in record.POLLED:
                    continue  # a plane of the pool's own, or watching: no use of the service
                key = _activity(sample.labels["rpc_method"], sample.labels["rpc_response_status_code"])
                count, seconds = found.get(key, (0.0, 0.0))
                if sample.name.endswith("_count"):
                    found[key] = count + sample.value, seconds
                else:
                    found[key] = count, seconds + sample.value
        return found


def _activity(method: str, code: str) -> tuple[str, str, str, str]:
    service = method.partition("/")[0].rpartition(".")[2].removesuffix("Service")
    status = str(record.HTTP_STATUS.get(code, 500))
    return service.lower(), record.operation_name(f"/{method}"), status, f"{status[0]}xx"


class PartitionCollector:
    """What a partition knows of itself at the moment."""

    def __init__(self, partition: Partition, admission: CallAdmission) -> None:
        self._partition = partition
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """Give gauges and counters."""
        partition = self._partition
        states = GaugeMetricFamily("mhsm_partition_state", "1 for the state it is in.", labels=("state",))
        for state in PartitionState:
            states.add_metric((state.name.lower(),), float(partition.state is state))
        yield states
        serving = partition.holding_keys()
        replica = serving.replica if serving else None
        lease = replica.lease_remaining() if replica else 0.0
        yield _gauge("mhsm_lease_remaining_seconds", "How long it may serve without a renewal.", lease)
        sequence = replica.head.sequence if replica else 0
        yield _gauge("mhsm_applied_sequence", "Position in the chain that is applied.", sequence)
        keys = replica.state.key_count() if replica else 0
        yield _gauge("mhsm_keys", "Keys of the pool, soft-deleted ones included.", keys)
        room = serving.committer.room if serving else None
        in_use, size, quota = (room.in_use_bytes, room.size_bytes, room.quota_bytes) if room else (0, 0, 0)
        yield _gauge("mhsm_store_in_use_bytes", "What is in use of a store member's file.", in_use)
        yield _gauge("mhsm_store_size_bytes", "A store member's file.", size)
        yield _gauge("mhsm_store_quota_bytes", "What a store member may hold.", quota)
        full = bool(room and room.full)
        yield _gauge("mhsm_store_full", "1 while nothing that makes the pool larger is taken.", full)
        log = partition.audit.log
        yield _gauge("mhsm_audit_records", "Records in its audit log.", log.size)
        yield _gauge("mhsm_audit_lost_records", "Records lost since the start.", log.lost)
        failure = bool(partition.audit.failure())
        yield _gauge("mhsm_audit_failure", "1 while its audit log is not written or not cosigned.", failure)
        yield from self._calls()

    def _calls(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("mhsm_calls_running", "Calls that run.", labels=("kind",))
        waiting = GaugeMetricFamily("mhsm_calls_waiting", "Calls that wait for their turn.", labels=("kind",))
        refused = CounterMetricFamily("mhsm_calls_refused", "Calls refused as OVERLOADED.", labels=("kind",))
        for kind in CallKind:
            now_running, now_waiting, refused_so_far = self._admission.counts(kind)
            running.add_metric((kind.value,), now_running)
            waiting.add_metric((kind.value,), now_waiting)
            refused.add_metric((kind.value,), refused_so_far)
        yield from (running, waiting, refused)
        yield _gauge("mhsm_streams_open", "Open streams.", self._admission.open_streams())


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


class PartitionMetrics:
    """All metrics of a partition."""

    def __init__(self, partition: Partition, admission: CallAdmission) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self.registry)
        self.registry.register(AzureCollector(self.calls))
        self.registry.register(PartitionCollector(partition, admission))
        ProcessCollector(registry=self.registry)


class _QuietHandler(WSGIRequestHandler):
    timeout = _CONNECTION_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing: a line for each scrape helps nobody."""


class _Server(WSGIServer):
    request_queue_size = 5

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write nothing: whoever scrapes went away, and no text of an exception is logged (G3)."""


class MetricsListener:
    """Answers scrapes on loopback, one after the other, in one thread."""

    def __init__(self, endpoint: str, registry: CollectorRegistry) -> None:
        host, _, port = endpoint.rpartition(":")
        self._server: WSGIServer | None = None
        application: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        try:
            self._server = make_server(host, int(port), application, _Server, _QuietHandler)
        except OSError as error:
            # A pool without metrics is better than none.
            _log.error("no metrics: the listener failed", endpoint=endpoint, errno=error.errno)
            return
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STOP_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and join the thread."""
        if self._server is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
