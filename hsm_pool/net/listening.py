"""An address that cannot be listened on is named: drawn when the pool was made, it may be taken since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CannotListen(Exception):
    """Another process has the address, or this one may not use it."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(f"cannot listen on {endpoint}")
        self.endpoint = endpoint


@contextmanager
def listening(endpoint: str) -> Iterator[None]:
    """Begin to listen on an address, host:port.

    Raises:
        CannotListen: The library could not; grpc says so with a RuntimeError, others with an OSError.
    """
    try:
        yield
    except (OSError, RuntimeError):
        raise CannotListen(endpoint) from None
