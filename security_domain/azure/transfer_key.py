"""The transfer key: the exchange certificate to which a restore blob is encrypted, as a JWK (RFC 7517)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from security_domain.azure.items import parse_json
from security_domain.encoding import canonical, encode
from security_domain.errors import InvalidFile
from security_domain.officers import RSA_BITS_MADE, RSA_BITS_MAX, RSA_BITS_MIN

CERTIFICATE_BYTES_MAX = 32 * 1024
"""Azure's own carries an attestation of some kilobytes."""
_COMMON_NAME = re.compile(r"[ -~]{1,64}")
_YEAR_MIN = 1950
_FIELDS: dict[str, type] = {
    "e": str,
    "key_ops": list,
    "kid": str,
    "kty": str,
    "n": str,
    "x5c": list,
    "x5t": str,
    "x5t#S256": str,
}


@dataclass(frozen=True, slots=True)
class ExchangeKey:
    """The key of one recovery and its self-signed certificate; it must not outlive the recovery."""

    private_key: rsa.RSAPrivateKey
    certificate_der: bytes


def make_exchange_key(common_name: str, not_before: datetime, not_after: datetime) -> ExchangeKey:
    """Make an RSA-3072 key and its certificate.

    Args:
        common_name: Host name of the HSM, 1 to 64 printable ASCII characters.
        not_before: Start of validity, with a time zone.
        not_after: End of validity, later than its start.

    Raises:
        InvalidFile: The name or the validity is not acceptable.
    """
    if not _COMMON_NAME.fullmatch(common_name):
        raise InvalidFile("the common name has not 1 to 64 printable ASCII characters")
    if not_before.tzinfo is None or not_after.tzinfo is None or not_before >= not_after:
        raise InvalidFile("the validity has no time zone, or ends before it starts")
    if not_before.year <= _YEAR_MIN:
        raise InvalidFile("the validity starts too early for X.509")
    key = rsa.generate_private_key(65537, RSA_BITS_MADE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return ExchangeKey(key, certificate.public_bytes(serialization.Encoding.DER))


def transfer_key(certificate_der: bytes) -> str:
    """Return the transfer key of an exchange certificate.

    Raises:
        InvalidFile: It is no certificate of an RSA key of 2048 to 8192 bits.
    """
    return canonical(_jwk(certificate_der)).decode()


def parse_transfer_key(text: str) -> bytes:
    """Return the exchange certificate (DER) of a transfer key.

    Raises:
        InvalidFile: It is something else, or its parts disagree.
    """
    octets = b""
    with contextlib.suppress(UnicodeEncodeError):
        octets = text.encode("ascii")
    fields = parse_json(octets, _FIELDS)
    if len(fields["x5c"]) != 1 or not isinstance(fields["x5c"][0], str):
        raise InvalidFile("a transfer key has one certificate")
    certificate_der = b""
    with contextlib.suppress(ValueError, binascii.Error):
        certificate_der = base64.b64decode(fields["x5c"][0], validate=True)
    expected = _jwk(certificate_der)
    if any(fields[name] != expected[name] for name in ("e", "kty", "n", "x5t", "x5t#S256")):
        raise InvalidFile("the parts of a transfer key disagree")
    return certificate_der


def thumbprint(certificate_der: bytes) -> str:
    """Return SHA-256 of a certificate, base64url (x5t#S256)."""
    return encode(hashlib.sha256(certificate_der).digest())


def public_key(certificate_der: bytes) -> rsa.RSAPublicKey:
    """Return the key of an exchange certificate.

    Raises:
        InvalidFile: It is no certificate of an RSA key of 2048 to 8192 bits.
    """
    if len(certificate_der) > CERTIFICATE_BYTES_MAX:
        raise InvalidFile(f"an exchange certificate has more than {CERTIFICATE_BYTES_MAX} bytes")
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except Exception:  # noqa: BLE001 - parsers raise many kinds
        raise InvalidFile("an exchange certificate is not readable") from None
    if not isinstance(key, rsa.RSAPublicKey) or not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
        raise InvalidFile(f"an exchange key is not RSA of {RSA_BITS_MIN} to {RSA_BITS_MAX} bits")
    return key


def _jwk(certificate_der: bytes) -> dict[str, Any]:
    numbers = public_key(certificate_der).public_numbers()
    return {
        "e": _integer(numbers.e),
        "key_ops": ["wrapKey", "verify", "encrypt"],
        "kid": "not used",
        "kty": "RSA",
        "n": _integer(numbers.n),
        "x5c": [base64.b64encode(certificate_der).decode()],
        # SHA-1 as RFC 7517 section 4.8 has it: a name, nothing is trusted because of it.
        "x5t": encode(hashlib.sha1(certificate_der, usedforsecurity=False).digest()),
        "x5t#S256": thumbprint(certificate_der),
    }


def _integer(number: int) -> str:
    return encode(number.to_bytes((number.bit_length() + 7) // 8, "big"))
