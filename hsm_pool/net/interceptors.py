"""The one interceptor: identity, permission, roles, load and errors of every call.

Nothing but a typed error ever reaches a caller; the text of any other exception stays in
the log, under a correlation id (G3, G8). On the fabric plane an error is its code alone (G5).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from hsm_pool import limits
from hsm_pool.core.roles import WHOLE_POOL, Access
from hsm_pool.errors import (
    DOMAIN,
    AccessError,
    InternalError,
    InvalidField,
    MHSMError,
    Overloaded,
    Unauthenticated,
)
from hsm_pool.net.authorization import Caller, Rule, authorize
from hsm_pool.net.calls import deadline
from hsm_pool.net.role_gate import RoleGate

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
    """Return a typed error as google.rpc.Status with one ErrorInfo (AIP-193)."""
    detail = any_pb2.Any()
    metadata = {**error.metadata, "definite": "true" if error.definite else "false"}
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message, details=[detail])


def typed(error: Exception, method: str) -> MHSMError:
    """Return the typed error to show for any exception."""
    if isinstance(error, MHSMError):
        return error
    correlation_id = uuid.uuid4().hex
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


def _parsed(octets: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(octets)
    except Exception:  # noqa: BLE001 - the protobuf parser's own error
        raise InvalidField("the request is no message of this method", field="") from None


class Gate(grpc.ServerInterceptor):
    """Lets a call through to its service, or answers it with a typed error."""

    def __init__(
        self,
        identify: Callable[[grpc.ServicerContext], Caller],
        translate: Callable[[Exception], Exception],
        roles: RoleGate,
        *,
        bare_errors: bool = False,
    ) -> None:
        self._identify = identify
        self._roles = roles
        self._bare_errors = bare_errors
        self._translate = translate
        # A stream keeps a thread of the server for as long as its client likes.
        self._streams = threading.BoundedSemaphore(limits.STREAMS_MAX)

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler of a method."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        # Requests are parsed in the call: after the permission is known, and with typed errors.
        parse = handler.request_deserializer
        serialize = handler.response_serializer
        if handler.response_streaming:
            streamed = self._stream(handler.stream_stream, parse, method)
            return grpc.stream_stream_rpc_method_handler(streamed, None, serialize)
        unary = self._unary(handler.unary_unary, parse, method)
        return grpc.unary_unary_rpc_method_handler(unary, None, serialize)

    def _enter(self, context: grpc.ServicerContext, method: str) -> None:
        caller = self._identify(context)
        rule = authorize(caller, method)
        if rule is not None:
            self._roles.admit(caller, rule, method, deadline(context))
        _call.caller, _call.rule = caller, rule

    def _abort(self, context: grpc.ServicerContext, error: Exception, method: str) -> None:
        shown = typed(self._translate(error), method)
        if isinstance(shown, AccessError):
            # The data action and not the text: that would write the names of keys into the log.
            cause = shown.metadata.get("action", shown.message)
            _log.warning("access refused", method=method, reason=shown.reason, cause=cause)
        if self._bare_errors:
            context.abort(getattr(grpc.StatusCode, shown.code), "")
        context.abort_with_status(rpc_status.to_status(error_status(shown)))

    def _unary(self, handle: Any, parse: Any, method: str) -> Any:
        def call(octets: bytes, context: grpc.ServicerContext) -> Any:
            try:
                self._enter(context, method)
                return handle(_parsed(octets, parse), context)
            except Exception as error:  # noqa: BLE001 - the one place where errors become answers
                return self._abort(context, error, method)

        return call

    def _stream(self, handle: Any, parse: Any, method: str) -> Any:
        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._streams.acquire(blocking=False):
                self._abort(context, Overloaded("too many streams are open at this partition"), method)
            try:
                self._enter(context, method)
                yield from handle((_parsed(octets, parse) for octets in messages), context)
            except Exception as error:  # noqa: BLE001
                self._abort(context, error, method)
            finally:
                self._streams.release()

        return call
