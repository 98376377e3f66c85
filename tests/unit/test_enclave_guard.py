"""G5: what the guard of the fabric plane lets through, in both directions."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.errors import InvalidField, Overloaded
from hsm_pool.net import enclave_guard
from hsm_pool.net.enclave_guard import OutsideContract, TokenBuckets, check
from mhsm.enclave.v1 import enclave_pb2

HIGHEST = 2**53 - 1
GOOD: list[Message] = [
    enclave_pb2.GetStatusRequest(),
    enclave_pb2.DrainRequest(counter=1, expires_ms=1),
    enclave_pb2.RestartRequest(counter=HIGHEST, expires_ms=HIGHEST),
    enclave_pb2.GetStatusResponse(
        state=enclave_pb2.PARTITION_STATE_QUARANTINED,
        fresh=True,
        applied_sequence=HIGHEST,
        serving_count=3,
        incarnation=2**32 - 1,
        housekeeper=True,
    ),
    health_pb2.HealthCheckRequest(),
    health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING),
]
BAD: list[Message] = [
    enclave_pb2.DrainRequest(),
    enclave_pb2.DrainRequest(counter=1),
    enclave_pb2.DrainRequest(counter=HIGHEST + 1, expires_ms=1),
    enclave_pb2.ResumeRequest(counter=1, expires_ms=HIGHEST + 1),
    enclave_pb2.GetStatusResponse(state=8),  # type: ignore[arg-type]
    enclave_pb2.GetStatusResponse(state=-1),  # type: ignore[arg-type]
    enclave_pb2.GetStatusResponse(serving_count=4),
    enclave_pb2.GetStatusResponse(incarnation=2**32),
    enclave_pb2.GetStatusResponse(applied_sequence=2**53),
    health_pb2.HealthCheckRequest(service="x"),
]


@pytest.mark.parametrize("message", GOOD, ids=lambda message: repr(message)[:40])
def test_what_the_contract_names_passes(message: Message) -> None:
    check(message)
    assert len(message.SerializeToString()) <= limits.ENCLAVE_MESSAGE_BYTES_MAX


@pytest.mark.parametrize("message", BAD, ids=lambda message: repr(message)[:40])
def test_what_is_outside_its_bounds_does_not_pass(message: Message) -> None:
    with pytest.raises(OutsideContract):
        check(message)


@given(
    st.sampled_from(GOOD),
    st.integers(20, 200),
    st.one_of(st.binary(max_size=30), st.integers(0, 2**64 - 1)),
)
def test_unknown_fields_are_refused(message: Message, number: int, value: bytes | int) -> None:
    """A field that the contract does not know could carry anything, either way."""
    octets = message.SerializeToString() + _field(number, value)
    changed = type(message).FromString(octets)
    with pytest.raises(OutsideContract):
        check(changed)
    with pytest.raises(InvalidField):
        enclave_guard._strictly_parsed(octets, type(message).FromString)


def _varint(value: int) -> bytes:
    octets = b""
    while value > 127:
        octets += bytes([value & 127 | 128])
        value >>= 7
    return octets + bytes([value])


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


@given(st.binary(max_size=100))
def test_any_octets_are_a_message_of_the_contract_or_refused(octets: bytes) -> None:
    for kind in (enclave_pb2.DrainRequest, enclave_pb2.GetStatusRequest, health_pb2.HealthCheckRequest):
        try:
            message = enclave_guard._strictly_parsed(octets, kind.FromString)
        except InvalidField:
            continue
        check(message)


def test_a_message_that_is_too_long_is_refused_unread() -> None:
    # The same field again and again: legal in protobuf, longer than any honest message.
    octets = _field(1, 5) * 60
    with pytest.raises(InvalidField):
        enclave_guard._strictly_parsed(octets, enclave_pb2.DrainRequest.FromString)


def test_calls_are_counted_by_identity_and_refilled_steadily() -> None:
    now = [0.0]
    buckets = TokenBuckets(lambda: now[0])
    for _ in range(limits.ENCLAVE_CALLS_BURST):
        buckets.take("a")
    with pytest.raises(Overloaded):
        buckets.take("a")
    buckets.take("b")
    now[0] += 1.0
    for _ in range(limits.ENCLAVE_CALLS_PER_SECOND):
        buckets.take("a")
    with pytest.raises(Overloaded):
        buckets.take("a")
