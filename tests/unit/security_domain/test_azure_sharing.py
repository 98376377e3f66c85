"""Azure's sharing over GF(257): every quorum opens, fewer shares say nothing (G4)."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain.azure import sharing
from security_domain.errors import InvalidOfficers, InvalidShare, QuorumMissing
from security_domain.secret import Secret

KEY = bytes(range(0, 256, 8))
SIGMAS = 7
"""A right implementation fails a statistical test here less than once in a hundred million runs."""


def raw(number: int, values: list[int]) -> Secret:
    """Return a share of any numbers, also of ones that do not belong there."""
    return Secret(b"".join((number << 9 | value).to_bytes(2, "little") for value in values))


@pytest.mark.parametrize(
    ("required", "total"), [(t, n) for n in range(2, 7) for t in range(2, n + 1)], ids=str
)
def test_every_quorum_in_every_order_of_a_small_sharing_opens(required: int, total: int) -> None:
    """G4, exhaustively: all quorums; all orders where they are few."""
    shares = sharing.split(Secret(KEY), required, total)
    chosen = itertools.permutations if required <= 3 else itertools.combinations
    for quorum in chosen(shares, required):
        assert sharing.combine(quorum, required).reveal() == KEY


@given(st.data(), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_any_quorum_opens_and_one_fewer_does_not(data: st.DataObject, key: bytes) -> None:
    """G4 for 2 <= t <= n <= 10 and any key."""
    total = data.draw(st.integers(2, 10))
    required = data.draw(st.integers(2, total))
    shares = sharing.split(Secret(key), required, total)
    quorum = data.draw(st.permutations(shares))[:required]
    assert sharing.combine(quorum, required).reveal() == key
    with pytest.raises(QuorumMissing):
        sharing.combine(quorum[:-1], required)
    if required > 2:  # as if the quorum were smaller
        assert sharing.combine(quorum[:-1], required - 1).reveal() != key


@pytest.mark.parametrize("number", [1, 2, 10, 126])
def test_one_share_of_two_says_nothing_about_the_byte(number: int) -> None:
    """G4, exhaustively: every secret byte leads to every value exactly once."""
    for octet in (0, 1, 128, 255):
        values = [
            sharing.parse_share(sharing.make_share([[octet, coefficient]] * 32, number))[1][0]
            for coefficient in range(sharing.FIELD)
        ]
        assert sorted(values) == list(range(sharing.FIELD))


def test_coefficients_are_uniform_and_fresh_for_every_byte_and_split() -> None:
    """G4: equal bytes do not share a polynomial, and no value is likelier than another."""
    rounds = 1000
    rows = []
    for _ in range(rounds):
        one, two = (sharing.parse_share(share)[1] for share in sharing.split(Secret(bytes(32)), 3, 3)[:2])
        # f(x) = a x + b x^2 with secret 0: 2 f(1) - f(2) = -2 b, and a = f(1) - b.
        square = [(2 * v - w) * pow(-2, -1, 257) % 257 for v, w in zip(one, two, strict=True)]
        rows.append([((v - b) % 257, b) for v, b in zip(one, square, strict=True)])
    flat = [pair for row in rows for pair in row]
    for coefficients in ([a for a, _ in flat], [b for _, b in flat]):
        counts = Counter(coefficients)
        assert all(near(counts[value], len(flat)) for value in range(257))
    assert near(sum(a == b for a, b in flat), len(flat))
    assert near(sum(x == y for row in rows for x, y in itertools.pairwise([a for a, _ in row])), 31 * rounds)
    again = [x == y for one, two in itertools.pairwise(rows) for (x, _), (y, _) in zip(one, two, strict=True)]
    assert near(sum(again), len(again))


def near(count: int, trials: int) -> bool:
    """Whether something that happens once in 257 happened about as often as it should."""
    expected = trials / 257
    return bool(abs(count - expected) < SIGMAS * expected**0.5)


@pytest.mark.parametrize(
    "malformed",
    [
        Secret(b""),
        Secret(bytes(63)),
        Secret(bytes(65)),
        Secret(bytes(64)),  # number 0
        raw(127, [5] * 32),
        raw(2, [5] * 31),
        raw(2, [5] * 33),
        raw(2, [257, *[5] * 31]),
        raw(2, [*[5] * 31, 511]),
        Secret(raw(2, [5] * 31).reveal() + raw(3, [5]).reveal()),
    ],
    ids=lambda share: share.reveal().hex()[-8:] or "empty",
)
def test_malformed_shares_are_refused(malformed: Secret) -> None:
    good = sharing.split(Secret(KEY), 2, 3)[0]
    for shares in ([good, malformed], [malformed, good]):
        with pytest.raises(InvalidShare):
            sharing.combine(shares, 2)


def test_repeated_or_surplus_shares_are_refused() -> None:
    shares = sharing.split(Secret(KEY), 2, 3)
    other = sharing.split(Secret(KEY), 2, 3)
    for wrong in ([shares[0], shares[0]], [shares[0], other[0]], shares, [*shares[:2], shares[0]]):
        with pytest.raises(InvalidShare):
            sharing.combine(wrong, 2)
    assert sharing.combine([shares[0], other[1]], 2).reveal() != KEY


@pytest.mark.parametrize(("required", "total"), [(0, 3), (1, 3), (4, 3), (-1, 3), (2, 11), (11, 11), (2, 1)])
def test_quorums_out_of_bounds_are_refused(required: int, total: int) -> None:
    with pytest.raises(InvalidOfficers):
        sharing.split(Secret(KEY), required, total)
    if not 2 <= required <= 10:
        with pytest.raises(InvalidOfficers):
            sharing.combine([], required)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_only_keys_of_32_bytes_are_split(length: int) -> None:
    with pytest.raises(InvalidShare):
        sharing.split(Secret(bytes(length)), 2, 3)


def test_a_sum_that_is_no_byte_is_no_other_error() -> None:
    """Else whoever forges one share could find the others' sum, byte by byte, from which error comes."""
    shares = [raw(1, [256] * 32), raw(2, [256] * 32)]  # the constant 256
    first, second = (sharing.combine(shares, 2).reveal() for _ in range(2))
    assert len(first) == 32
    assert first != second


def test_the_largest_share_number_combines() -> None:
    polynomials = [[octet, int.from_bytes(os.urandom(1), "big")] for octet in KEY]
    shares = [sharing.make_share(polynomials, number) for number in (126, 1)]
    assert sharing.combine(shares, 2).reveal() == KEY
