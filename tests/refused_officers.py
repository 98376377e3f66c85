"""Officers and quorums that no security domain is made for, each with words of the refusal (G4, G8)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.running_pool import TestOfficer


@dataclass(frozen=True, slots=True)
class RefusedOfficers:
    """Certificates (DER) and a quorum that do not go together, and what the refusal says of it."""

    certificates_der: list[bytes]
    required: int
    said: str


def certificate(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """Return a self-signed certificate, DER."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "officer")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def refused_officers(officers: list[TestOfficer]) -> dict[str, RefusedOfficers]:
    """Return what is refused, by name; what is not at fault in a case is of these three good officers."""
    good = [officer.certificate_der for officer in officers]
    small, smaller = (certificate(rsa.generate_private_key(65537, bits)) for bits in (2047, 1024))
    curve = certificate(ec.generate_private_key(ec.SECP256R1()))
    renewed = certificate(officers[0].key)
    number, quorum, same = "3 to 10 officers", "the quorum is 2 to the number", "have the same key"
    return {
        "no officers": RefusedOfficers([], 2, "officers are"),
        "two officers": RefusedOfficers(good[:2], 2, number),
        "twelve officers": RefusedOfficers(good * 4, 2, number),
        "a quorum of none": RefusedOfficers(good, 0, quorum),
        "a quorum of one": RefusedOfficers(good, 1, quorum),
        "a quorum of more than there are": RefusedOfficers(good, 4, quorum),
        "RSA-1024": RefusedOfficers([*good[:2], smaller], 2, "1024 bits, not 2048"),
        "RSA-2047": RefusedOfficers([*good[:2], small], 2, "2047 bits, not 2048"),
        "an EC key": RefusedOfficers([*good[:2], curve], 2, "not an RSA key"),
        "a certificate twice": RefusedOfficers([*good[:2], good[0]], 2, same),
        "a key in two certificates": RefusedOfficers([*good[:2], renewed], 2, same),
        "a cut certificate": RefusedOfficers([*good[:2], good[2][:-1]], 2, "not readable"),
        "an empty certificate": RefusedOfficers([*good[:2], b""], 2, "not readable"),
        "a large certificate": RefusedOfficers([*good[:2], b"x" * 20_000], 2, "too large"),
    }
