"""A greedy principal against a modest one on a real pool: bounded, fair, nothing lost (G1, G8).

No times are asserted: what is fast enough is measured by ``scripts/benchmark overload``.
"""

from __future__ import annotations

import contextlib
import threading
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from hsm_pool import limits, settings
from hsm_pool.client.channels import OPTIONS, credentials
from hsm_pool.client.connection import ClientIdentity
from hsm_pool.core.roles import CRYPTO_OFFICER, CRYPTO_USER
from hsm_pool.errors import Overloaded
from hsm_pool.net.admission import THREADS
from mhsm.crypto.v1 import crypto_pb2, crypto_pb2_grpc
from mhsm.keys.v1 import keys_pb2, keys_pb2_grpc
from mhsm.node.v1 import node_pb2, node_pb2_grpc
from tests.identities import Clients
from tests.running_pool import RunningPool

pytestmark = pytest.mark.pool

PARTITION = 0
OUTSTANDING = 120
"""Calls of the greedy principal that are open at any time: far more than run and wait."""
CONNECTIONS = 2
PAUSE_SECONDS = 0.05
"""Of the greedy principal after a refusal: less than he is asked for; the test shares the machine."""
RESIDENT_BYTES_MAX = 512 * 1024 * 1024
"""Far above what a partition needs (about 120 MiB), far below what an unbounded queue would take."""
WAIT_SECONDS = 60.0


@dataclass(slots=True)
class Seen:
    """What the greedy principal was answered."""

    done: int = 0
    refused: list[Any] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class Greedy:
    """Keeps many calls open at one partition until it is told to stop."""

    def __init__(self, pool: RunningPool, files: ClientIdentity) -> None:
        self._pool, self._files = pool, files
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.refused_once = threading.Event()
        self.seen = Seen()

    def _note(self, call: Any) -> None:
        with self._lock:
            if call.code() is grpc.StatusCode.OK:
                self.seen.done += 1
            elif call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.seen.refused.append(rpc_status.from_call(call))
                self.refused_once.set()
            else:
                self.seen.others.append(f"{call.code()} {call.details()}")

    def _keep_open(self, method: Any, request: Callable[[], Any]) -> None:
        while not self._stopping.is_set():
            call = method.future(request(), timeout=WAIT_SECONDS)
            with contextlib.suppress(grpc.RpcError):
                call.result()
            self._note(call)
            if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._stopping.wait(PAUSE_SECONDS)

    @contextlib.contextmanager
    def flood(self, stub: Any, method: str, request: Callable[[], Any]) -> Iterator[Seen]:
        """Flood a method, from when the first call was refused until the block ends."""
        self.seen = Seen()
        self._stopping.clear()
        self.refused_once.clear()
        connection = self._pool.connection
        connection.clients["greedy"] = self._files
        endpoint = connection.partitions[PARTITION].endpoint
        tls = credentials(connection, "greedy")
        channels = [grpc.secure_channel(endpoint, tls, options=OPTIONS) for _ in range(CONNECTIONS)]
        threads = [
            threading.Thread(
                target=self._keep_open, args=(getattr(stub(channels[n % CONNECTIONS]), method), request)
            )
            for n in range(OUTSTANDING)
        ]
        for thread in threads:
            thread.start()
        try:
            assert self.refused_once.wait(WAIT_SECONDS), "there was no overload"
            yield self.seen
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join(2 * WAIT_SECONDS)
            for channel in channels:
                channel.close()


@pytest.fixture(scope="module")
def clients(pool: RunningPool) -> Clients:
    """Two principals with the same rights, and the keys of the test."""
    made = Clients(pool)
    with pool.client("administrator") as administrator:
        for name in ("greedy", "modest"):
            for role in (CRYPTO_USER, CRYPTO_OFFICER):
                administrator.create_role_assignment(f"client/{name}", role.role_definition_id)
    with pool.client() as client:
        client.create_key("overload-rsa", key_type=keys_pb2.KEY_TYPE_RSA, size_bits=2048)
        client.create_key("overload-ec", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    return made


@pytest.fixture(scope="module")
def greedy(pool: RunningPool, clients: Clients) -> Greedy:
    return Greedy(pool, clients.files("greedy"))


BATCH = crypto_pb2.SignRequest(
    name="keys/overload-rsa", algorithm="RS256", digests=[bytes(32)] * limits.BATCH_ITEMS_RSA_MAX
)


def metric(pool: RunningPool, name: str) -> float:
    endpoint = pool.connection.partitions[PARTITION].metrics_endpoint
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=WAIT_SECONDS) as response:
        text = response.read().decode()
    return float(
        sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )
    )


def check_refusals(seen: Seen) -> None:
    """A refusal is definite and says when to come back."""
    assert seen.others == []
    assert seen.refused
    for status in seen.refused:
        info, later = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert status is not None, "a refusal without a reason: not by the interceptor"
        assert status.details[0].Unpack(info)
        assert (info.reason, info.metadata["definite"]) == ("OVERLOADED", "true")
        assert status.details[1].Unpack(later)
        seconds = later.retry_delay.ToNanoseconds() / 1e9
        assert limits.RETRY_SECONDS_MIN <= seconds <= limits.RETRY_SECONDS_MAX


def test_the_modest_one_is_served_while_the_greedy_one_floods(
    pool: RunningPool, clients: Clients, greedy: Greedy
) -> None:
    """Each single try of the modest one is admitted; his acknowledged writes are all there then (G1)."""
    created: list[str] = []
    pinned = {"partition": PARTITION, "timeout_seconds": WAIT_SECONDS}
    with (
        clients.connect("modest", **pinned) as modest,
        greedy.flood(crypto_pb2_grpc.CryptoServiceStub, "Sign", lambda: BATCH) as seen,
    ):
        for number in range(10):
            assert len(modest.sign("keys/overload-ec", "ES256", bytes(32))) == 64
            key = modest.create_key(
                f"overload-{number}", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256
            )
            created.append(key.name)
        assert pool.status(PARTITION) is not None
        entry = pool.connection.partitions[PARTITION]
        with grpc.secure_channel(entry.endpoint, credentials(pool.connection, "application")) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)
        assert metric(pool, "process_resident_memory_bytes") < RESIDENT_BYTES_MAX
        assert metric(pool, "mhsm_calls_running") <= (
            limits.OPERATIONS_RUNNING_MAX + limits.OPERATIONS_PAUSED_MAX + 8
        )
        assert metric(pool, "mhsm_calls_waiting") <= limits.OPERATIONS_WAITING_MAX + 8
    check_refusals(seen)
    assert seen.done > 0
    for index in range(3):
        with clients.connect("modest", partition=index, timeout_seconds=WAIT_SECONDS) as reader:
            assert [reader.get_key(name).name for name in created] == created
    assert metric(pool, "process_resident_memory_bytes") < RESIDENT_BYTES_MAX
    assert metric(pool, "mhsm_calls_waiting") == 0


def test_rsa_keys_of_one_principal_do_not_keep_others_from_writing(
    pool: RunningPool, clients: Clients, greedy: Greedy
) -> None:
    """RSA keys are made off the serving threads, and few mutations wait for them."""

    def request() -> keys_pb2.CreateKeyRequest:
        return keys_pb2.CreateKeyRequest(
            key_id=f"overload-many-{uuid.uuid4()}",
            key_type=keys_pb2.KEY_TYPE_RSA,
            size_bits=2048,
            request_id=str(uuid.uuid4()),
        )

    pinned = {"partition": PARTITION, "timeout_seconds": WAIT_SECONDS}
    with (
        clients.connect("modest", **pinned) as modest,
        greedy.flood(keys_pb2_grpc.KeyServiceStub, "CreateKey", request) as seen,
    ):
        for number in range(3):
            modest.create_key(
                f"overload-quick-{number}", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256
            )
            modest.sign("keys/overload-ec", "ES256", bytes(32))
    check_refusals(seen)
    assert seen.done > 0
    with pool.client() as client:
        # The keys that were acknowledged are there; what was refused made none.
        assert sum("overload-many" in key.name for key in client.list_keys()) == seen.done


def test_calls_that_send_no_request_keep_nobody_from_anything(pool: RunningPool, clients: Clients) -> None:
    """More than there are threads, of somebody without a role, and of nobody: others are served (G8)."""
    connection = pool.connection
    connection.clients["silent"] = clients.files("silent")
    entry = connection.partitions[PARTITION]
    assert entry.token_endpoint
    anonymous = grpc.ssl_channel_credentials(Path(connection.client_ca_file).read_bytes())
    go_on = threading.Event()

    def nothing() -> Iterator[bytes]:
        go_on.wait(2 * WAIT_SECONDS)
        yield from ()

    listeners = {entry.endpoint: credentials(connection, "silent"), entry.token_endpoint: anonymous}
    for endpoint, tls in listeners.items():
        channels: list[Any] = [
            grpc.secure_channel(endpoint, tls, options=[*OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
            for _ in range(1 + THREADS // 100)
        ]
        method = f"/{crypto_pb2.DESCRIPTOR.services_by_name['CryptoService'].full_name}/Sign"
        calls = [
            channels[number % len(channels)]
            .stream_unary(method, request_serializer=bytes, response_deserializer=bytes)
            .future(nothing(), timeout=2 * WAIT_SECONDS)
            for number in range(THREADS)
        ]
        try:
            with clients.connect("modest", partition=PARTITION, timeout_seconds=WAIT_SECONDS) as modest:
                assert len(modest.sign("keys/overload-ec", "ES256", bytes(32))) == 64
            assert pool.status(PARTITION) is not None
            codes = Counter(call.code() for call in calls)
        finally:
            go_on.set()
            for channel in channels:
                channel.close()
        if endpoint == entry.token_endpoint:
            assert codes == {grpc.StatusCode.UNAUTHENTICATED: THREADS}
        else:
            assert codes[grpc.StatusCode.CANCELLED] <= limits.REQUESTS_READ_MAX * 3 // 4
            assert codes[grpc.StatusCode.CANCELLED] + codes[grpc.StatusCode.RESOURCE_EXHAUSTED] == THREADS
        go_on.clear()


def test_answers_that_nobody_reads_do_not_fill_the_memory(pool: RunningPool, clients: Clients) -> None:
    """A hundred answers of almost three mebibytes, none read: most are refused, others are served (G8)."""
    connection = pool.connection
    connection.clients["greedy"] = clients.files("greedy")
    entry = connection.partitions[PARTITION]
    with pool.client() as client:
        client.create_key("overload-oct", key_type=keys_pb2.KEY_TYPE_OCT, size_bits=256)
    items = [crypto_pb2.Plaintext(plaintext=bytes(11 * 1024))] * limits.BATCH_ITEMS_MAX
    request = crypto_pb2.EncryptRequest(name="keys/overload-oct", algorithm="A256GCM", items=items)
    method = f"/{crypto_pb2.DESCRIPTOR.services_by_name['CryptoService'].full_name}/Encrypt"
    options = [
        *OPTIONS,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 64 * 1024),
    ]
    with grpc.secure_channel(entry.endpoint, credentials(connection, "greedy"), options=options) as channel:
        call: Any = channel.unary_stream(
            method, request_serializer=crypto_pb2.EncryptRequest.SerializeToString
        )
        before = metric(pool, "process_resident_memory_bytes")
        refused = threading.Semaphore(0)
        unread = []
        for _ in range(100):
            unread.append(call(request, timeout=2 * WAIT_SECONDS))
            unread[-1].add_callback(refused.release)
        for _ in range(40):
            assert refused.acquire(timeout=WAIT_SECONDS), "most are refused"
        with clients.connect("modest", partition=PARTITION, timeout_seconds=WAIT_SECONDS) as modest:
            assert len(modest.sign("keys/overload-ec", "ES256", bytes(32))) == 64
        assert metric(pool, "process_resident_memory_bytes") - before < 256 * 1024 * 1024
        for left in unread:
            left.cancel()


def test_a_node_that_sends_no_requests_keeps_no_other_node_from_asking(pool: RunningPool) -> None:
    """The planes inside of the pool have few threads, and no node agent can hold them all (G5, G8)."""
    nodes = [
        settings.load(settings.NodeSettings, pool.directory / f"nodes/{index}/node.json") for index in (1, 2)
    ]
    (endpoint,) = set(nodes[0].peer_node_endpoints) & set(nodes[1].peer_node_endpoints)

    def channel(node: settings.NodeSettings) -> Any:
        files = (node.identity.ca_file, node.identity.key_file, node.identity.certificate_file)
        return grpc.secure_channel(
            endpoint, grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in files))
        )

    go_on = threading.Event()

    def nothing() -> Iterator[bytes]:
        go_on.wait(2 * WAIT_SECONDS)
        yield from ()

    method = f"/{node_pb2.DESCRIPTOR.services_by_name['NodeService'].full_name}/GetAdmission"
    with channel(nodes[1]) as silent, channel(nodes[0]) as other:
        calls = [
            silent.stream_unary(method, request_serializer=bytes, response_deserializer=bytes).future(
                nothing(), timeout=2 * WAIT_SECONDS
            )
            for _ in range(16)
        ]
        ended = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: ended.release())
        for _ in range(14):
            assert ended.acquire(timeout=WAIT_SECONDS), "all but two were refused"
        asked = node_pb2.GetAdmissionRequest()
        node_pb2_grpc.NodeServiceStub(other).GetAdmission(asked, timeout=WAIT_SECONDS)
        go_on.set()


def test_our_client_comes_back_when_it_is_asked_to(pool: RunningPool, clients: Clients) -> None:
    """Many calls at once through the client library all succeed; it counts how often it had to wait."""
    with clients.connect("modest", timeout_seconds=WAIT_SECONDS) as modest:

        def sign(_: int) -> int:
            try:
                return len(modest.sign_batch("keys/overload-rsa", "RS256", [bytes(32)] * 8))
            except Overloaded:
                return 0

        with ThreadPoolExecutor(120) as callers:
            answers = list(callers.map(sign, range(360)))
        assert answers == [8] * 360
        assert modest.retry_counts.overload_pauses <= modest.retry_counts.overloaded
