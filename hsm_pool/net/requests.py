"""The one message of a unary call: read when its caller is known, and in bounded time.

A synchronous server of gRPC gives a call a thread when its headers are there, and would let it wait
for the message without end. So unary methods are served as if they took a stream of messages,
which is the same on the wire: the call begins at once, and reads its message itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from hsm_pool import limits
from hsm_pool.errors import InvalidField, Overloaded, PayloadTooLarge, RequestLost
from hsm_pool.store.replica import boot_time


@dataclass(slots=True, eq=False)
class _Reading:
    principal: str
    context: grpc.ServicerContext
    until: float
    """On the boot clock."""
    late: bool = False


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
        self._places, self._places_of_principal = places, places_of_principal
        self._seconds_max = seconds_max
        self._lock = threading.Lock()
        # All wait equally long, so the first one that began is the first one that is late.
        self._reading: dict[_Reading, None] = {}
        self._held: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-reader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and wait."""
        self._stopping.set()
        self._thread.join()

    def read(self, principal: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Return the message of a call.

        Raises:
            InvalidField: There is none.
            Overloaded: Too many others, or too many of this principal, are read at the moment.
            RequestLost: It did not come in time, or the caller has left.
        """
        reading = _Reading(principal, context, boot_time() + self._seconds_max)
        with self._watched(reading):
            try:
                return next(messages)
            except StopIteration:
                if not reading.late and context.is_active():
                    raise InvalidField("the call has no request", field="") from None
            except grpc.RpcError:
                pass
        raise RequestLost("the request did not arrive")

    @contextmanager
    def _watched(self, reading: _Reading) -> Iterator[None]:
        with self._lock:
            if (
                len(self._reading) >= self._places
                or self._held[reading.principal] >= self._places_of_principal
            ):
                raise Overloaded("too many calls did not send their requests yet").retry_after(
                    limits.RETRY_SECONDS_MAX
                )
            self._reading[reading] = None
            self._held[reading.principal] += 1
        try:
            yield
        finally:
            with self._lock:
                del self._reading[reading]
                self._held[reading.principal] -= 1
                if not self._held[reading.principal]:
                    del self._held[reading.principal]

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds_max / 4):
            for reading in self._late(boot_time()):
                reading.context.cancel()

    def _late(self, now: float) -> list[_Reading]:
        found = []
        with self._lock:
            for reading in self._reading:
                if reading.until > now:
                    break
                reading.late = True
                found.append(reading)
        return found


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
