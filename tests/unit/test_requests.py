"""The one message of a unary call over real gRPC: read in bounded time, or a typed error (G8)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from hsm_pool import limits
from hsm_pool.errors import InvalidField, MHSMError, Overloaded, PayloadTooLarge, RequestLost
from hsm_pool.net.requests import RequestReader, parsed

_SECONDS = 60.0
_METHOD = "/test.Test/Unary"


class Server(grpc.GenericRpcHandler):
    """Reads the requests of any method with few threads; notes what it got."""

    def __init__(self) -> None:
        self.reader = RequestReader(places=3, places_of_principal=2, seconds_max=0.2)
        self.got: list[bytes | MHSMError] = []
        self.noted = threading.Semaphore(0)
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.channel: Any = grpc.insecure_channel(f"127.0.0.1:{port}")

    def service(self, _: Any) -> Any:
        return grpc.stream_unary_rpc_method_handler(self._call, None, None)

    def _call(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            principal = dict(context.invocation_metadata()).get("principal", "one")
            octets = self.reader.read(str(principal), messages, context)
            self.got.append(parsed(octets, bytes))
            return b"answer"
        except MHSMError as error:
            self.got.append(error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)
        finally:
            self.noted.release()

    def close(self) -> None:
        self.channel.close()
        self._server.stop(0).wait()
        self.reader.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_a_unary_client_sees_no_difference(server: Server) -> None:
    for request in (b"", b"request", bytes(limits.REQUEST_BYTES_MAX)):
        assert server.channel.unary_unary(_METHOD)(request, timeout=_SECONDS) == b"answer"
        assert server.got.pop() == request


def test_calls_that_never_send_their_request_end_and_leave_their_threads(server: Server) -> None:
    """More silent calls than threads: all end long before their deadlines, and others are served."""
    silent = threading.Event()
    ended: list[grpc.StatusCode] = []

    def nothing() -> Iterator[bytes]:
        silent.wait(_SECONDS)
        yield from ()

    for _ in range(3):
        calls = [
            server.channel.stream_unary(_METHOD).future(nothing(), timeout=_SECONDS / 3) for _ in range(2)
        ]
        ended += [call.code() for call in calls]
    assert ended == [grpc.StatusCode.CANCELLED] * 6
    assert server.channel.unary_unary(_METHOD)(b"request", timeout=_SECONDS) == b"answer"
    silent.set()
    assert [type(entry) for entry in server.got] == [RequestLost] * 6 + [bytes]


def test_a_call_without_a_request_and_one_too_large_are_refused(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        server.channel.stream_unary(_METHOD)(iter(()), timeout=_SECONDS)
    assert refused.value.details() == InvalidField.reason
    with pytest.raises(grpc.RpcError) as refused:
        server.channel.unary_unary(_METHOD)(bytes(limits.REQUEST_BYTES_MAX + 1), timeout=_SECONDS)
    assert refused.value.details() == PayloadTooLarge.reason
    with pytest.raises(grpc.RpcError):
        server.channel.unary_unary(_METHOD)(bytes(limits.MESSAGE_BYTES_MAX + 1), timeout=_SECONDS)
    for _ in range(3):
        assert server.noted.acquire(timeout=_SECONDS)
    # Of the third one gRPC itself says that it is too large: what was read is no request.
    assert [type(entry) for entry in server.got[:2]] == [InvalidField, PayloadTooLarge]
    assert isinstance(server.got[2], RequestLost | InvalidField)


def test_a_caller_that_leaves_leaves_no_thread_behind(server: Server) -> None:
    for _ in range(4):
        begun = threading.Event()

        def request(begun: threading.Event = begun) -> Iterator[bytes]:
            begun.set()
            threading.Event().wait(1.0)
            yield from ()

        call = server.channel.stream_unary(_METHOD).future(request())
        assert begun.wait(_SECONDS)
        call.cancel()
    assert server.channel.unary_unary(_METHOD)(b"request", timeout=_SECONDS) == b"answer"


def test_whoever_sends_no_requests_keeps_only_himself_from_calling(server: Server) -> None:
    """More silent calls than threads of one: another one is served."""
    go_on = threading.Event()
    server.reader.close()  # nobody ends what is late

    def nothing() -> Iterator[bytes]:
        go_on.wait(_SECONDS)
        yield from ()

    def silent(principal: str) -> Any:
        metadata = (("principal", principal),)
        return server.channel.stream_unary(_METHOD).future(nothing(), timeout=_SECONDS, metadata=metadata)

    calls = [silent("one") for _ in range(8)]
    for _ in range(6):
        assert server.noted.acquire(timeout=_SECONDS)
    assert [type(entry) for entry in server.got] == [Overloaded] * 6
    assert server.channel.unary_unary(_METHOD)(b"request", timeout=_SECONDS, metadata=(("principal", "two"),))
    go_on.set()
    for call in calls:
        call.cancel()
