"""What operators see of a real pool: metrics, reflection, traces; no name and no secret is in it (G3)."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from hsm_pool.client.channels import credentials
from hsm_pool.errors import KeyNotFound, PermissionDenied
from hsm_pool.net.authorization import PERMISSIONS
from mhsm.keys.v1 import keys_pb2
from mhsm.pool.v1 import pool_pb2, pool_pb2_grpc
from tests.running_pool import ROOT, RunningPool, TestOfficer, until
from tests.unit.observability.test_traces import PARENT_ID, SAMPLED, TRACE_ID, Collector

pytestmark = pytest.mark.pool

KEY = "canary-of-a-key"
LABELS = {
    "rpc_method",
    "rpc_response_status_code",
    "le",
    "activity_type",
    "activity_name",
    "status_code",
    "status_code_class",
    "state",
    "kind",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(scope="module")
def pool(
    make_pool: Callable[..., RunningPool], officers: list[TestOfficer], collector: tuple[Collector, str]
) -> Iterator[RunningPool]:
    """A pool that sends traces, with a few calls made."""
    made = make_pool(attended=True, options=("--traces", collector[1]))
    made.activate(officers, 2)
    with made.client() as client:
        client.create_key(KEY, key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        for _ in range(6):
            client.sign(f"keys/{KEY}", "ES256", bytes(32))
        with pytest.raises(KeyNotFound):
            client.get_key("keys/no-such-key")
    with made.client("administrator") as client, pytest.raises(PermissionDenied):
        client.sign(f"keys/{KEY}", "ES256", bytes(32))
    yield made
    made.down()


def scrape(pool: RunningPool, index: int) -> str:
    endpoint = pool.connection.partitions[index].metrics_endpoint
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=30) as response:
        text: str = response.read().decode()
    return text


def samples(pool: RunningPool) -> list[Any]:
    return [
        sample
        for index in range(3)
        for family in text_string_to_metric_families(scrape(pool, index))
        for sample in family.samples
    ]


def total(pool: RunningPool, name: str, **labels: str) -> float:
    return float(
        sum(
            sample.value
            for sample in samples(pool)
            if sample.name == name and labels.items() <= sample.labels.items()
        )
    )


def test_calls_are_counted_by_method_and_result(pool: RunningPool) -> None:
    sign = {"rpc_method": "mhsm.crypto.v1.CryptoService/Sign"}
    count = "rpc_server_call_duration_seconds_count"
    assert total(pool, count, **sign, rpc_response_status_code="OK") == 6
    assert total(pool, count, **sign, rpc_response_status_code="PERMISSION_DENIED") == 1
    assert total(pool, count, rpc_response_status_code="NOT_FOUND") == 1


def test_azures_three_metrics_have_azures_dimensions(pool: RunningPool) -> None:
    """ServiceApiHit, ServiceApiLatency and Availability, of the service's interface alone."""
    sign = {"activity_type": "crypto", "activity_name": "KeySign"}
    assert total(pool, "mhsm_service_api_hit_total", **sign, status_code="200", status_code_class="2xx") == 6
    assert total(pool, "mhsm_service_api_hit_total", **sign, status_code="403", status_code_class="4xx") == 1
    assert total(pool, "mhsm_service_api_latency_milliseconds_count", **sign) == 7
    assert total(pool, "mhsm_service_api_hit_total", activity_type="enclave") == 0
    assert total(pool, "mhsm_service_api_hit_total", activity_name="Check") == 0
    assert total(pool, "mhsm_availability_percent") > 0


def test_a_partition_tells_its_state(pool: RunningPool) -> None:
    assert total(pool, "mhsm_partition_state", state="serving") == 3
    assert total(pool, "mhsm_keys") == 3
    assert total(pool, "process_resident_memory_bytes") > 0


def test_labels_are_closed_sets_and_name_nobody(pool: RunningPool) -> None:
    """G3: neither keys nor callers nor the pool; whatever is called, the labels stay the same."""
    for index in range(3):
        text = scrape(pool, index)
        for word in (KEY, "no-such-key", "client/", "application", "spiffe", pool.connection.pool_id):
            assert word not in text
    seen = samples(pool)
    assert {name for sample in seen for name in sample.labels} <= LABELS
    methods = {sample.labels["rpc_method"] for sample in seen if "rpc_method" in sample.labels}
    assert methods <= {method.removeprefix("/") for method in PERMISSIONS} | {"other"}


def test_every_metric_of_the_dashboard_exists(pool: RunningPool) -> None:
    """And every metric of our own is named in the operations page."""
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 10
    exposed: set[str] = set()
    for family in text_string_to_metric_families(scrape(pool, 0)):
        exposed |= {family.name, *(sample.name for sample in family.samples)}
        exposed |= {f"{family.name}_total"} if family.type == "counter" else set()
    for expression in expressions:
        named = set(re.findall(r"\b(?:rpc_server|mhsm|process)_[a-z_]+", expression))
        assert named, expression
        assert named <= exposed, expression
    page = (ROOT / "docs/operations.md").read_text()
    own = {name for name in exposed if name.startswith("mhsm_")}
    for name in {re.sub(r"_(total|sum|count)$", "", name) for name in own}:
        assert name in page, name


def test_the_example_of_a_scrape_configuration_names_the_metrics_path() -> None:
    assert "metrics_path: /metrics" in (ROOT / "deploy/prometheus.yml").read_text()


def test_metrics_are_served_on_loopback_only(pool: RunningPool) -> None:
    for entry in pool.connection.partitions:
        assert entry.metrics_endpoint is not None
        assert entry.metrics_endpoint.startswith("127.0.0.1:")
        process_id = entry.process_ids["partition"]
        port = int(entry.metrics_endpoint.rpartition(":")[2])
        listening = [
            fields[1]
            for line in Path(f"/proc/{process_id}/net/tcp").read_text().splitlines()[1:]
            if (fields := line.split())[3] == "0A" and int(fields[1].partition(":")[2], 16) == port
        ]
        assert listening == [f"0100007F:{port:04X}"]


def ask(pool: RunningPool, request: Any) -> Any:
    entry = pool.connection.partitions[0]
    with grpc.secure_channel(entry.endpoint, credentials(pool.connection, "application")) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        return next(iter(stub.ServerReflectionInfo(iter([request]), timeout=30)))


def test_reflection_describes_the_client_plane_and_no_other(pool: RunningPool) -> None:
    response = ask(pool, reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in response.list_services_response.service}
    assert "mhsm.crypto.v1.CryptoService" in names
    assert not names & {
        "mhsm.enclave.v1.EnclaveService",
        "mhsm.peer.v1.PeerService",
        "mhsm.node.v1.NodeService",
    }
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="mhsm.crypto.v1.CryptoService")
    assert ask(pool, symbol).file_descriptor_response.file_descriptor_proto
    for hidden in ("mhsm.peer.v1.PeerService", "mhsm.record.v1.PoolHeader", "mhsm.ceremony.v1"):
        refused = ask(pool, reflection_pb2.ServerReflectionRequest(file_containing_symbol=hidden))
        assert refused.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_a_callers_trace_goes_on_in_the_pool(pool: RunningPool, collector: tuple[Collector, str]) -> None:
    """And no span of the run names a key, a caller or a token."""
    entry = pool.connection.partitions[0]
    with grpc.secure_channel(entry.endpoint, credentials(pool.connection, "application")) as channel:
        stub = pool_pb2_grpc.PoolServiceStub(channel)
        stub.GetPartitionStatus(
            pool_pb2.GetPartitionStatusRequest(), timeout=30, metadata=[("traceparent", SAMPLED)]
        )
    made, _ = collector
    span = until(
        lambda: next((span for span in made.spans() if span.trace_id.hex() == TRACE_ID), None),
        60,
        "the span of the call",
    )
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.name == "mhsm.pool.v1.PoolService/GetPartitionStatus"
    sent = b"".join(request.SerializeToString() for request in made.requests)
    for word in (KEY, "client/", "application"):
        assert word.encode() not in sent
