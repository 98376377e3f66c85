"""The security-domain file: canonical JSON, see FORMAT.md. It holds ciphertext only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from security_domain.encoding import canonical, check_object, decode, encode, parse_object
from security_domain.errors import InvalidFile, InvalidOfficers
from security_domain.officers import OFFICERS_MAX, OFFICERS_MIN, QUORUM_MIN, parse_officer

FORMAT = "mhsm-security-domain/1"
FILE_BYTES_MAX = 256 * 1024
GENERATION_MAX = 1_000_000

_FIELDS: dict[str, type] = {
    "format": str,
    "pool_id": str,
    "generation": int,
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


@dataclass(frozen=True, slots=True)
class SecurityDomainFile:
    """A parsed security-domain file."""

    pool_id: str
    generation: int
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
    if not 1 <= fields["generation"] <= GENERATION_MAX or not 1 <= len(fields["pool_id"]) <= 64:
        raise InvalidFile("the pool id or the generation is out of bounds")
    parsed = SecurityDomainFile(
        pool_id=fields["pool_id"],
        generation=fields["generation"],
        required=fields["required"],
        created=fields["created"],
        officers=tuple(entries),
        recovery_public_key=decode(fields["recovery_public_key"], 32),
        backup_public_key=decode(fields["backup_public_key"], 32),
        owner_public_key_der=decode(fields["owner_public_key"]),
        key_check_value=decode(fields["key_check_value"], 16),
        payload=decode(fields["payload"]),
    )
    if parsed.serialise() != file:
        raise InvalidFile("the file is not canonical")
    return parsed


def _officer(value: object) -> OfficerEntry:
    fields = check_object(value, _OFFICER_FIELDS)
    certificate_der = decode(fields["certificate"])
    try:
        officer = parse_officer(certificate_der)
    except InvalidOfficers as error:
        raise InvalidFile(str(error)) from None
    if officer.thumbprint != fields["thumbprint"]:
        raise InvalidFile("a thumbprint is not that of its certificate")
    return OfficerEntry(
        fields["index"],
        fields["thumbprint"],
        certificate_der,
        fields["share_jwe"],
        decode(fields["share_commitment"], 32),
    )
