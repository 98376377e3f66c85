"""Answers that nobody reads: counted over real gRPC, bounded, and ended in time (G8)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from hsm_pool import limits
from hsm_pool.errors import Overloaded
from hsm_pool.net.answers import UnreadAnswers
from hsm_pool.net.shares import Shares
from tests.running_pool import until

_SECONDS = 60.0
_ANSWER_BYTES = 1024 * 1024


class Answer:
    """An answer of a size."""

    def __init__(self, octets: int) -> None:
        self._octets = octets

    def ByteSize(self) -> int:  # noqa: N802
        return self._octets


class Server(grpc.GenericRpcHandler):
    """Answers any call of any principal with a mebibyte."""

    def __init__(self, seconds_max: float) -> None:
        self.answers = UnreadAnswers(8 * _ANSWER_BYTES, 4 * _ANSWER_BYTES, seconds_max)
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        options = (
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 64 * 1024),
            ("grpc.max_receive_message_length", -1),
        )
        self.channel: Any = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)

    def service(self, _: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._call, None, None)

    def _call(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            self.answers.check(request.decode())
        except Overloaded:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "")
        self.answers.hold(request.decode(), Answer(_ANSWER_BYTES), context)
        return bytes(_ANSWER_BYTES)

    def read(self, principal: str) -> int:
        """Call and read the answer."""
        return len(self.channel.unary_unary("/test.Test/Call")(principal.encode(), timeout=_SECONDS))

    def leave_unread(self, principal: str) -> Any:
        """Call, and read nothing."""
        return self.channel.unary_stream("/test.Test/Call")(principal.encode(), timeout=_SECONDS)

    def has_room(self, principal: str) -> bool:
        try:
            self.answers.check(principal)
        except Overloaded:
            return False
        return True

    def close(self) -> None:
        self.channel.close()
        self._server.stop(0).wait()
        self.answers.close()


@pytest.fixture(params=[_SECONDS])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(request.param)
    yield made
    made.close()


def test_who_leaves_his_answers_unread_is_refused_and_nobody_else(server: Server) -> None:
    for _ in range(20):
        assert server.read("reader") == _ANSWER_BYTES
    left = [server.leave_unread("slow") for _ in range(4)]
    until(lambda: not server.has_room("slow"), _SECONDS, "the bound")
    with pytest.raises(grpc.RpcError) as refused:
        server.read("slow")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.read("reader") == _ANSWER_BYTES
    for call in left:
        call.cancel()
    until(lambda: server.has_room("slow"), _SECONDS, "room, once they are gone")
    assert server.read("slow") == _ANSWER_BYTES


@pytest.mark.parametrize("server", [0.4], indirect=True)
def test_an_answer_that_is_never_read_is_given_up(server: Server) -> None:
    left = [server.leave_unread("slow") for _ in range(4)]
    until(lambda: not server.has_room("slow"), _SECONDS, "the bound")
    until(lambda: server.has_room("slow"), _SECONDS, "room, though nobody read anything")
    assert left


def test_small_answers_are_not_counted() -> None:
    answers = UnreadAnswers(1, 1, _SECONDS)
    answers.hold("one", Answer(limits.UNREAD_BYTES_COUNTED - 1), None)  # type: ignore[arg-type]
    answers.check("one")
    answers.close()


def test_shares_are_bounded_and_come_back() -> None:
    shares = Shares(4, 3)
    assert [shares.take("a", 1) for _ in range(4)] == [True, True, True, False]
    assert shares.take("b", 1)
    assert not shares.take("b", 1)
    shares.give_back("a", 2)
    assert shares.take("b", 2)
    shares.add("c", 5)
    assert not any(shares.has_room(name) for name in "abc")
    shares.give_back("c", 5)
    shares.give_back("b", 1)
    assert shares.has_room("a")
