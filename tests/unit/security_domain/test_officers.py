"""Officers: which keys and quorums are acceptable (Azure's limits), and how their keys are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from security_domain import container, domain, officers
from security_domain.errors import InvalidFile, InvalidOfficers
from tests.running_pool import TestOfficer
from tests.unit.security_domain.rehearsal import MESSAGE, POOL, create, self_signed, submit_all

PASSPHRASE = b"a passphrase of this test"


@pytest.mark.parametrize(
    ("pick", "required"),
    [
        (lambda ten: ten[:2], 2),
        (lambda ten: [*ten, ten[0]], 2),
        (lambda ten: ten[:3], 1),
        (lambda ten: ten[:3], 0),
        (lambda ten: ten[:3], -1),
        (lambda ten: ten[:3], 4),
        (lambda ten: ten, 11),
        (lambda ten: [ten[0], ten[1], ten[0]], 2),
    ],
    ids=[
        "two officers",
        "eleven officers",
        "quorum of one",
        "quorum of none",
        "negative quorum",
        "quorum above officers",
        "quorum of eleven",
        "same officer twice",
    ],
)
def test_officers_and_quorum_are_checked(
    ten: list[TestOfficer], pick: Callable[[list[TestOfficer]], list[TestOfficer]], required: int
) -> None:
    with pytest.raises(InvalidOfficers):
        create(pick(ten), required)


def test_unacceptable_certificates_are_refused(ten: list[TestOfficer]) -> None:
    """RSA of 2048 bits or more, each key once, a certificate of bounded size."""
    refused = {
        "1024 bits": self_signed(rsa.generate_private_key(65537, 1024), "short"),
        "P-256": self_signed(ec.generate_private_key(ec.SECP256R1()), "curve"),
        "P-384": self_signed(ec.generate_private_key(ec.SECP384R1()), "curve"),
        "no certificate": b"no certificate",
        "nothing": b"",
        "cut short": ten[2].certificate_der[:-1],
        "more behind it": ten[2].certificate_der + b"\x00",
        "key used twice": self_signed(ten[0].key, "the same key in another certificate"),
        "too large": self_signed(ten[2].key, "large", padding_bytes=officers.CERTIFICATE_BYTES_MAX),
    }
    for name, bad in refused.items():
        with pytest.raises(InvalidOfficers):
            domain.create(POOL, 1, [ten[0].certificate_der, ten[1].certificate_der, bad], 2)
            pytest.fail(name)


def test_ten_of_the_largest_certificates_fit_into_a_file(ten: list[TestOfficer]) -> None:
    """What is created can be read: the bounds of certificate and file agree."""
    large = [
        TestOfficer(self_signed(officer.key, "large", officers.CERTIFICATE_BYTES_MAX - 1000), officer.key)
        for officer in ten
    ]
    new = create(large, 10)
    assert len(new.file) < container.FILE_BYTES_MAX
    assert submit_all(new.file, large)


@pytest.mark.parametrize(
    ("pool_id", "generation"),
    [
        ("", 1),
        ("p" * 65, 1),
        ("p p", 1),
        ("p\n", 1),
        ("\u00e9", 1),
        ("\ud800", 1),
        ("p", 0),
        ("p", 1_000_001),
    ],
)
def test_a_domain_that_could_not_be_read_is_not_made(
    ten: list[TestOfficer], pool_id: str, generation: int
) -> None:
    """G8: refused when it is made, not when it is needed."""
    with pytest.raises(InvalidFile):
        create(ten[:3], 2, generation, pool_id)


def test_made_officers_are_acceptable() -> None:
    certificate_pem, key = officers.make_officer("officer-1")
    parsed = officers.parse_officer(officers.certificate_der(certificate_pem))
    assert parsed.public_key.key_size == 3072
    assert parsed.public_key.public_numbers() == key.public_key().public_numbers()


@pytest.mark.parametrize("pem", [b"", MESSAGE, b"-----BEGIN CERTIFICATE-----\n", b"x" * 100_000])
def test_junk_is_refused_as_a_certificate_and_as_a_key(pem: bytes) -> None:
    """G8."""
    with pytest.raises(InvalidOfficers):
        officers.certificate_der(pem)
    with pytest.raises(InvalidOfficers):
        officers.load_private_key(pem)


def test_a_private_key_is_kept_under_a_passphrase(ten: list[TestOfficer]) -> None:
    """G3: the passphrase is asked for only when it is needed, and nothing opens without it."""
    asked = []

    def ask() -> bytes:
        asked.append(1)
        return PASSPHRASE

    key = ten[0].key
    plain, encrypted = officers.save_private_key(key), officers.save_private_key(key, PASSPHRASE)
    assert officers.load_private_key(plain, ask).private_numbers() == key.private_numbers()
    assert not asked
    assert officers.load_private_key(encrypted, ask).private_numbers() == key.private_numbers()
    assert asked == [1]
    with pytest.raises(InvalidOfficers, match="passphrase is needed"):
        officers.load_private_key(encrypted)
    for wrong in (b"wrong", b""):
        with pytest.raises(InvalidOfficers) as refused:
            officers.load_private_key(encrypted, lambda wrong=wrong: wrong)  # type: ignore[misc]
        assert PASSPHRASE.decode() not in str(refused.value)


def test_keys_of_other_kinds_are_not_loaded() -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 1024)):
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with pytest.raises(InvalidOfficers):
            officers.load_private_key(pem)
