"""G5: a hostile controller, with the real one's certificate, sends whatever it likes in any order."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import hypothesis
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.core.membership import INCARNATIONS_PER_ADMISSION
from hsm_pool.net.enclave_guard import check
from mhsm.enclave.v1 import enclave_pb2
from mhsm.keys.v1 import keys_pb2
from tests.fabric_access import DRAINED, SERVING, Fabric, FloorWatcher
from tests.running_pool import RunningPool, until

pytestmark = [pytest.mark.pool, pytest.mark.timeout(3000)]

SERVICE = "/mhsm.enclave.v1.EnclaveService/"
VERBS = tuple(method.name for method in enclave_pb2.DESCRIPTOR.services_by_name["EnclaveService"].methods)
REPLIES = {
    **{SERVICE + verb: getattr(enclave_pb2, f"{verb}Response") for verb in VERBS},
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckResponse,
}
REQUESTS = {SERVICE + verb: getattr(enclave_pb2, f"{verb}Request") for verb in VERBS}
FOREIGN = (
    SERVICE + "Activate",
    SERVICE,
    "/mhsm.keys.v1.KeyService/GetKey",
    "/mhsm.crypto.v1.CryptoService/Sign",
    "/mhsm.peer.v1.PeerService/BeginHeal",
    "/mhsm.node.v1.NodeService/NotifyExit",
    "/mhsm.security_domain.v1.SecurityDomainService/InitRecovery",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
)
STARTING = (
    enclave_pb2.PARTITION_STATE_STARTING,
    enclave_pb2.PARTITION_STATE_HEALING,
    # Nobody gives keys to one in whose place a new one was admitted, until its agent has started that.
    enclave_pb2.PARTITION_STATE_LOCKED,
)
GRPC_OWN_TEXTS = {"", "Method not found!", "Concurrent RPC limit exceeded!"}
"""What gRPC itself says, before any code of ours: fixed texts, and those of the connection."""

STAMPS = (*["fresh"] * 7, "repeat", "old", "void", "far", "huge", "none")


def mostly(usual: object, strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Return a strategy that gives the usual value three times of four."""
    return st.integers(0, 3).flatmap(lambda drawn: strategy if drawn == 3 else st.just(usual))


METADATA = mostly(
    (),
    st.one_of(
        st.tuples(
            st.tuples(
                st.from_regex(r"[a-z]{1,12}", fullmatch=True), st.from_regex(r"[ -~]{0,20}", fullmatch=True)
            )
        ),
        st.tuples(st.tuples(st.just("x-note-bin"), st.binary(max_size=50))),
    ),
)
MUTATION = mostly(
    None,
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 400)),
        st.tuples(st.just("cut"), st.integers(0, 30)),
        st.tuples(st.just("append"), st.binary(max_size=60)),
        st.tuples(st.just("repeat"), st.integers(2, 40)),
        st.tuples(st.just("replace"), st.binary(max_size=80)),
    ),
)
METHODS = [*(SERVICE + verb for verb in VERBS * 5), *REPLIES, *FOREIGN]
CALL = st.tuples(
    st.just("call"),
    st.sampled_from(METHODS),
    st.tuples(st.sampled_from(STAMPS), st.integers(0, 3)),
    MUTATION,
    METADATA,
)
JUNK = st.tuples(st.just("junk"), st.booleans(), st.lists(st.binary(max_size=200), min_size=1, max_size=4))
ACTION = st.tuples(st.integers(0, 2), st.integers(0, 11).flatmap(lambda drawn: CALL if drawn else JUNK))


@dataclass
class Hostile:
    """Sends actions and looks at every answer."""

    pool: RunningPool
    fabric: Fabric
    generator: random.Random
    sent: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Restart commands that may have been obeyed, by partition."""
    states: set[int] = field(default_factory=set)
    """States that the partitions said they were in."""
    last: dict[str, int] = field(default_factory=lambda: {"counter": 1, "expires_ms": 1})
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of all that is noted here: partitions are attacked at the same time."""

    def act_on_all(self, actions: list[tuple[int, tuple]]) -> None:
        """Send actions, to each partition in their order, to all partitions at once."""

        def act_on(index: int) -> None:
            for chosen, action in actions:
                if chosen == index:
                    self.act(index, action)

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(act_on, range(3)))

    def act(self, index: int, action: tuple) -> None:
        """Send one action."""
        with self.lock:
            self.sent += 1
        if action[0] == "junk":
            self.junk(index, action[1], action[2])
        else:
            self.call(index, *action[1:])

    def call(
        self, index: int, method: str, content: tuple[str, int], mutation: tuple | None, metadata: tuple
    ) -> None:
        """Call any method with any octets."""
        octets = self.mutated(self.request(method, *content), mutation)
        try:
            answer = self.fabric.channels[index].unary_unary(method)(octets, timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code().name
            connection_lost = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
            assert connection_lost or error.details() in GRPC_OWN_TEXTS, (method, code, error.details())
            assert not [key for key, _ in error.trailing_metadata() or () if not key.startswith("grpc")]
            assert code not in {"INTERNAL", "UNKNOWN"}, method
            if connection_lost:
                self.note_restart(index, method, octets)
        else:
            code = "OK"
            assert method in REPLIES, f"{method} answered"
            assert len(answer) <= limits.ENCLAVE_MESSAGE_BYTES_MAX
            reply = REPLIES[method].FromString(answer)
            check(reply)
            if method.startswith(SERVICE):
                self.states.add(reply.state)
            self.note_restart(index, method, octets)
        self.note(code)

    def note(self, code: str) -> None:
        """Count an answer."""
        with self.lock:
            self.codes[code] = self.codes.get(code, 0) + 1

    def note_restart(self, index: int, method: str, octets: bytes) -> None:
        """Note a command after which a process may end: of who was asked, or of who is replaced."""
        restarted = None
        if method == SERVICE + "Restart":
            restarted = index
        elif method == SERVICE + "Heal":
            with contextlib.suppress(DecodeError):
                restarted = enclave_pb2.HealRequest.FromString(octets).index % 3
        if restarted is not None:
            with self.lock:
                self.restarts[restarted] += 1

    def request(self, method: str, stamp: str, number: int) -> bytes:
        """Return the octets of a command with a good or a bad stamp; its other fields hold the number."""
        now_ms = time.time_ns() // 1_000_000
        match stamp:
            case "fresh":
                with self.lock:
                    self.last = fields = self.fabric.stamp()
            case "repeat":
                fields = self.last
            case "old":
                fields = {"counter": max(1, self.last["counter"] - 1000), "expires_ms": now_ms + 1000}
            case "void":
                fields = {"counter": now_ms, "expires_ms": now_ms - 1}
            case "far":
                fields = {"counter": now_ms, "expires_ms": now_ms + 10**9}
            case "huge":
                fields = {"counter": 2**53 - 1, "expires_ms": now_ms + 10_000}
            case _:
                return b""
        kind = REQUESTS.get(method, enclave_pb2.DrainRequest)
        others = {field.name for field in kind.DESCRIPTOR.fields} - {"counter", "expires_ms"}
        if kind is not enclave_pb2.GetStatusRequest:
            return kind(**fields, **dict.fromkeys(others, number)).SerializeToString()
        return b""

    @staticmethod
    def mutated(octets: bytes, mutation: tuple | None) -> bytes:
        """Return changed octets."""
        if mutation is None:
            return octets
        kind, value = mutation
        match kind:
            case "flip" if octets:
                position = value % (8 * len(octets))
                changed = bytearray(octets)
                changed[position // 8] ^= 1 << position % 8
                return bytes(changed)
            case "cut":
                return octets[:value]
            case "append":
                return octets + bytes(value)
            case "repeat":
                return octets * int(value)
            case "replace":
                return bytes(value)
        return octets

    def junk(self, index: int, preface: bool, chunks: list[bytes]) -> None:
        """Speak TLS with the controller's certificate, and no HTTP/2 then, or bad HTTP/2."""
        files = self.pool.connection.fabric_controller
        context = ssl.create_default_context(cafile=files["ca_file"])
        context.load_cert_chain(files["certificate_file"], files["key_file"])
        context.set_alpn_protocols(["h2"])
        host, _, port = self.pool.connection.partitions[index].enclave_endpoint.rpartition(":")
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            if preface:
                connection.sendall(
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
                )
            for chunk in chunks:
                if preface and self.generator.random() < 0.5:
                    # A frame with a true length, of any type and flags, on any stream (RFC 9113, 4.1).
                    kind = self.generator.randrange(12)
                    head = len(chunk).to_bytes(3, "big") + bytes([kind, self.generator.randrange(256)])
                    chunk = head + self.generator.randrange(2**31).to_bytes(4, "big") + chunk  # noqa: PLW2901
                connection.sendall(chunk)
        self.note("junk")


@pytest.fixture
def hostile(pool: RunningPool, seed: int) -> Iterator[Hostile]:
    pool.await_states(["SERVING"] * 3)
    fabric = Fabric(pool)
    yield Hostile(pool, fabric, random.Random(seed))
    fabric.close()


def problems(pool: RunningPool) -> list[str]:
    """Return what the partitions' logs say of threads and handlers that failed."""
    found = []
    for path in pool.directory.glob("nodes/*/logs/partition*.log"):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line).get("event") in {"internal error", "a thread failed"}:
                    found.append(line)
    return found


def test_g5_a_hostile_controller_gets_nothing_and_breaks_nothing(
    pool: RunningPool,
    hostile: Hostile,
    seed: int,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No crash, no illegal state, never fewer than two serving, no reply over the ceiling, no text.

    The commands among the calls are real ones: partitions are drained, restarted and resumed all the time.
    """
    wanted = 100_000 if request.config.getoption("--full") else 3_000
    size = 100
    before = [pool.status(index).incarnation for index in range(3)]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=wanted // size,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(st.lists(ACTION, min_size=size, max_size=size))
    def send(actions: list[tuple]) -> None:
        hostile.act_on_all(actions)

    watcher = FloorWatcher(hostile.fabric)
    try:
        send()
    finally:
        watcher.close()
    assert hostile.sent >= wanted
    assert watcher.fewest == 2, "fewer than two were serving, or none was ever drained"
    assert watcher.looks > 30
    assert hostile.states <= {DRAINED, SERVING, *STARTING}
    assert problems(pool) == []
    until(lambda: all(pool.status(index) for index in range(3)), 60, "all answer")
    for index in range(3):
        # A replacement begins a new count.
        replacements, starts = divmod(pool.status(index).incarnation, INCARNATIONS_PER_ADMISSION)
        obeyed = starts if replacements else starts - before[index]
        assert obeyed <= hostile.restarts[index], "a process ended that nobody restarted"
    with capsys.disabled():
        print(f"\nhostile calls: {hostile.sent}, answers: {hostile.codes}, restarts: {hostile.restarts}")
    # It was a real attack: commands were obeyed, and refused for each reason.
    for code in ("OK", "INVALID_ARGUMENT", "ABORTED", "FAILED_PRECONDITION", "UNIMPLEMENTED", "junk"):
        assert hostile.codes.get(code), (code, hostile.codes)
    assert sum(hostile.restarts) > 0
    for index in range(3):
        until(
            lambda i=index: resumed(hostile.fabric, i),  # type: ignore[misc]
            120,
            lambda: f"everybody serves again, but: {pool.states()}",
        )
    pool.await_states(["SERVING"] * 3)
    with pool.client() as client:
        client.create_key("after-the-attack", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
        client.sign("keys/after-the-attack", "ES256", bytes(32))


def resumed(fabric: Fabric, index: int) -> bool:
    """Resume a drained partition, or end a replacement that was begun; return whether it serves.

    While a replacement is half done, nobody gives keys to a process of the old partition.
    """
    with contextlib.suppress(grpc.RpcError):
        state = fabric.state(index)
        if state != SERVING and not (state == DRAINED and fabric.send("Resume", index) == "OK"):
            for helper in {0, 1, 2} - {index}:
                fabric.send("Heal", helper, **fabric.stamp(), index=index)
        return fabric.serves(index)
    return False
