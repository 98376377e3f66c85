"""The one message of a unary call: read when its caller is known, and in bounded time.

A synchronous server of gRPC gives a call a thread when its headers are there, and would let it wait
for the message without end. So unary methods are served as if they took a stream of messages,
which is the same on the wire: the call begins at once, and reads its message itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from hsm_pool import limits
from hsm_pool.errors import InvalidField, Overloaded, PayloadTooLarge, RequestLost
from hsm_pool.net.call_watch import CallWatch
from hsm_pool.net.shares import Shares


class RequestReader:
    """Reads the requests of one listener's calls. Thread-safe. :meth:`close` ends its thread.

    What is read at a time is bounded, and no principal alone has all of it: whoever sends no
    requests keeps only himself from calling.
    """

    def __init__(
        self,
        places: int,
        places_of_principal: int,
        seconds_max: float = limits.REQUEST_READ_SECONDS_MAX,
    ) -> None:
        self._shares = Shares(places, places_of_principal)
        self._watch = CallWatch(seconds_max)
        self.close = self._watch.close

    def read(self, principal: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Return the message of a call.

        Raises:
            InvalidField: There is none.
            Overloaded: Too many others, or too many of this principal, are read at the moment.
            RequestLost: It did not come in time, or the caller has left.
        """
        if not self._shares.take(principal, 1):
            raise Overloaded("too many calls did not send their requests yet").retry_after(
                limits.RETRY_SECONDS_MAX
            )
        watched = self._watch.begin(context)
        try:
            return next(messages)
        except StopIteration:
            if not watched.late and context.is_active():
                raise InvalidField("the call has no request", field="") from None
        except grpc.RpcError:
            pass
        finally:
            self._watch.end(watched)
            self._shares.give_back(principal, 1)
        raise RequestLost("the request did not arrive")


def parsed(octets: bytes, parse: Callable[[bytes], Any]) -> Any:
    """Return the message that some octets are.

    Raises:
        InvalidField: They are none.
        PayloadTooLarge: They are too many.
    """
    if len(octets) > limits.REQUEST_BYTES_MAX:
        raise PayloadTooLarge(f"a request has at most {limits.REQUEST_BYTES_MAX} bytes")
    try:
        return parse(octets)
    except Exception:  # noqa: BLE001 - the protobuf parser's own error
        raise InvalidField("the request is no message of this method", field="") from None
