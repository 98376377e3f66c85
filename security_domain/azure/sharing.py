"""Azure's ``shamir_share``: each byte of a 32-byte key shared by its own polynomial over GF(257).

A share is 64 bytes: for each byte of the key one 16-bit little-endian word, number x in the
upper 7 bits and value v = f(x), 0 to 256, in the lower 9. Nothing in a share tells whether
it is the right one: only what the key opens does.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from security_domain.errors import InvalidOfficers, InvalidShare, QuorumMissing
from security_domain.officers import OFFICERS_MAX, QUORUM_MIN
from security_domain.secret import Secret

FIELD = 257
KEY_BYTES = 32
SHARE_BYTES = 2 * KEY_BYTES
NUMBER_MAX = 126
_VALUE_BITS = 9


def split(key: Secret, required: int, total: int) -> list[Secret]:
    """Split a 32-byte key into shares numbered from 1, with fresh random coefficients for each byte.

    Args:
        key: 32 bytes.
        required: How many shares open it, 2 to ``total``.
        total: How many shares are made, at most 10.

    Returns:
        Shares of 64 bytes.

    Raises:
        InvalidShare: The key has another length.
        InvalidOfficers: The quorum is out of bounds.
    """
    if len(key) != KEY_BYTES:
        raise InvalidShare(f"only a key of {KEY_BYTES} bytes is split")
    check_quorum(required, total)
    # A leading coefficient may be 0: leaving it out would tell t - 1 officers one value it is not.
    polynomials = [
        [octet, *(secrets.randbelow(FIELD) for _ in range(required - 1))] for octet in key.reveal()
    ]
    return [make_share(polynomials, number) for number in range(1, total + 1)]


def make_share(polynomials: Sequence[Sequence[int]], number: int) -> Secret:
    """Evaluate one polynomial for each byte at a share's number.

    Args:
        polynomials: Coefficients, 0 to 256, constant term (the secret byte) first.
        number: x, 1 to 126.
    """
    share = bytearray()
    for coefficients in polynomials:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * number + coefficient) % FIELD
        share += (number << _VALUE_BITS | value).to_bytes(2, "little")
    return Secret(bytes(share))


def parse_share(share: Secret) -> tuple[int, list[int]]:
    """Return a share's number and its 32 values.

    Raises:
        InvalidShare: It has not 64 bytes of one number 1 to 126 with values up to 256.
    """
    octets = share.reveal()
    if len(octets) != SHARE_BYTES:
        raise InvalidShare(f"a share has {SHARE_BYTES} bytes")
    words = [int.from_bytes(octets[at : at + 2], "little") for at in range(0, SHARE_BYTES, 2)]
    numbers = {word >> _VALUE_BITS for word in words}
    values = [word & ((1 << _VALUE_BITS) - 1) for word in words]
    number = numbers.pop()
    if numbers or not 1 <= number <= NUMBER_MAX or max(values) >= FIELD:
        raise InvalidShare("a share is malformed")
    return number, values


def combine(shares: Sequence[Secret], required: int) -> Secret:
    """Combine exactly the required number of shares (Lagrange interpolation at 0).

    Wrong shares give a wrong key and no error here, even where a value is no byte (256): an
    error that depends on the values would let whoever forges one share learn the others' sum.

    Raises:
        QuorumMissing: There are fewer.
        InvalidShare: There are more, one is malformed, or two have the same number.
        InvalidOfficers: ``required`` is not 2 to 10.
    """
    check_quorum(required, OFFICERS_MAX)
    if len(shares) < required:
        raise QuorumMissing(f"{required} shares are needed")
    parsed = [parse_share(share) for share in shares[: required + 1]]
    numbers = [number for number, _ in parsed]
    if len(numbers) != required or len(set(numbers)) != required:
        raise InvalidShare(f"exactly {required} shares with different numbers are combined")
    weights = [_weight(number, numbers) for number in numbers]
    octets = [
        sum(weight * value for weight, value in zip(weights, column, strict=True)) % FIELD
        for column in zip(*(values for _, values in parsed), strict=True)
    ]
    if max(octets) > 255:
        return Secret(secrets.token_bytes(KEY_BYTES))
    return Secret(bytes(octets))


def check_quorum(required: int, total: int) -> None:
    """Check a quorum.

    Raises:
        InvalidOfficers: It is not 2 to ``total``, or ``total`` is more than 10.
    """
    if not QUORUM_MIN <= required <= total <= OFFICERS_MAX:
        raise InvalidOfficers(f"the quorum is {QUORUM_MIN} to the number of officers, at most {OFFICERS_MAX}")


def _weight(number: int, numbers: Sequence[int]) -> int:
    """Return the Lagrange weight of one number at 0; the numbers are distinct modulo the field."""
    weight = 1
    for other in numbers:
        if other != number:
            weight = weight * other * pow(other - number, -1, FIELD) % FIELD
    return weight
