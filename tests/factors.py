"""Looks for the prime factors of RSA moduli: of keys too whose material nobody knows (G3, G5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Literal

_ODD: Final = bytes(octet & 1 for octet in range(256))
_HIGH: Final = bytes(octet >= 0xB5 for octet in range(256))
"""A factor is at least 2^(k-1) times the square root of 2 (FIPS 186-5, A.1.3): it begins with B5 or more."""

_ZEROS_MAX: Final = 8
_DISTINCT_SHARE: Final = 0.5
"""Random octets of a factor's length: over 8 zeros, or under half of that many values, by chance never."""

_BLOCK_BYTES: Final = 64
_LOW: Final = bytes(range(128))
_HIGH_OCTETS_MIN: Final = 8
"""Of 64 random octets, over 8 are zero or under 8 are above 127 once in 10^9 times at most."""

ORDERS: Final[tuple[Literal["little", "big"], ...]] = ("little", "big")


def form(order: Literal["little", "big"]) -> str:
    """Return the name of the form."""
    return f"divides n, {order} endian"


class Factors:
    """Finds factors, written in whole octets, lowest or highest first, at every alignment.

    A window as long as a factor is divided if it is odd, begins as high as a factor does and
    looks random, as do all aligned blocks of 64 octets in it; everything else is no factor that
    anybody makes. A part of a factor is not found by its dividing.

    Args:
        moduli: By name; of an even number of octets, with two factors of the same length.
    """

    def __init__(self, moduli: Mapping[str, int]) -> None:
        self.moduli = dict(moduli)
        self.divisions = 0
        """How many windows were divided so far."""
        self._products: dict[int, int] = {}
        for modulus in moduli.values():
            size = modulus.bit_length() // 16
            self._products[size] = self._products.get(size, 1) * modulus

    def scan(self, octets: bytes) -> Counter[str]:
        """Return how often a factor of each modulus occurs, as "name (divides n, ... endian)"."""
        found: Counter[str] = Counter()
        for start, end in _regions(octets):
            region = octets[start:end]
            for size in self._products:
                if len(region) >= size:
                    for order in ORDERS:
                        found += self._scan(region, size, order)
        return found

    def _scan(self, octets: bytes, size: int, order: Literal["little", "big"]) -> Counter[str]:
        found: Counter[str] = Counter()
        first, last = octets[: len(octets) - size + 1], octets[size - 1 :]
        lowest, highest = (first, last) if order == "little" else (last, first)
        both = int.from_bytes(lowest.translate(_ODD)) & int.from_bytes(highest.translate(_HIGH))
        marks = both.to_bytes(len(first))
        position = marks.find(1)
        while position >= 0:
            window = octets[position : position + size]
            if window.count(0) <= _ZEROS_MAX and len(set(window)) >= size * _DISTINCT_SHARE:
                number = int.from_bytes(window, order)
                self.divisions += 1
                if self._products[size] % number == 0:
                    found.update(
                        f"{name} ({form(order)})" for name, n in self.moduli.items() if n % number == 0
                    )
            position = marks.find(1, position + 1)
        return found


def _regions(octets: bytes) -> Iterator[tuple[int, int]]:
    """Yield where blocks that look random follow on each other, with what may overhang on both sides."""
    overhang, start = _BLOCK_BYTES - 1, -1
    for position in range(0, len(octets) + 1, _BLOCK_BYTES):
        block = octets[position : position + _BLOCK_BYTES]
        random = (
            len(block) == _BLOCK_BYTES
            and block.count(0) <= _ZEROS_MAX
            and len(block.translate(None, _LOW)) >= _HIGH_OCTETS_MIN
        )
        if random and start < 0:
            start = position
        elif not random and start >= 0:
            yield max(0, start - overhang), position + overhang
            start = -1
