"""Errors that only a client can have, and the map from the wire back to typed errors.

::

    MHSMError
    └── ClientError
        ├── CallIndefinite      sent; whether it took effect is not known
        ├── PoolUnreachable     nothing was sent
        ├── PoolClosed          nothing was sent: this client was closed
        └── SignatureInvalid    the pool says that a signature does not verify
"""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hsm_pool.errors import BY_REASON, DOMAIN, MHSMError, Overloaded


class ClientError(MHSMError):
    """Base of errors that arise in the client: no pool has given a reason for them."""

    reason = ""


class CallIndefinite(ClientError):
    """The call was sent and its outcome is not known: deadline, broken connection."""

    code = "UNAVAILABLE"
    definite = False


class PoolUnreachable(ClientError):
    """No partition could be reached; nothing was sent."""

    code = "UNAVAILABLE"


class PoolClosed(ClientError):
    """The client was closed before the call; nothing was sent by it."""

    code = "FAILED_PRECONDITION"

    def __init__(self) -> None:
        super().__init__("this client of the pool is closed")


class CallRefused(ClientError):
    """The transport or the server refused the call without a typed reason."""

    code = "UNKNOWN"


class SignatureInvalid(ClientError):
    """The signature does not verify."""

    code = "INVALID_ARGUMENT"


_INDEFINITE = {
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}
_NOT_SENT = ("failed to connect", "connection refused", "handshake", "name resolution", "tls")


def from_rpc(error: grpc.RpcError) -> MHSMError:
    """Return the typed error of a failed call."""
    status = _status(error)
    if status is not None:
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
                rebuilt = rebuild(info.reason, status.message, dict(info.metadata))
                return (
                    rebuilt.retry_after(_retry_seconds(status))
                    if isinstance(rebuilt, Overloaded)
                    else rebuilt
                )
    code, details = error.code(), (error.details() or "").lower()
    if code is grpc.StatusCode.UNAVAILABLE:
        if any(word in details for word in _NOT_SENT):
            return PoolUnreachable("the partition could not be reached; nothing was sent")
        return CallIndefinite("the connection broke; the outcome is not known")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "concurrent" in details:
        return Overloaded("too many calls are under way")
    if code in _INDEFINITE:
        return CallIndefinite(f"no answer ({code.name.lower()}); the outcome is not known")
    return CallRefused(f"the call was refused ({code.name.lower()})")


def _retry_seconds(status: status_pb2.Status) -> float:
    """Return the delay of google.rpc.RetryInfo in seconds, or the usual one."""
    later = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(later):
            delay: float = later.retry_delay.seconds + later.retry_delay.nanos / 1e9
            return delay
    return Overloaded.retry_seconds


def rebuild(reason: str, message: str, metadata: dict[str, str]) -> MHSMError:
    """Return the typed error of an ErrorInfo."""
    kind = BY_REASON[reason]
    metadata.pop("definite", None)
    error = kind.__new__(kind)
    MHSMError.__init__(error, message, **metadata)
    return error


def _status(error: grpc.RpcError):  # type: ignore[no-untyped-def]
    try:
        return rpc_status.from_call(error)
    except (ValueError, AttributeError, TypeError):
        return None
