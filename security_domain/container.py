"""The security-domain file: canonical JSON, see FORMAT.md. It holds ciphertext only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from security_domain.encoding import canonical, check_object, decode, encode, parse_object
from security_domain.errors import InvalidFile, InvalidOfficers
from security_domain.officers import OFFICERS_MAX, OFFICERS_MIN, QUORUM_MIN, parse_officer
from security_domain.wrapping import JWE_CHARACTERS_MAX

FORMAT = "mhsm-security-domain/1"
FILE_BYTES_MAX = 256 * 1024
GENERATION_MAX = 1_000_000
SHARING_MAX = 1_000_000
_POOL_ID = re.compile(r"[!-~]{1,64}")
_CREATED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
_OWNER_KEY_BYTES = 120
"""SubjectPublicKeyInfo of an uncompressed P-384 point (RFC 5480)."""
_PAYLOAD_BYTES_MAX = 4096

_FIELDS: dict[str, type] = {
    "format": str,
    "pool_id": str,
    "generation": int,
    "sharing": int,
    "required": int,
    "created": str,
    "officers": list,
    "recovery_public_key": str,
    "backup_public_key": str,
    "owner_public_key": str,
    "key_check_value": str,
    "payload": str,
}
_OFFICER_FIELDS: dict[str, type] = {
    "index": int,
    "thumbprint": str,
    "certificate": str,
    "share_jwe": str,
    "share_commitment": str,
}


@dataclass(frozen=True, slots=True)
class OfficerEntry:
    """One officer's part of the file."""

    index: int
    thumbprint: str
    certificate_der: bytes
    share_jwe: str
    share_commitment: bytes

    @property
    def public_key(self) -> RSAPublicKey:
        """Key of the certificate."""
        return parse_officer(self.certificate_der).public_key


@dataclass(frozen=True, slots=True)
class SecurityDomainFile:
    """A parsed security-domain file."""

    pool_id: str
    generation: int
    sharing: int
    required: int
    created: str
    officers: tuple[OfficerEntry, ...]
    recovery_public_key: bytes
    backup_public_key: bytes
    owner_public_key_der: bytes
    key_check_value: bytes
    payload: bytes

    def header(self) -> bytes:
        """Return what the payload authenticates: everything but the payload itself."""
        return canonical({name: value for name, value in self._fields().items() if name != "payload"})

    def serialise(self) -> bytes:
        """Return the file."""
        return canonical(self._fields())

    def officer(self, thumbprint: str) -> OfficerEntry | None:
        """Return the entry of an officer."""
        return next((entry for entry in self.officers if entry.thumbprint == thumbprint), None)

    def _fields(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "pool_id": self.pool_id,
            "generation": self.generation,
            "sharing": self.sharing,
            "required": self.required,
            "created": self.created,
            "officers": [
                {
                    "index": entry.index,
                    "thumbprint": entry.thumbprint,
                    "certificate": encode(entry.certificate_der),
                    "share_jwe": entry.share_jwe,
                    "share_commitment": encode(entry.share_commitment),
                }
                for entry in self.officers
            ],
            "recovery_public_key": encode(self.recovery_public_key),
            "backup_public_key": encode(self.backup_public_key),
            "owner_public_key": encode(self.owner_public_key_der),
            "key_check_value": encode(self.key_check_value),
            "payload": encode(self.payload),
        }


def parse(file: bytes) -> SecurityDomainFile:
    """Parse and check a security-domain file.

    Raises:
        InvalidFile: It is something else, or not canonical.
    """
    fields = parse_object(file, FILE_BYTES_MAX, _FIELDS)
    if fields["format"] != FORMAT:
        raise InvalidFile("the format is not known")
    entries = [_officer(entry) for entry in fields["officers"][: OFFICERS_MAX + 1]]
    if not OFFICERS_MIN <= len(entries) <= OFFICERS_MAX:
        raise InvalidFile("the number of officers is out of bounds")
    if not QUORUM_MIN <= fields["required"] <= len(entries):
        raise InvalidFile("the quorum is out of bounds")
    if [entry.index for entry in entries] != list(range(1, len(entries) + 1)):
        raise InvalidFile("the officers are not numbered from 1")
    if len({entry.public_key.public_numbers().n for entry in entries}) != len(entries):
        raise InvalidFile("two officers have the same key")
    check_identity(fields["pool_id"], fields["generation"])
    if not 1 <= fields["sharing"] <= SHARING_MAX:
        raise InvalidFile("the number of the sharing is out of bounds")
    if not _CREATED.fullmatch(fields["created"]):
        raise InvalidFile("the time of creation is malformed")
    parsed = SecurityDomainFile(
        pool_id=fields["pool_id"],
        generation=fields["generation"],
        sharing=fields["sharing"],
        required=fields["required"],
        created=fields["created"],
        officers=tuple(entries),
        recovery_public_key=decode(fields["recovery_public_key"], 32),
        backup_public_key=decode(fields["backup_public_key"], 32),
        owner_public_key_der=decode(fields["owner_public_key"], _OWNER_KEY_BYTES),
        key_check_value=decode(fields["key_check_value"], 16),
        payload=decode(fields["payload"]),
    )
    if len(parsed.payload) > _PAYLOAD_BYTES_MAX:
        raise InvalidFile("the payload is too large")
    return parsed


def check_identity(pool_id: str, generation: int) -> None:
    """Check what a security domain belongs to.

    Raises:
        InvalidFile: The pool id is not 1-64 printable ASCII characters without spaces, or the
            generation is not 1 to 1,000,000.
    """
    if not _POOL_ID.fullmatch(pool_id) or not 1 <= generation <= GENERATION_MAX:
        raise InvalidFile("the pool id or the generation is out of bounds")


def _officer(value: object) -> OfficerEntry:
    fields = check_object(value, _OFFICER_FIELDS)
    certificate_der = decode(fields["certificate"])
    try:
        officer = parse_officer(certificate_der)
    except InvalidOfficers as error:
        raise InvalidFile(str(error)) from None
    if officer.thumbprint != fields["thumbprint"]:
        raise InvalidFile("a thumbprint is not that of its certificate")
    if len(fields["share_jwe"]) > JWE_CHARACTERS_MAX:
        raise InvalidFile("a wrapped share is too large")
    return OfficerEntry(
        fields["index"],
        fields["thumbprint"],
        certificate_der,
        fields["share_jwe"],
        decode(fields["share_commitment"], 32),
    )
