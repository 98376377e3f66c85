"""Officers: holders of the RSA keys to which shares are wrapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from security_domain.encoding import encode
from security_domain.errors import InvalidOfficers

OFFICERS_MIN = 3
OFFICERS_MAX = 10
QUORUM_MIN = 2
RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
RSA_BITS_MADE = 3072
CERTIFICATE_BYTES_MAX = 8 * 1024
"""So that a file with ten officers stays within its bound."""
PEM_BYTES_MAX = 32 * 1024
_VALIDITY = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Officer:
    """An officer's certificate and its thumbprint (x5t#S256: SHA-256 of the DER, base64url)."""

    certificate_der: bytes
    thumbprint: str
    public_key: rsa.RSAPublicKey


def parse_officer(certificate_der: bytes) -> Officer:
    """Parse an officer's certificate; only its key is used, so its dates are not looked at (as Azure).

    Raises:
        InvalidOfficers: It is no certificate of an RSA key of 2048 bits or more.
    """
    if len(certificate_der) > CERTIFICATE_BYTES_MAX:
        raise InvalidOfficers(f"an officer's certificate has more than {CERTIFICATE_BYTES_MAX} bytes")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        key = certificate.public_key()
    except Exception:  # noqa: BLE001 - parsers raise many kinds
        raise InvalidOfficers("an officer's certificate is not readable") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise InvalidOfficers("an officer's key is not an RSA key")
    _check_size(key.key_size)
    return Officer(certificate_der, encode(hashlib.sha256(certificate_der).digest()), key)


def _check_size(bits: int) -> None:
    if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
        raise InvalidOfficers(f"an officer's RSA key has {bits} bits, not {RSA_BITS_MIN} to {RSA_BITS_MAX}")


def check_officers(certificates_der: Sequence[bytes], required: int) -> list[Officer]:
    """Parse the officers of a new security domain.

    Raises:
        InvalidOfficers: Too few or too many, a repeated key, or a quorum that does not fit.
    """
    if not OFFICERS_MIN <= len(certificates_der) <= OFFICERS_MAX:
        raise InvalidOfficers(f"{OFFICERS_MIN} to {OFFICERS_MAX} officers are needed")
    if not QUORUM_MIN <= required <= len(certificates_der):
        raise InvalidOfficers(f"the quorum is {QUORUM_MIN} to the number of officers")
    officers = [parse_officer(certificate) for certificate in certificates_der]
    if len({officer.public_key.public_numbers().n for officer in officers}) != len(officers):
        raise InvalidOfficers("two officers have the same key")
    return officers


def make_officer(common_name: str) -> tuple[bytes, rsa.RSAPrivateKey]:
    """Make an officer's RSA-3072 key and self-signed certificate (PEM), for rehearsals."""
    key = rsa.generate_private_key(65537, RSA_BITS_MADE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _VALIDITY)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key


def certificate_der(pem: bytes) -> bytes:
    """Return the DER of an officer's PEM certificate.

    Raises:
        InvalidOfficers: It is no certificate, or not an officer's.
    """
    return parse_officer(pem_to_der(pem)).certificate_der


def pem_to_der(pem: bytes) -> bytes:
    """Return the DER of any PEM certificate.

    Raises:
        InvalidOfficers: It is no certificate.
    """
    if len(pem) > PEM_BYTES_MAX:
        raise InvalidOfficers("a certificate file is too large")
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    except ValueError:
        raise InvalidOfficers("a certificate is not readable") from None


def certificate_pem(der: bytes) -> bytes:
    """Return the PEM of a certificate."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def save_private_key(key: rsa.RSAPrivateKey, passphrase: bytes | None = None) -> bytes:
    """Return an officer's key as PKCS#8 PEM, encrypted when there is a passphrase (RFC 5958)."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def load_private_key(pem: bytes, ask_passphrase: Callable[[], bytes] | None = None) -> rsa.RSAPrivateKey:
    """Load an officer's key.

    Args:
        pem: The key file.
        ask_passphrase: Called once, and only if the key is encrypted.

    Raises:
        InvalidOfficers: It is no RSA key of 2048 bits or more, or the passphrase is wrong or missing.
    """
    if len(pem) > PEM_BYTES_MAX:
        raise InvalidOfficers("an officer's key file is too large")
    try:
        try:
            key = serialization.load_pem_private_key(pem, None)
        except TypeError:  # encrypted
            if ask_passphrase is None:
                raise InvalidOfficers(
                    "an officer's key file is encrypted: its passphrase is needed"
                ) from None
            key = serialization.load_pem_private_key(pem, ask_passphrase())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidOfficers("an officer's key file is not readable, or the passphrase is wrong") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise InvalidOfficers("an officer's key is not an RSA key")
    _check_size(key.key_size)
    return key
