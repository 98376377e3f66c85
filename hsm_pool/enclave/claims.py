"""The claims of evidence: an entity attestation token (EAT, RFC 9711) in deterministic CBOR.

Numbers below 0 are private claims (RFC 8392: below -65536), all others are registered ones.
This docstring and the table below are the profile that ``eat_profile`` names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

PROFILE: Final = "tag:mhsm-pool-simulator,2026:evidence/v1"
"""Profile URI (RFC 4151); another meaning of the claims is another profile."""

_SUBJECT = re.compile(r"spiffe://([0-9a-f]{32})/partition/([0-9]{1,3})")
_DIGEST_BYTES = 32
_MEASUREMENT_BYTES = 48
_DEVICE_ID_BYTES = 33
_TEXT_LENGTH_MAX = 64
_NUMBER_MAX = 2**53
"""Numbers stay exact in JSON, where policies compare them."""

# RFC 8392 and RFC 9711
_SUB, _EXP, _IAT = 2, 4, 6
_NONCE, _UEID, _DBGSTAT, _EAT_PROFILE, _BOOTCOUNT, _SWNAME, _SWVERSION = 10, 256, 263, 265, 267, 270, 271
# private
_PRODUCT_ID, _SECURITY_VERSION, _MEASUREMENT = -70001, -70002, -70003
_CLIENT_TLS_KEY, _PEER_TLS_KEY, _EXCHANGE_KEY, _REPORT_DATA, _SIGNER = -70004, -70005, -70006, -70007, -70008


class DebugStatus(IntEnum):
    """dbgstat of RFC 9711, section 4.2.9."""

    ENABLED = 0
    DISABLED = 1
    DISABLED_SINCE_BOOT = 2
    DISABLED_PERMANENTLY = 3
    DISABLED_FULLY_AND_PERMANENTLY = 4

    @property
    def text(self) -> str:
        """The JSON form of the RFC, such as "disabled-since-boot"."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class Claims:
    """What evidence says. Digests are SHA-256, the measurement is SHA-384."""

    pool_id: str
    partition_index: int
    nonce: bytes
    device_id: bytes
    """UEID of the node: 01, then the digest of its platform key (RFC 9711, section 4.2.1)."""
    debug_status: DebugStatus
    boot_count: int
    """How often the partition started: its incarnation."""
    software_name: str
    software_version: str
    product_id: int
    security_version: int
    measurement: bytes
    client_tls_key: bytes
    """Digest of the key with which it serves clients (SubjectPublicKeyInfo)."""
    peer_tls_key: bytes
    """Digest of the key with which it meets other partitions (SubjectPublicKeyInfo)."""
    report_data: bytes
    """Digest of what the evidence was made for."""
    issued_at: int
    """Seconds since 1970."""
    signer: bytes = b""
    """Digest of the root metadata under which the running image was signed; b"" for the installed
    distribution, which nobody signs."""
    exchange_key: bytes = b""
    """Digest of the HPKE public key to encrypt to; b"" when there is none."""
    expires_at: int = 0
    """Seconds since 1970; 0 when the nonce alone says how fresh it is."""

    def encode(self) -> bytes:
        """Return the claims as deterministic CBOR (RFC 8949, section 4.2.1)."""
        import cbor2

        claims: dict[int, Any] = {
            _SUB: f"spiffe://{self.pool_id}/partition/{self.partition_index}",
            _IAT: self.issued_at,
            _NONCE: self.nonce,
            _UEID: self.device_id,
            _DBGSTAT: int(self.debug_status),
            _EAT_PROFILE: PROFILE,
            _BOOTCOUNT: self.boot_count,
            _SWNAME: self.software_name,
            _SWVERSION: [self.software_version],
            _PRODUCT_ID: self.product_id,
            _SECURITY_VERSION: self.security_version,
            _MEASUREMENT: self.measurement,
            _CLIENT_TLS_KEY: self.client_tls_key,
            _PEER_TLS_KEY: self.peer_tls_key,
            _REPORT_DATA: self.report_data,
        }
        if self.signer:
            claims[_SIGNER] = self.signer
        if self.exchange_key:
            claims[_EXCHANGE_KEY] = self.exchange_key
        if self.expires_at:
            claims[_EXP] = self.expires_at
        return cbor2.dumps(claims, canonical=True)

    @staticmethod
    def decode(octets: bytes) -> Claims:
        """Return the claims of a token of this profile.

        Raises:
            ValueError: The octets are not exactly what :meth:`encode` would make of some claims.
        """
        import cbor2

        claims = cbor2.loads(octets)
        if not isinstance(claims, dict) or claims.get(_EAT_PROFILE) != PROFILE:
            raise ValueError("the claims are of another profile")
        subject = _SUBJECT.fullmatch(_text(claims, _SUB, 128))
        if subject is None:
            raise ValueError("the subject is no partition")
        version = claims.get(_SWVERSION)
        if not isinstance(version, list) or len(version) != 1:
            raise ValueError("the software version is not of this profile")
        found = Claims(
            pool_id=subject[1],
            partition_index=int(subject[2]),
            nonce=_octets(claims, _NONCE, 8, 64),
            device_id=_octets(claims, _UEID, _DEVICE_ID_BYTES),
            debug_status=DebugStatus(_number(claims, _DBGSTAT)),
            boot_count=_number(claims, _BOOTCOUNT),
            software_name=_text(claims, _SWNAME, _TEXT_LENGTH_MAX),
            software_version=_text({_SWVERSION: version[0]}, _SWVERSION, _TEXT_LENGTH_MAX),
            product_id=_number(claims, _PRODUCT_ID),
            security_version=_number(claims, _SECURITY_VERSION),
            measurement=_octets(claims, _MEASUREMENT, _MEASUREMENT_BYTES),
            client_tls_key=_octets(claims, _CLIENT_TLS_KEY, _DIGEST_BYTES),
            peer_tls_key=_octets(claims, _PEER_TLS_KEY, _DIGEST_BYTES),
            report_data=_octets(claims, _REPORT_DATA, _DIGEST_BYTES),
            issued_at=_number(claims, _IAT),
            signer=_octets(claims, _SIGNER, _DIGEST_BYTES) if _SIGNER in claims else b"",
            exchange_key=_octets(claims, _EXCHANGE_KEY, _DIGEST_BYTES) if _EXCHANGE_KEY in claims else b"",
            expires_at=_number(claims, _EXP) if _EXP in claims else 0,
        )
        if found.encode() != octets:
            raise ValueError("the claims are not in their only form")
        return found

    def named(self) -> dict[str, Any]:
        """Return the claims under their JSON names, as policies and people see them; octets in hex."""
        named: dict[str, Any] = {
            "sub": f"spiffe://{self.pool_id}/partition/{self.partition_index}",
            "iat": self.issued_at,
            "eat_nonce": self.nonce.hex(),
            "ueid": self.device_id.hex(),
            "dbgstat": self.debug_status.text,
            "eat_profile": PROFILE,
            "bootcount": self.boot_count,
            "swname": self.software_name,
            "swversion": self.software_version,
            "mhsm": {
                "product_id": self.product_id,
                "security_version": self.security_version,
                "measurement": self.measurement.hex(),
                "client_tls_key": self.client_tls_key.hex(),
                "peer_tls_key": self.peer_tls_key.hex(),
                "report_data": self.report_data.hex(),
            },
        }
        if self.signer:
            named["mhsm"]["signer"] = self.signer.hex()
        if self.exchange_key:
            named["mhsm"]["exchange_key"] = self.exchange_key.hex()
        if self.expires_at:
            named["exp"] = self.expires_at
        return named


def _number(claims: dict[int, Any], label: int) -> int:
    value = claims.get(label)
    if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
        raise ValueError(f"claim {label} is not a number")
    return value


def _text(claims: dict[int, Any], label: int, length_max: int) -> str:
    value = claims.get(label)
    if not isinstance(value, str) or not 1 <= len(value) <= length_max:
        raise ValueError(f"claim {label} is not a text")
    return value


def _octets(claims: dict[int, Any], label: int, least: int, most: int | None = None) -> bytes:
    value = claims.get(label)
    if not isinstance(value, bytes) or not least <= len(value) <= (most or least):
        raise ValueError(f"claim {label} is not so many octets")
    return value
