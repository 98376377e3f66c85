"""G7: every method leaves one record a call, whatever becomes of it; the few exceptions are named here.

The gate and the log are the real ones; what is behind the gate is the test's own, so that no method needs
a request that fits it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from hsm_pool.audit import query, record
from hsm_pool.audit.log import AuditLog
from hsm_pool.errors import CommitUnknown, KeyNotFound
from hsm_pool.net.answers import UnreadAnswers
from hsm_pool.net.authorization import PERMISSIONS, REFLECTION, Caller, Kind
from hsm_pool.net.interceptors import Gate
from hsm_pool.net.requests import RequestReader
from hsm_pool.observability.calls import CallObserver

STREAMS = {REFLECTION, "/mhsm.crypto.v1.CryptoService/StreamOperations"}
NOT_ON_RECORD = {
    "/grpc.health.v1.Health/Check",
    "/mhsm.pool.v1.PoolService/GetPartitionStatus",
    "/mhsm.audit.v1.AuditService/GetCheckpoint",
    "/mhsm.enclave.v1.EnclaveService/GetStatus",
    "/mhsm.node.v1.NodeService/GetAdmission",
    "/mhsm.peer.v1.PeerService/BeginHeal",
    "/mhsm.peer.v1.PeerService/Cosign",
}
"""What docs/audit.md names, written down a second time: health checks, status polls, checkpoints that are
read or cosigned. Whoever adds a method here takes its calls out of the log."""

URIS = {
    Kind.CLIENT: "spiffe://pool/client/one",
    Kind.PARTITION: "spiffe://pool/partition/1",
    Kind.FABRIC: "spiffe://pool/fabric",
    Kind.NODE_AGENT: "spiffe://pool/node/1",
}
OUTCOMES: dict[bytes, Callable[[], Exception]] = {
    b"refused": lambda: KeyNotFound("no such key"),
    b"unknown": lambda: CommitUnknown("sent, and not known"),
    b"internal": lambda: ValueError("of ours"),
}
METHODS = sorted(PERMISSIONS)


def _answer(request: bytes, _: Any) -> Empty:
    make_error = OUTCOMES.get(request)
    if make_error is not None:
        raise make_error()
    return Empty()


def _answers(requests: Iterator[bytes], context: Any) -> Iterator[Empty]:
    for request in requests:
        yield _answer(request, context)


def _identify(context: grpc.ServicerContext) -> Caller:
    uri = str(dict(context.invocation_metadata())["caller"])
    (kind,) = (kind for kind in Kind if URIS[kind] == uri)
    return Caller(uri, kind, principals=("client/one",) if kind is Kind.CLIENT else ())


class Calls:
    """Calls methods through a gate, and reads what its log has got of each."""

    def __init__(self, channel: grpc.Channel, directory: Path) -> None:
        self._channel = channel
        self._directory = directory
        self._seen = 0

    def call(self, method: str, kind: Kind, *requests: bytes) -> str:
        """Return the status of a call; of a unary method with its only request."""
        who, sent = (("caller", URIS[kind]),), requests or (b"good",)
        try:
            if method in STREAMS:
                list(self._channel.stream_stream(method)(iter(sent), timeout=30, metadata=who))
            else:
                self._channel.unary_unary(method)(sent[0], timeout=30, metadata=who)
        except grpc.RpcError as error:
            name: str = error.code().name
            return name
        return "OK"

    def records(self) -> list[tuple[str, str, str]]:
        """Return name, caller and status of the records since this was asked last, but for the log's own."""
        found = [json.loads(line) for _, line in query.records_from(self._directory, 0)]
        new, self._seen = found[self._seen :], len(found)
        fields = ("operationName", "identity", "resultSignature")
        return [
            (entry[fields[0]], entry[fields[1]], entry[fields[2]])
            for entry in new
            if entry["operationName"] != "AuditLogCreate"
        ]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    directory = tmp_path_factory.mktemp("audit")
    log = AuditLog(directory, "spiffe://pool/partition/0", 0)
    reader, answers = RequestReader(8, 8), UnreadAnswers()
    # Whom his roles let through is shown elsewhere; here everybody of the right kind is.
    roles: Any = SimpleNamespace(admit=lambda *_: None)
    durations: Any = SimpleNamespace(observe=lambda *_: None)
    observer = CallObserver(durations, None)
    gate = Gate(0, _identify, lambda error: error, roles, log, observer, reader, answers)
    server = grpc.server(ThreadPoolExecutor(2), interceptors=[gate])
    for method in METHODS:
        _, service, name = method.split("/")
        one = grpc.unary_unary_rpc_method_handler(_answer, bytes, Empty.SerializeToString)
        handler = (
            grpc.stream_stream_rpc_method_handler(_answers, bytes, Empty.SerializeToString)
            if method in STREAMS
            else one
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Calls(channel, directory)
    server.stop(None).wait()
    reader.close()
    answers.close()
    log.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_call_leaves_one_record_of_its_name(calls: Calls, method: str) -> None:
    """Answered, refused, of unknown outcome, failed inside, and by each kind of caller who may not."""
    name, on_record = record.operation_name(method), method not in NOT_ON_RECORD
    calls.records()
    for kind in Kind:
        if kind not in PERMISSIONS[method]:
            assert calls.call(method, kind) == "PERMISSION_DENIED"
            assert calls.records() == [(name, URIS[kind], "PERMISSION_DENIED")], "also of what is polled"
            continue
        assert calls.call(method, kind) == "OK"
        assert calls.records() == [(name, URIS[kind], "OK")] * on_record
        for request, make_error in OUTCOMES.items():
            status = calls.call(method, kind, request)
            assert status == getattr(make_error(), "code", "INTERNAL")
            assert calls.records() == [(name, URIS[kind], status)] * on_record


@pytest.mark.parametrize("method", sorted(STREAMS))
def test_a_stream_leaves_one_record_a_message(calls: Calls, method: str) -> None:
    name, who = record.operation_name(method), URIS[Kind.CLIENT]
    calls.records()
    assert calls.call(method, Kind.CLIENT, b"one", b"two", b"three") == "OK"
    assert calls.records() == [(name, who, "OK")] * 3
    assert calls.call(method, Kind.CLIENT, b"one", b"refused", b"never read") == "NOT_FOUND"
    assert calls.records() == [(name, who, "OK"), (name, who, "NOT_FOUND")]


def test_a_record_says_which_method_it_is_of() -> None:
    """No two methods share a name, but the controller's and a peer's half of the same healing."""
    names = Counter(record.operation_name(method) for method in METHODS if method not in NOT_ON_RECORD)
    assert {name for name, count in names.items() if count > 1} == {"Heal"}
