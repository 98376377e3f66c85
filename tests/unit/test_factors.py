"""The search for factors of RSA moduli finds what it is to find (a control of G3 and G5)."""

from __future__ import annotations

import random
from typing import Literal

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.factors import Factors, form


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("bits", [2048, 3072])
def test_a_factor_is_found_wherever_it_begins(bits: int, order: Literal["little", "big"], seed: int) -> None:
    numbers = rsa.generate_private_key(65537, bits).private_numbers()
    factors = Factors({"key": numbers.public_numbers.n})
    around = random.Random(seed)
    for number, prime in enumerate((numbers.p, numbers.q) * 4):
        octets = prime.to_bytes(bits // 16, order)
        assert factors.scan(bytes(500 + number) + octets + bytes(300)) == {f"key ({form(order)})": 1}
        assert factors.scan(around.randbytes(500 + number) + octets + around.randbytes(300)) == {
            f"key ({form(order)})": 1
        }
    assert factors.scan(octets) == {f"key ({form(order)})": 1}
    assert not factors.scan(octets[1:] + b"x")
    assert factors.divisions > 100


def test_what_divides_nothing_is_no_hit(seed: int) -> None:
    """Neither chance, nor another key's factor, nor numbers that do not look random."""
    key, other = (rsa.generate_private_key(65537, 2048).private_numbers() for _ in range(2))
    factors = Factors({"key": key.public_numbers.n})
    assert not factors.scan(random.Random(seed).randbytes(200_000))
    assert not factors.scan(other.p.to_bytes(128, "big"))
    assert not factors.scan(bytes(100_000) + b"\xff" * 100_000)
    assert not factors.scan(key.public_numbers.n.to_bytes(256, "big"))
    assert not factors.scan(b"")
