"""The client's own decisions: when to try again, where, and what an error means."""

from __future__ import annotations

import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_status import rpc_status

from hsm_pool import errors, limits
from hsm_pool.client.aio import AsyncPool
from hsm_pool.client.connection import NoConnection, default_data_directory, load_connection
from hsm_pool.client.errors import CallIndefinite, CallRefused, PoolUnreachable, from_rpc
from hsm_pool.client.pool import Pool
from hsm_pool.client.retry import UNHEALTHY_SECONDS, Attempts, RetryCounts, Rotation, retriable
from hsm_pool.errors import BY_REASON, MHSMError
from hsm_pool.net.interceptors import error_status


def make(kind: type[MHSMError]) -> MHSMError:
    error = kind.__new__(kind)
    MHSMError.__init__(error, "why", field="x")
    return error


@pytest.fixture(scope="module")
def server_and_channel():
    """A bare gRPC server that answers every call with the error named in the request."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        name = request.decode()
        if name in BY_REASON:
            context.abort_with_status(rpc_status.to_status(error_status(make(BY_REASON[name]))))
        if name.startswith("retry:"):
            refused = errors.Overloaded("why")
            refused.retry_seconds = float(name.removeprefix("retry:"))
            context.abort_with_status(rpc_status.to_status(error_status(refused)))
        context.abort(getattr(grpc.StatusCode, name.removeprefix("code:")), "no details")
        return b""

    handler = grpc.method_handlers_generic_handler(
        "test.Service", {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(0)


def received(channel: grpc.Channel, name: str) -> MHSMError:
    with pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/test.Service/Call")(name.encode(), timeout=5)
    return from_rpc(failed.value)


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_typed_error_crosses_the_wire(server_and_channel, reason: str) -> None:
    error = received(server_and_channel, reason)
    assert type(error) is BY_REASON[reason]
    if reason != "DECRYPTION_FAILED":
        assert error.message == "why"
    assert error.definite == BY_REASON[reason].definite
    assert error.metadata == {"field": "x"}


@pytest.mark.parametrize(
    ("code", "kind", "definite"),
    [
        ("DEADLINE_EXCEEDED", CallIndefinite, False),
        ("CANCELLED", CallIndefinite, False),
        ("INTERNAL", CallIndefinite, False),
        ("UNKNOWN", CallIndefinite, False),
        ("UNAVAILABLE", CallIndefinite, False),
        ("UNIMPLEMENTED", CallRefused, True),
        ("PERMISSION_DENIED", CallRefused, True),
    ],
)
def test_errors_without_a_reason_are_definite_only_when_nothing_was_done(
    server_and_channel, code: str, kind: type[MHSMError], definite: bool
) -> None:
    error = received(server_and_channel, f"code:{code}")
    assert type(error) is kind
    assert error.definite is definite


def test_a_partition_that_is_not_there_was_sent_nothing() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/test.Service/Call")(b"", timeout=5)
    assert type(from_rpc(failed.value)) is PoolUnreachable


def test_what_is_tried_again() -> None:
    """By enumeration over all errors: availability only."""
    expected = {kind for kind in BY_REASON.values() if issubclass(kind, errors.AvailabilityError)}
    expected.add(errors.InternalError)
    assert {kind for kind in BY_REASON.values() if retriable(make(kind))} == expected
    assert retriable(CallIndefinite("x"))
    assert retriable(PoolUnreachable("x"))
    assert not retriable(CallRefused("x"))


def test_a_locked_pool_is_told_when_all_partitions_say_so() -> None:
    attempts = Attempts(deadline=100.0, mutation=False)
    for index in range(2):
        attempts.backoff(make(errors.PoolLocked), index, 3, 0.0)
    with pytest.raises(errors.PoolLocked):
        attempts.backoff(make(errors.PoolLocked), 2, 3, 0.0)


def test_a_refusal_after_an_unknown_try_of_a_mutation_stays_unknown() -> None:
    """The first try may still take effect after the second one was refused."""
    for mutation, expected in ((True, errors.CommitUnknown), (False, errors.KeyNotFound)):
        attempts = Attempts(deadline=100.0, mutation=mutation)
        attempts.backoff(make(errors.CommitUnknown), 0, 3, 0.0)
        with pytest.raises(expected):
            attempts.backoff(make(errors.KeyNotFound), 1, 3, 0.0)


def test_tries_end_at_the_deadline_with_the_first_unknown_error() -> None:
    attempts = Attempts(deadline=1.0, mutation=True)
    attempts.backoff(make(errors.NotFresh), 0, 3, 0.0)
    attempts.backoff(make(errors.CommitUnknown), 1, 3, 0.1)
    with pytest.raises(errors.CommitUnknown):
        attempts.backoff(make(errors.NotFresh), 2, 3, 1.0)


def test_pauses_come_after_a_whole_round_and_are_bounded() -> None:
    attempts = Attempts(deadline=1e9, mutation=False)
    pauses = [attempts.backoff(make(errors.NotFresh), n % 3, 3, 0.0) for n in range(60)]
    assert all(pause == 0.0 for n, pause in enumerate(pauses) if n % 3 != 2)
    assert all(0.0 < pause <= 0.5 for pause in pauses[2::3])


def test_an_overload_is_waited_for_longer_each_time_and_counted() -> None:
    """RetryInfo of a round of partitions: at least the longest, stretched, bounded by the deadline."""
    counts = RetryCounts()
    attempts = Attempts(100.0, mutation=False, counts=counts)
    for round_number in range(1, 7):
        assert attempts.backoff(errors.Overloaded("").retry_after(0.1), 0, 2, now=0.0) == 0.0
        pause = attempts.backoff(errors.Overloaded("").retry_after(0.4), 1, 2, now=0.0)
        assert 0.4 * min(round_number, 4) <= pause <= 0.4 * 4 * 1.5
    assert (counts.overloaded, counts.overload_pauses) == (12, 6)
    late = Attempts(1.0, mutation=False)
    with pytest.raises(errors.Overloaded):
        late.backoff(errors.Overloaded("").retry_after(0.4), 0, 1, now=0.7)


@pytest.mark.parametrize(
    ("asked", "seen"),
    [(0.25, 0.25), (-5.0, limits.RETRY_SECONDS_MIN), (1e6, limits.RETRY_SECONDS_MAX)],
)
def test_the_delay_of_an_overload_crosses_the_wire_within_its_bounds(
    server_and_channel, asked: float, seen: float
) -> None:
    """G8: neither side believes a delay out of bounds."""
    error = received(server_and_channel, f"retry:{asked}")
    assert isinstance(error, errors.Overloaded)
    assert error.retry_seconds == pytest.approx(seen)


def test_partitions_take_turns_and_a_silent_one_is_asked_last() -> None:
    rotation = Rotation(3)
    assert [rotation.choose(set(), 0.0)[0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    rotation.unhealthy(1, 0.0)
    chosen = [rotation.choose(set(), 0.1) for _ in range(4)]
    assert 1 not in [index for index, _ in chosen]
    assert rotation.choose({0, 2}, 0.1) == (1, False)
    late = [rotation.choose(set(), UNHEALTHY_SECONDS + 0.1) for _ in range(3)]
    assert (1, True) in late, "it is asked for its health before it is used again"
    rotation.healthy(1)
    assert (1, False) in [rotation.choose(set(), 2.0) for _ in range(3)]


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, callable)
            if not name.startswith("_")
        }

    assert public(Pool) == public(AsyncPool)


def test_connection_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (None, "junk", "[]", "{}", json.dumps({"format": 99})):
        path = tmp_path / "connection.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(NoConnection):
            load_connection(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_data_directory() == tmp_path / "mhsm"
