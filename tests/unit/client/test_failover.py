"""Protocol tests of both clients against scripted servers: where a call goes, how often, what is raised.

The servers are no pool (see protocol_server.py).
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from hsm_pool import errors
from hsm_pool.client import calls
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.errors import CallIndefinite, PoolUnreachable, SignatureInvalid
from hsm_pool.client.pool import Pool
from hsm_pool.client.retry import UNHEALTHY_SECONDS
from hsm_pool.errors import BY_REASON, AvailabilityError, InternalError, MHSMError
from hsm_pool.net.interceptors import error_status
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2
from tests.unit.client.protocol_server import Servers, fail_with, refuse

DIGEST = bytes(32)
SIGN = ("k", "ES256", DIGEST)
AES = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}
Call = Callable[..., Any]


@pytest.fixture(params=["sync", "asyncio"])
def open_client(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Callable[..., Call]]:
    """Return open(**options) -> call(method, ...), for either client."""
    runner = asyncio.Runner()
    opened: list[Any] = []

    def open_(connection: Any = None, client: str = "application", **options: Any) -> Call:
        async def make_async() -> AsyncPool:
            return AsyncPool(connection or servers.connection, client, **options)

        sync = request.param == "sync"
        pool: Any = (
            Pool(connection or servers.connection, client, **options) if sync else runner.run(make_async())
        )
        opened.append(pool)

        async def collect(method: str, *arguments: Any, **fields: Any) -> Any:
            result = getattr(pool, method)(*arguments, **fields)
            return [item async for item in result] if inspect.isasyncgen(result) else await result

        def call(method: str, *arguments: Any, **fields: Any) -> Any:
            if not sync:
                return runner.run(collect(method, *arguments, **fields))
            result = getattr(pool, method)(*arguments, **fields)
            return list(result) if inspect.isgenerator(result) else result

        return call

    yield open_
    for pool in opened:
        closing = pool.close()
        if closing is not None:
            runner.run(closing)
    runner.close()


def test_partitions_take_turns(servers: Servers, open_client: Callable[..., Call]) -> None:
    call = open_client()
    for _ in range(6):
        call("sign", *SIGN)
    assert servers.count("Sign") == [2, 2, 2]


def test_a_request_id_is_the_same_over_all_tries_of_one_call_and_of_no_other(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    """G1/G2: only this makes it safe to repeat a mutation whose outcome is unknown."""
    call = open_client()
    servers.partitions[0].script = fail_with(grpc.StatusCode.UNAVAILABLE)
    servers.partitions[1].script = refuse(errors.CommitUnknown)
    for index in range(2):
        call("create_key", f"k{index}", **AES)
    call("create_key", "given", request_id="d9b0f1a8-0000-4000-8000-000000000000", **AES)
    ids: dict[str, set[str]] = {}
    tries: dict[str, int] = {}
    for partition in servers.partitions:
        for request in partition.requests("CreateKey"):
            ids.setdefault(request.key_id, set()).add(request.request_id)
            tries[request.key_id] = tries.get(request.key_id, 0) + 1
    assert tries["k0"] == 3
    assert all(len(used) == 1 for used in ids.values())
    assert len(set.union(*ids.values())) == 3
    assert ids["given"] == {"d9b0f1a8-0000-4000-8000-000000000000"}


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_only_what_another_partition_may_answer_otherwise_is_tried_again(
    servers: Servers, open_client: Callable[..., Call], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By enumeration: 1 try for a refusal, 3 for what each partition says of the pool, more for the rest."""
    kind = BY_REASON[reason]
    call = open_client()
    for index in range(3):
        call("partition_status", index)  # connected: the short deadline below is all for tries
    seconds = 0.15 if kind is errors.Overloaded else 0.6  # on a busy machine one try may take 50 ms
    monkeypatch.setitem(calls.CALL_SECONDS, "mutation", seconds)
    servers.script(refuse(kind))
    with pytest.raises(MHSMError) as raised:
        call("create_key", "k", **AES)
    assert type(raised.value) is kind
    tries = sum(servers.count("CreateKey"))
    if issubclass(kind, AvailabilityError | InternalError):
        # An overloaded partition asks for a longer pause than this deadline has left.
        assert tries == 3 if kind is errors.Overloaded else tries > 3
    else:
        assert tries == (3 if kind in {errors.NotActivated, errors.PoolLocked} else 1)


def test_an_overloaded_pool_is_left_alone_as_long_as_it_asks(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    """RetryInfo: each partition refuses once and says when; no partition is asked again before."""
    seen: list[float] = []

    def script(method: str, _: Any, context: grpc.ServicerContext) -> None:
        seen.append(time.monotonic())
        if len(seen) <= 3:
            refused = errors.Overloaded("too many").retry_after(0.3)
            context.abort_with_status(rpc_status.to_status(error_status(refused)))

    call = open_client()
    servers.script(script)
    call("sign", *SIGN)
    assert servers.count("Sign") in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    assert seen[3] - seen[2] >= 0.3


def test_a_call_ends_at_its_deadline(servers: Servers, open_client: Callable[..., Call]) -> None:
    servers.script(refuse(errors.NotFresh))
    call = open_client(timeout_seconds=0.8)
    began = time.monotonic()
    with pytest.raises(errors.NotFresh):
        call("sign", *SIGN)
    assert time.monotonic() - began < 2.0
    assert sum(servers.count("Sign")) < 60, "tries are spaced by growing pauses"


def test_a_silent_partition_costs_one_try_and_is_asked_for_its_health_before_it_is_used_again(
    servers: Servers, open_client: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(calls.ATTEMPT_SECONDS, "crypto", 0.4)
    silent = servers.partitions[1]
    silent.script = silent.hang
    call = open_client()
    while not silent.entered.is_set():
        call("sign", *SIGN)
    marked = time.monotonic()
    calls_made = 0
    while time.monotonic() < marked + UNHEALTHY_SECONDS / 2:
        call("sign", *SIGN)
        calls_made += 1
    assert calls_made > 10
    assert servers.count("Sign")[1] == 1
    silent.release.set()
    deadline = time.monotonic() + 10
    while servers.count("Sign")[1] == 1 and time.monotonic() < deadline:
        call("sign", *SIGN)
    assert [method for method, _ in silent.calls] == ["Sign", "Check", "Sign"]


@pytest.fixture
def mute_endpoint() -> Iterator[str]:
    """A port that accepts connections and never says a word: a process stopped before the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_partition_without_a_handshake_was_sent_nothing(
    servers: Servers, open_client: Callable[..., Call], mute_endpoint: str
) -> None:
    connection = servers.at({0: mute_endpoint})
    open_client(connection)("create_key", "k", **AES)
    assert servers.count("CreateKey")[0] == 0
    assert sum(servers.count("CreateKey")) == 1
    everywhere = servers.at(dict.fromkeys(range(3), mute_endpoint))
    with pytest.raises((PoolUnreachable, CallIndefinite)):
        open_client(everywhere, timeout_seconds=1.5)("create_key", "k", **AES)


def test_an_identity_of_another_authority_is_not_let_in(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    with pytest.raises((PoolUnreachable, CallIndefinite)):
        open_client(client="foreigner", timeout_seconds=1.0)("create_key", "k", **AES)
    assert servers.count("CreateKey") == [0, 0, 0]


class _Cutter:
    """Forwards one connection, and cuts it with a reset."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._port = port
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        inner, _ = self._listener.accept()
        outer = socket.create_connection(("127.0.0.1", self._port))
        self._ends = [inner, outer]
        for source, target in ((inner, outer), (outer, inner)):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while octets := source.recv(65536):
                target.sendall(octets)
        except OSError:
            return

    def cut(self) -> None:
        self._listener.close()
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RD)  # wakes the pump, which holds the socket open
            end.close()


def test_a_connection_cut_after_the_request_leaves_the_outcome_open(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    """A definite error here would be a lie: the server has the request (Jepsen's rule)."""
    target = servers.partitions[0]
    target.script = target.hang
    cutter = _Cutter(target.port)

    def cut_when_entered() -> None:
        target.entered.wait(10)
        cutter.cut()

    thread = threading.Thread(target=cut_when_entered)
    thread.start()
    with pytest.raises(CallIndefinite) as raised:
        open_client(servers.at({0: cutter.endpoint}), partition=0)("create_key", "k", **AES)
    thread.join(10)
    assert not raised.value.definite
    assert servers.count("CreateKey") == [1, 0, 0]


def test_a_ceremony_is_begun_once_at_one_partition(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    """G4: a ceremony lives in one partition; whether a lost answer began one is for the caller to ask."""
    servers.partitions[1].script = fail_with(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(CallIndefinite):
        open_client()("download_security_domain", [b"x"], 2, None, 1)
    assert servers.count("DownloadSecurityDomain") == [0, 1, 0]


def test_a_pinned_client_tries_once_and_nowhere_else(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    call = open_client(partition=2)
    servers.partitions[2].script = refuse(errors.NotFresh)
    with pytest.raises(errors.NotFresh):
        call("sign", *SIGN)
    assert servers.count("Sign") == [0, 0, 1]
    batch = crypto_pb2.StreamOperationsRequest(correlation_id=7)
    assert [response.correlation_id for response in call("stream", [batch])] == [7]
    assert servers.count("StreamOperations") == [0, 0, 1], "a stream goes to the pinned partition too"


def test_a_timeout_bounds_the_calls_that_name_a_partition(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    servers.script(servers.partitions[0].hang)
    call = open_client(timeout_seconds=0.3)
    for method, arguments in (("partition_status", (1,)), ("init_recovery", (1,))):
        began = time.monotonic()
        with pytest.raises(CallIndefinite):
            call(method, *arguments)
        assert time.monotonic() - began < 1.5, method


def test_a_signature_that_does_not_verify_is_an_error_after_one_try(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    call = open_client()
    with pytest.raises(SignatureInvalid) as raised:
        call("verify", "k", "ES256", DIGEST, bytes(64))
    assert raised.value.definite
    assert sum(servers.count("Verify")) == 1
    assert call("verify_batch", "k", "ES256", [(DIGEST, bytes(64))] * 2) == [False, False]


def test_an_answer_with_too_few_items_never_verifies(
    servers: Servers, open_client: Callable[..., Call]
) -> None:
    for valid in ([], [True, True], [True, False]):
        servers.script(lambda *_, valid=valid: crypto_pb2.VerifyResponse(valid=valid))
        with pytest.raises(SignatureInvalid):
            open_client()("verify", "k", "ES256", DIGEST, bytes(64))


def test_keys_are_wrapped_in_batches(servers: Servers, open_client: Callable[..., Call]) -> None:
    call = open_client()
    assert call("wrap_key_batch", "k", "A256KW", [b"a", b"b"]) == [b"a", b"b"]
    assert call("unwrap_key_batch", "k", "A256KW", [b"a", b"b"]) == [b"a", b"b"]
    assert sum(servers.count("WrapKey")) == sum(servers.count("UnwrapKey")) == 1


def _endless() -> Iterator[crypto_pb2.StreamOperationsRequest]:
    number = 0
    while True:
        number += 1
        yield crypto_pb2.StreamOperationsRequest(correlation_id=number)


def test_a_stream_that_is_left_early_ends_at_the_server(servers: Servers) -> None:
    """An open stream keeps one of the few threads that a partition has for streams."""
    with Pool(servers.connection) as pool:
        stream = pool.stream(_endless(), partition=0)
        assert next(stream).correlation_id == 1
        stream.close()
        assert servers.partitions[0].stream_ended.wait(5)

    async def leave() -> None:
        async with AsyncPool(servers.connection) as pool:
            stream = pool.stream(_endless(), partition=1)
            assert (await anext(stream)).correlation_id == 1
            await stream.aclose()
            assert await asyncio.to_thread(servers.partitions[1].stream_ended.wait, 5)

    asyncio.run(leave())


def test_a_call_does_not_show_the_key_material_it_carries() -> None:
    """G3: whoever logs a call, or a traceback with its locals, logs no key."""
    shown = repr(calls.import_key("k", octets=b"sixteen-secret-b"))
    assert "sixteen-secret" not in shown
    assert "ImportKey" in shown
