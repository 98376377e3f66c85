"""Secret octets that cannot be printed or pickled."""

from __future__ import annotations

from typing import NoReturn


class Secret:
    """Holds secret octets in a buffer that :meth:`wipe` overwrites."""

    __slots__ = ("_buffer",)

    def __init__(self, octets: bytes) -> None:
        self._buffer = bytearray(octets)

    def reveal(self) -> bytes:
        """Return the octets."""
        return bytes(self._buffer)

    def wipe(self) -> None:
        """Overwrite this copy; copies that were revealed stay with their holders."""
        self._buffer[:] = bytes(len(self._buffer))

    def __len__(self) -> int:
        return len(self._buffer)

    def __repr__(self) -> str:
        return "Secret(redacted)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets cannot be pickled")
