"""Secret values that cannot be printed, pickled, compared by accident or logged (G3)."""

from __future__ import annotations

import hmac
from typing import NoReturn


class SecretBytes:
    """Holds secret octets; only :meth:`reveal` gives them back.

    The value lives in an ordinary heap object: what is long-lived belongs into
    :class:`hsm_pool.crypto.secret_memory.SecretMemory` instead.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the octets; the name makes each use easy to find."""
        return self._value

    def equals(self, other: SecretBytes) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(self._value, other._value)

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return "SecretBytes(redacted)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise TypeError("compare secrets with equals()")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets cannot be pickled")

    def __copy__(self) -> NoReturn:
        raise TypeError("secrets cannot be copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("secrets cannot be copied")
