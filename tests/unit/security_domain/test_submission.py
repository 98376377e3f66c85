"""Submissions: bound to one attempt, signed as a whole, of one spelling (G4, G8)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security_domain.encoding import canonical
from security_domain.errors import SubmissionRefused
from security_domain.recovery import Recovery
from security_domain.submission import SUBMISSION_BYTES_MAX, make_submission
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import (
    ATTEMPT,
    create,
    everything_said,
    own_words,
    quotes,
)


@pytest.fixture(scope="module")
def file(ten: list[TestOfficer]) -> bytes:
    return create(ten[:3], 2).file


def test_a_submission_shows_no_share(ten: list[TestOfficer], file: bytes) -> None:
    """G3, and two submissions of one share have no ciphertext in common."""
    recovery = Recovery(file, ATTEMPT)
    made = [make_submission(file, ten[0].key, ATTEMPT, recovery.exchange_public_key) for _ in range(2)]
    assert json.loads(made[0])["sealed_share"] != json.loads(made[1])["sealed_share"]
    assert not quotes(made[0].decode(), own_words(file, ten[0]))
    assert len(made[0]) <= SUBMISSION_BYTES_MAX


def test_each_attempt_has_its_own_exchange_key(file: bytes) -> None:
    assert Recovery(file, ATTEMPT).exchange_public_key != Recovery(file, ATTEMPT).exchange_public_key


@pytest.mark.parametrize("attempt", [b"", b"a" * 15, b"a" * 17])
def test_an_attempt_id_has_one_length(ten: list[TestOfficer], file: bytes, attempt: bytes) -> None:
    with pytest.raises(SubmissionRefused):
        Recovery(file, attempt)
    with pytest.raises(SubmissionRefused):
        make_submission(file, ten[0].key, attempt, Recovery(file, ATTEMPT).exchange_public_key)


@pytest.mark.parametrize("exchange_key", [b"", bytes(31), bytes(33), bytes(32), b"\x01" + bytes(31)])
def test_an_officer_does_not_encrypt_to_a_key_that_is_none(
    ten: list[TestOfficer], file: bytes, exchange_key: bytes
) -> None:
    """G3: with a point of small order (RFC 7748 section 6.1) anybody could open the share."""
    with pytest.raises(SubmissionRefused) as refused:
        make_submission(file, ten[0].key, ATTEMPT, exchange_key)
    assert not quotes(everything_said(refused.value), own_words(file, ten[0]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_changed_octet_is_accepted(ten: list[TestOfficer], file: bytes, data: st.DataObject) -> None:
    """G4, by property; the state is as before."""
    recovery = Recovery(file, ATTEMPT)
    good = make_submission(file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    changed = bytearray(good)
    changed[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SubmissionRefused):
        recovery.submit(bytes(changed))
    assert recovery.submit(good).accepted == 1


def test_only_one_spelling_is_accepted(ten: list[TestOfficer], file: bytes) -> None:
    recovery = Recovery(file, ATTEMPT)
    good = make_submission(file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    fields = json.loads(good)
    spellings = [
        good + b" ",
        json.dumps(fields).encode(),
        good.replace(b'"generation":1', b'"generation":2,"generation":1'),
        good.decode().encode("utf-16"),
        good + b" " * SUBMISSION_BYTES_MAX,
    ]
    for spelling in spellings:
        assert json.loads(spelling) == fields
        with pytest.raises(SubmissionRefused):
            recovery.submit(spelling)
    assert recovery.submit(good).accepted == 1


@pytest.mark.parametrize(
    "name", ["attempt_id", "exchange_key_digest", "sealed_share", "signature", "officer"]
)
@pytest.mark.parametrize("value", ["", "*", "\ud800", 1, None, [], "A" * 43])
def test_wrong_fields_are_refused(ten: list[TestOfficer], file: bytes, name: str, value: object) -> None:
    """G8."""
    recovery = Recovery(file, ATTEMPT)
    good = make_submission(file, ten[0].key, ATTEMPT, recovery.exchange_public_key)
    with pytest.raises(SubmissionRefused):
        recovery.submit(canonical({**json.loads(good), name: value}))


@given(st.binary(max_size=300))
def test_any_octets_are_refused(file: bytes, octets: bytes) -> None:
    """G8: a typed refusal, never an accident."""
    with pytest.raises(SubmissionRefused):
        Recovery(file, ATTEMPT).submit(octets)
