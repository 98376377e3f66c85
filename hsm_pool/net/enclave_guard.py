"""What the fabric plane adds to the gate: nothing passes that the contract does not name (G5).

The gate (:mod:`hsm_pool.net.interceptors`) knows who calls and turns every error into a bare
code. It asks :class:`CallFrequency` first, so that calls which come too often cost nothing.
The guard stands behind the gate and refuses metadata that is not declared, messages that are
too long, unknown fields, enum numbers outside the closed set and numbers outside their bounds.
It looks at replies with the same eyes, so that a mistake of a service cannot send the
controller more than the bits that the bounds leave.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from hsm_pool import limits
from hsm_pool.audit import record
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import Operation
from hsm_pool.errors import AuditUnavailable, InvalidField, Overloaded
from hsm_pool.firmware.image import VERSION_MAX
from hsm_pool.net.authorization import Caller
from hsm_pool.store.replica import boot_time

_WHOLE_NUMBER_MAX: Final = 2**53 - 1
"""Every JSON reader holds it exactly (RFC 8259, section 6)."""

BOUNDS: Final[dict[str, tuple[int, int]]] = {
    "counter": (1, _WHOLE_NUMBER_MAX),
    "expires_ms": (1, _WHOLE_NUMBER_MAX),
    "applied_sequence": (0, _WHOLE_NUMBER_MAX),
    "serving_count": (0, 3),
    "incarnation": (0, 2**32 - 1),
    "version": (1, VERSION_MAX),
    "firmware_version": (0, VERSION_MAX),
    "index": (0, 2),
}
"""Lowest and highest value of each integer field of the enclave interface, by its name."""

METADATA_ALLOWED: Final = frozenset({"user-agent"})
"""Metadata keys that a call may carry; gRPC keeps its own (deadline, encoding) to itself."""

_INTEGERS = frozenset({FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64})
_TEXTS = frozenset({FieldDescriptor.CPPTYPE_STRING})
"""Strings and bytes."""


class OutsideContract(Exception):
    """A message holds what the contract does not allow."""


def check(message: Message) -> None:
    """Check a message and all messages in it.

    Raises:
        OutsideContract: Unknown fields, an enum number or an integer out of its bounds, or a
            text (the health interface declares one; it must be empty).
    """
    if len(UnknownFieldSet(message)):
        raise OutsideContract
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            raise OutsideContract
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            check(value)
        elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            if field.enum_type is None or value not in field.enum_type.values_by_number:
                raise OutsideContract
        elif field.cpp_type in _INTEGERS:
            lowest, highest = BOUNDS[field.name]
            if not lowest <= value <= highest:
                raise OutsideContract
        elif field.cpp_type in _TEXTS:
            if value:
                raise OutsideContract
        elif field.cpp_type != FieldDescriptor.CPPTYPE_BOOL:
            raise OutsideContract


class TokenBuckets:
    """How often each identity may call: a burst, refilled steadily. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = boot_time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, identity: str) -> None:
        """Take one token.

        Raises:
            Overloaded: None is left.
        """
        now = self._clock()
        with self._lock:
            # Identities are those of one authority, three partitions and a controller: few.
            tokens, at = self._buckets.get(identity, (float(limits.ENCLAVE_CALLS_BURST), now))
            tokens = min(limits.ENCLAVE_CALLS_BURST, tokens + (now - at) * limits.ENCLAVE_CALLS_PER_SECOND)
            self._buckets[identity] = (max(0.0, tokens - 1), now)
        if tokens < 1:
            raise Overloaded("too many calls a second")


class CallFrequency:
    """Refuses calls that come too often, before anything of them is read or on record. Thread-safe.

    One record a second at most says how many were refused: with one each, a flood of calls that
    nobody obeys would push every other record out of the log (G7). Status and health have tokens
    of their own, so that a partition does not look dead in a flood of commands.
    """

    def __init__(self, partition: int, audit_log: AuditLog, clock: Callable[[], float] = boot_time) -> None:
        self._partition = partition
        self._audit_log = audit_log
        self._clock = clock
        self._commands, self._questions = TokenBuckets(clock), TokenBuckets(clock)
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._record_at = clock()

    def take(self, caller: Caller, method: str) -> None:
        """Let a call begin.

        Raises:
            Overloaded: It comes too often.
        """
        try:
            if method in record.POLLED:
                self._questions.take(caller.uri)
            else:
                self._commands.take(caller.uri)
        except Overloaded:
            if method not in record.POLLED:
                with self._lock:
                    self._refused[caller.uri] += 1
            raise
        finally:
            # By whatever call comes next, so that the last ones of a flood are on record, too.
            self._put_on_record()

    def close(self) -> None:
        """Put the last ones on record; the calls have ended, and the log is still open."""
        self._put_on_record(at_once=True)

    def _put_on_record(self, *, at_once: bool = False) -> None:
        with self._lock:
            now = self._clock()
            if not self._refused or (now < self._record_at and not at_once):
                return
            self._record_at = now + limits.ENCLAVE_REFUSALS_RECORD_SECONDS
            refused, self._refused = self._refused, Counter()
        for identity, calls in refused.items():
            operation = Operation("FrequentCalls", identity, partition=self._partition, items=calls)
            operation.refused(Overloaded.code, Overloaded.reason)
            try:
                self._audit_log.append(operation.record())
            except AuditUnavailable:
                with self._lock:
                    self._refused[identity] += calls


class EnclaveGuard(grpc.ServerInterceptor):
    """Stands between the gate and the services of the fabric plane."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler of a method."""
        handler = continuation(handler_call_details)
        # No streaming method is in the table of permissions: the gate refuses it.
        if handler is None or handler.unary_unary is None:
            return handler
        parse = handler.request_deserializer

        def call(octets: bytes, context: grpc.ServicerContext) -> Any:
            _check_metadata(context)
            reply = handler.unary_unary(_strictly_parsed(octets, parse), context)
            check(reply)
            return reply

        # The gate hands over the octets as they came: they are parsed here.
        return grpc.unary_unary_rpc_method_handler(call, lambda octets: octets, handler.response_serializer)


def _check_metadata(context: grpc.ServicerContext) -> None:
    """Refuse metadata that nobody declared.

    Raises:
        InvalidField: There is some.
    """
    for key, _ in context.invocation_metadata():
        if key not in METADATA_ALLOWED:
            raise InvalidField("metadata that is not declared is refused", field="")


def _strictly_parsed(octets: bytes, parse: Callable[[bytes], Message]) -> Message:
    """Return the message, if it is one of the contract.

    Raises:
        InvalidField: It is not.
    """
    if len(octets) > limits.ENCLAVE_MESSAGE_BYTES_MAX:
        raise InvalidField("the message is too long", field="")
    try:
        message = parse(octets)
        check(message)
    except Exception:  # noqa: BLE001 - the protobuf parser's own error, or OutsideContract
        raise InvalidField("the request is outside of the contract", field="") from None
    return message
