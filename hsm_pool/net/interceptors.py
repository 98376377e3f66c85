"""What every call passes, and the one interceptor of gRPC: identity, roles, load, errors and audit record.

Nothing but a typed error ever reaches a caller; the text of any other exception stays in
the log, under a correlation id (G3, G8). On the fabric plane an error is its code alone (G5).
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from hsm_pool.audit import record
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import Operation
from hsm_pool.core.roles import WHOLE_POOL, Access
from hsm_pool.errors import (
    DOMAIN,
    AccessError,
    AuditUnavailable,
    InternalError,
    MHSMError,
    Overloaded,
    Unauthenticated,
)
from hsm_pool.net.admission import CallAdmission, CallKind, kind_of
from hsm_pool.net.answers import UnreadAnswers
from hsm_pool.net.authorization import Caller, Rule, authorize
from hsm_pool.net.calls import deadline
from hsm_pool.net.enclave_guard import CallFrequency
from hsm_pool.net.requests import RequestReader, parsed
from hsm_pool.net.role_gate import RoleGate
from hsm_pool.observability.calls import CallObserver, Observation

_log = structlog.get_logger()
_call = threading.local()


def current_caller() -> Caller:
    """Return the caller of the call that this thread serves.

    Raises:
        Unauthenticated: His token has expired meanwhile, as within a long stream.
    """
    caller: Caller = _call.caller
    if caller.expires_at is not None and caller.expires_at <= time.time():
        raise Unauthenticated("the token has expired")
    return caller


def current_access(scope: str = WHOLE_POOL) -> Access:
    """Return what the call that this thread serves is about to do, to be decided with it."""
    rule: Rule = _call.rule
    (action,) = rule.actions
    return Access(current_caller().principals, action, scope)


def error_status(error: MHSMError) -> status_pb2.Status:
    """Return a typed error as google.rpc.Status: ErrorInfo, and RetryInfo if it is an overload (AIP-193)."""
    detail = any_pb2.Any()
    metadata = {**error.metadata, "definite": "true" if error.definite else "false"}
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    details = [detail]
    if isinstance(error, Overloaded):
        later = any_pb2.Any()
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_seconds * 1e9))
        later.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        details.append(later)
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message, details=details)


def _answer(error: MHSMError) -> Any:
    """Return a typed error as what ends a call. Those of an overload are many, and the same: made once."""
    if not isinstance(error, Overloaded):
        return rpc_status.to_status(error_status(error))
    return _overloaded(error.message, math.ceil(error.retry_seconds * 1000))


@lru_cache(maxsize=4096)
def _overloaded(message: str, retry_ms: int) -> Any:
    return rpc_status.to_status(error_status(Overloaded(message).retry_after(retry_ms / 1000)))


def typed(error: Exception, method: str) -> MHSMError:
    """Return the typed error to show for any exception."""
    if isinstance(error, MHSMError):
        return error
    operation = record.current()
    correlation_id = operation.correlation_id if operation else uuid.uuid4().hex
    # The type and the place, not the text: it might quote a value.
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    _log.error(
        "internal error",
        method=method,
        correlation_id=correlation_id,
        kind=type(error).__name__,
        place=place,
    )
    return InternalError(f"internal error, correlation id {correlation_id}")


class Passage:
    """What every call of a customer or a process passes, whatever carries it: permission, roles, its record.

    Whatever the outcome, the record is in the audit log before the answer leaves (G7).
    """

    def __init__(
        self,
        partition: int,
        translate: Callable[[Exception], Exception],
        roles: RoleGate,
        audit_log: AuditLog,
    ) -> None:
        self._partition = partition
        self._roles = roles
        self._translate = translate
        self._audit_log = audit_log

    def enter(self, caller: Caller, address: str, method: str, until: float) -> None:
        """Let a call begin in this thread.

        Args:
            caller: Who calls.
            address: His IP address, "" when it is not known.
            method: gRPC method (/package.Service/Method) that is called, or whose front is called.
            until: When it has to be answered, on the boot clock.

        Raises:
            MHSMError: The call is refused.
        """
        self.recognise(caller, address, method)
        self.admit_roles(method, until)

    def recognise(self, caller: Caller, address: str, method: str) -> None:
        """Do the first half of :meth:`enter`: all that needs no state."""
        self.begin(caller, address, method)
        if method not in record.POLLED:
            self._audit_log.check()
        _call.caller, _call.rule = caller, authorize(caller, method)

    def admit_roles(self, method: str, until: float) -> None:
        """Do the second half of :meth:`enter`, which may wait: ask the caller's roles."""
        if _call.rule is not None:
            self._roles.admit(_call.caller, _call.rule, method, until)

    def begin(self, caller: Caller, address: str, method: str) -> None:
        """Begin the record of a call."""
        name = record.operation_name(method)
        record.begin(Operation(name, caller.uri, address, method, self._partition))

    def succeed(self) -> None:
        """Put the call on record; nothing may leave before."""
        operation = record.current()
        if operation and not operation.on_chain and operation.method not in record.POLLED:
            self._audit_log.append(operation.record())

    def fail(self, error: Exception, method: str) -> MHSMError:
        """Put the refusal on record; return the error to show."""
        shown = self._recorded(typed(self._translate(error), method))
        if isinstance(shown, AccessError):
            # The data action and not the text: that would write the names of keys into the log.
            cause = shown.metadata.get("action", shown.message)
            _log.warning("access refused", method=method, reason=shown.reason, cause=cause)
        return shown

    def _recorded(self, shown: MHSMError) -> MHSMError:
        operation = record.current()
        if operation is None or (operation.method in record.POLLED and not isinstance(shown, AccessError)):
            return shown
        operation.refused(shown.code, shown.reason)
        try:
            self._audit_log.append(operation.record())
        except AuditUnavailable as unavailable:
            # An open outcome stays open.
            return unavailable if shown.definite else shown
        return shown


class Gate(Passage, grpc.ServerInterceptor):
    """Lets a call of gRPC through to its service, or answers it with a typed error.

    There is one record a call, and one a message of a stream.
    """

    def __init__(
        self,
        partition: int,
        identify: Callable[[grpc.ServicerContext], Caller],
        translate: Callable[[Exception], Exception],
        roles: RoleGate,
        audit_log: AuditLog,
        observer: CallObserver,
        reader: RequestReader,
        answers: UnreadAnswers,
        admission: CallAdmission | None = None,
        *,
        frequency: CallFrequency | None = None,
        bare_errors: bool = False,
    ) -> None:
        super().__init__(partition, translate, roles, audit_log)
        self._frequency = frequency
        self._identify = identify
        self._bare_errors = bare_errors
        self._observer = observer
        self._reader = reader
        self._answers = answers
        self._wrapped: dict[str, Any] = {}
        self._admission = admission

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler of a method, once."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        return wrapped

    def _wrap(self, handler: Any, method: str) -> Any:
        # Requests are read and parsed in the call: when its caller is known, and with typed errors.
        parse = handler.request_deserializer
        serialize = handler.response_serializer
        if handler.response_streaming:
            streamed = self._stream(handler.stream_stream, parse, method)
            return grpc.stream_stream_rpc_method_handler(streamed, None, serialize)
        unary = self._unary(handler.unary_unary, parse, method)
        return grpc.stream_unary_rpc_method_handler(unary, None, serialize)

    def _enter(self, context: grpc.ServicerContext, method: str) -> Caller:
        caller = self._identify(context)
        if self._frequency is not None:
            self._frequency.take(caller, method)
        self.recognise(caller, record.caller_address(context.peer()), method)
        return caller

    def _abort(self, context: grpc.ServicerContext, error: Exception, observed: Observation) -> None:
        shown = self.fail(error, observed.method)
        observed.code = shown.code
        if self._bare_errors:
            context.abort(getattr(grpc.StatusCode, shown.code), "")
        context.abort_with_status(_answer(shown))

    def _abort_stream(self, context: grpc.ServicerContext, error: Exception, observed: Observation) -> None:
        try:
            self._abort(context, error, observed)
        finally:
            self._observer.end(observed)

    def _request(
        self, caller: Caller, kind: CallKind, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> bytes:
        self._answers.check(caller.uri)
        if self._admission is not None:
            self._admission.check(caller.uri, kind)
        return self._reader.read(caller.uri, messages, context)

    def _place(self, caller: Caller, kind: CallKind, until: float, *, patient: bool = False) -> Any:
        if self._admission is None:
            return nullcontext()
        return self._admission.call(caller.uri, kind, until, patient=patient)

    def _unary(self, handle: Any, parse: Any, method: str) -> Any:
        kind = kind_of(method)

        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            observed = self._observer.begin(method, context)
            try:
                caller, until = self._enter(context, method), deadline(context)
                octets = self._request(caller, kind, messages, context)
                with self._place(caller, kind, until):
                    self.admit_roles(method, until)
                    response = handle(parsed(octets, parse), context)
                self._answers.hold(caller.uri, response, context)
                self.succeed()
                return response
            except Exception as error:  # noqa: BLE001 - the one place where errors become answers
                return self._abort(context, error, observed)
            finally:
                record.begin(None)
                self._observer.end(observed)

        return call

    def _stream(self, handle: Any, parse: Any, method: str) -> Any:
        kind = kind_of(method)

        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            observed = self._observer.begin(method, context)
            with ExitStack() as held:
                try:
                    caller = self._enter(context, method)
                    self.admit_roles(method, deadline(context))
                    if self._admission is not None:
                        held.enter_context(self._admission.stream(caller.uri, kind))
                    place = held.enter_context(ExitStack())

                    def requests() -> Iterator[Any]:
                        nonlocal observed
                        for octets in messages:
                            observed = self._observer.begin(method, context)
                            self.begin(caller, record.caller_address(context.peer()), method)
                            self._audit_log.check()
                            # Each message is a batch, and waits for its turn like any other call.
                            until = deadline(context)
                            place.enter_context(self._place(caller, CallKind.OPERATION, until, patient=True))
                            yield parsed(octets, parse)

                    # The stream as such is on record only if it is refused.
                    record.begin(None)
                    for response in handle(requests(), context):
                        place.close()
                        operation = record.current()
                        observed.code = operation.code if operation else "OK"
                        self.succeed()
                        record.begin(None)
                        self._observer.end(observed)
                        yield response
                except Exception as error:  # noqa: BLE001
                    self._abort_stream(context, error, observed)
                finally:
                    record.begin(None)

        return call
