"""G5, G7: gate and guard of the fabric plane as they stand before a service, through a real listener."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from hsm_pool import errors, limits
from hsm_pool.audit import query
from hsm_pool.audit.log import AuditLog
from hsm_pool.net.answers import UnreadAnswers
from hsm_pool.net.authorization import Caller, Kind
from hsm_pool.net.enclave_guard import CallFrequency, EnclaveGuard
from hsm_pool.net.interceptors import Gate
from hsm_pool.net.requests import RequestReader
from hsm_pool.net.role_gate import RoleGate
from hsm_pool.observability.calls import CallObserver
from hsm_pool.observability.metrics import CallMetrics
from mhsm.enclave.v1 import enclave_pb2, enclave_pb2_grpc

CONTROLLER = Caller("spiffe://pool/fabric", Kind.FABRIC)
FLOOD = 50


class Obedient(enclave_pb2_grpc.EnclaveServiceServicer, health_pb2_grpc.HealthServicer):
    """Answers whatever the gate lets through."""

    def __init__(self) -> None:
        self.answer: Callable[[], enclave_pb2.GetStatusResponse] = enclave_pb2.GetStatusResponse

    def GetStatus(self, request: Any, context: Any) -> enclave_pb2.GetStatusResponse:  # noqa: ARG002, N802
        return self.answer()

    def Drain(self, request: Any, context: Any) -> enclave_pb2.DrainResponse:  # noqa: ARG002, N802
        return enclave_pb2.DrainResponse()


class Plane:
    """A fabric plane with a clock that stands still, and what it has put on record."""

    def __init__(self, directory: Path) -> None:
        self.now = 100.0
        self.log = AuditLog(directory, "spiffe://pool/partition/0", 0)
        self._directory = directory
        self.reader, self.answers = RequestReader(1, 1), UnreadAnswers()
        self.frequency = CallFrequency(0, self.log, lambda: self.now)
        gate = Gate(
            0,
            lambda _: CONTROLLER,
            lambda error: error,
            cast("RoleGate", None),
            self.log,
            CallObserver(CallMetrics(CollectorRegistry()), None),
            self.reader,
            self.answers,
            frequency=self.frequency,
            bare_errors=True,
        )
        self.server = grpc.server(ThreadPoolExecutor(1), interceptors=[gate, EnclaveGuard()])
        self.service = Obedient()
        enclave_pb2_grpc.add_EnclaveServiceServicer_to_server(self.service, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = enclave_pb2_grpc.EnclaveServiceStub(self.channel)

    def drains(self, calls: int) -> Counter[str]:
        """Send commands; return the codes of the answers."""
        request = enclave_pb2.DrainRequest(counter=1, expires_ms=1)
        return Counter(_code(lambda: self.stub.Drain(request, timeout=20)) for _ in range(calls))

    def status(self) -> str:
        return _code(lambda: self.stub.GetStatus(enclave_pb2.GetStatusRequest(), timeout=20))

    def watch(self) -> str:
        """Call a method that nobody may call; it streams."""
        watch = health_pb2_grpc.HealthStub(self.channel).Watch
        return _code(lambda: list(watch(health_pb2.HealthCheckRequest(), timeout=20)))

    def records(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for _, line in query.records_from(self._directory, 0)]
        return [entry for entry in found if entry["operationName"] != "AuditLogCreate"]


def _code(call: Any) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    made = Plane(tmp_path)
    yield made
    made.channel.close()
    made.server.stop(None).wait()
    made.reader.close()
    made.log.close()


def test_refused_calls_are_on_record_once_a_second_with_their_number(plane: Plane) -> None:
    """Else a flood of calls that nobody obeys pushes all records before it out of the log."""
    burst = limits.ENCLAVE_CALLS_BURST
    assert plane.drains(burst + FLOOD) == {"OK": burst, "RESOURCE_EXHAUSTED": FLOOD}
    refused = [entry for entry in plane.records() if entry["operationName"] == "FrequentCalls"]
    assert len(plane.records()) == burst + len(refused), "what was obeyed is on record, each call"
    assert [entry["properties"]["items"] for entry in refused] == [1]
    plane.now += 1.0
    assert plane.status() == "OK", "whatever call comes next brings the rest"
    first, rest = (entry for entry in plane.records() if entry["operationName"] == "FrequentCalls")
    assert rest["properties"]["items"] == FLOOD - 1
    assert (rest["identity"], rest["resultType"]) == (CONTROLLER.uri, "Failed")
    assert (rest["resultSignature"], rest["resultDescription"]) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert first["correlationId"] != rest["correlationId"]


def test_what_was_refused_last_is_on_record_when_the_partition_ends(plane: Plane) -> None:
    """G7: the controller itself can end it, by a command after the flood."""
    burst = limits.ENCLAVE_CALLS_BURST
    assert plane.drains(burst + FLOOD) == {"OK": burst, "RESOURCE_EXHAUSTED": FLOOD}
    plane.frequency.close()
    refused = [entry for entry in plane.records() if entry["operationName"] == "FrequentCalls"]
    assert sum(entry["properties"]["items"] for entry in refused) == FLOOD


def test_calls_that_nobody_may_make_are_counted_like_commands(plane: Plane) -> None:
    """Each of them is a refusal of access, and that is on record: so the bound comes before it."""
    burst = limits.ENCLAVE_CALLS_BURST
    codes = Counter(plane.watch() for _ in range(burst + FLOOD))
    assert codes == {"PERMISSION_DENIED": burst, "RESOURCE_EXHAUSTED": FLOOD}
    assert len(plane.records()) == burst + 1


def test_commands_do_not_use_up_the_calls_for_status(plane: Plane) -> None:
    """G5: whoever floods a partition with commands does not make it look dead; nor the other way round."""
    plane.drains(limits.ENCLAVE_CALLS_BURST + 1)
    codes = Counter(plane.status() for _ in range(limits.ENCLAVE_CALLS_BURST + FLOOD))
    assert codes == {"OK": limits.ENCLAVE_CALLS_BURST, "RESOURCE_EXHAUSTED": FLOOD}
    plane.now += 1.0
    per_second = limits.ENCLAVE_CALLS_PER_SECOND
    assert plane.drains(per_second + 1) == {"OK": per_second, "RESOURCE_EXHAUSTED": 1}


@pytest.mark.parametrize(
    "reply",
    [
        enclave_pb2.GetStatusResponse(serving_count=4),
        enclave_pb2.GetStatusResponse(incarnation=2**32),
        enclave_pb2.GetStatusResponse(state=8),  # type: ignore[arg-type]
        enclave_pb2.GetStatusResponse.FromString(b"\xfa\x01\x05bytes"),
    ],
    ids=lambda reply: repr(reply)[:40],
)
def test_a_reply_outside_of_the_contract_does_not_leave(
    plane: Plane, reply: enclave_pb2.GetStatusResponse
) -> None:
    """G3, G5: a mistake of a service gives the controller no more than the contract leaves."""
    assert plane.status() == "OK"
    plane.service.answer = lambda: reply
    assert plane.status() == "INTERNAL"


@pytest.mark.parametrize(
    "refusal",
    [
        errors.CommandStale,
        errors.FloorOfTwo,
        errors.InvalidField,
        errors.NotFresh,
        errors.Overloaded,
        errors.PartitionStarting,
        errors.PermissionDenied,
    ],
)
def test_a_refusal_is_its_code_alone(plane: Plane, refusal: type[errors.MHSMError]) -> None:
    """G5: no text, no reason, no details; also where a code is one that gRPC itself has words for."""

    def refuse() -> enclave_pb2.GetStatusResponse:
        error = refusal("a text that names a key")
        raise error

    plane.service.answer = refuse
    with pytest.raises(grpc.RpcError) as caught:
        plane.stub.GetStatus(enclave_pb2.GetStatusRequest(), timeout=20)
    assert caught.value.code().name == refusal.code
    assert not caught.value.details()
    assert not caught.value.trailing_metadata()
