"""Looks for the prime factors of RSA moduli: of keys too whose material nobody knows (G3, G5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal

_ODD: Final = bytes(octet & 1 for octet in range(256))
_HIGH: Final = bytes(octet >= 0xB5 for octet in range(256))
"""A factor is at least 2^(k-1) times the square root of 2 (FIPS 186-5, A.1.3): it begins with B5 or more."""

_ZEROS_MAX: Final = 8
_DISTINCT_SHARE: Final = 0.5
"""Random octets of a factor's length: over 8 zeros, or under half of that many values, by chance never."""

FORM: Final = "divides n"


class Factors:
    """Finds factors, written in whole octets, lowest or highest first, at every alignment.

    A window as long as a factor is divided if it is odd, begins as high as a factor does and
    looks random; everything else cannot be one. A part of a factor is not found by its dividing.

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
        """Return how often a factor of each modulus occurs, as "name (divides n)"."""
        found: Counter[str] = Counter()
        for size in self._products:
            if len(octets) >= size:
                found += self._scan(octets, size, "little") + self._scan(octets, size, "big")
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
                    found.update(f"{name} ({FORM})" for name, n in self.moduli.items() if n % number == 0)
            position = marks.find(1, position + 1)
        return found
