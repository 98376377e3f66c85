"""The claims of a key attestation: a CBOR web token (RFC 8392) about one half of one key version.

Numbers below 0 are private claims. This docstring and the table below are the profile that
``eat_profile`` names. Only what never changes is claimed, so that an attestation stays true: nothing
of attributes, operations, tags or policies, and no time.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from hsm_pool import limits
from hsm_pool.core.model import Curve, KeyOrigin, KeyType, KeyVersionRecord

K = TypeVar("K")

PROFILE: Final = "tag:mhsm-pool-simulator,2026:key-attestation/v1"
"""Profile URI (RFC 4151); another meaning of the claims is another profile."""

_ISSUER = re.compile(r"spiffe://([0-9a-f]{32})/partition/([0-9]{1,3})")
_SUBJECT = re.compile(rf"keys/([0-9a-zA-Z-]{{1,{limits.KEY_ID_LENGTH_MAX}}})/versions/([0-9a-f]{{32}})")
_DIGEST_BYTES = 32
_SIZE_BITS_MAX = 65_536

# RFC 8392 and RFC 9711
_ISS, _SUB, _EAT_PROFILE = 1, 2, 265
# private
_PART, _KEY_TYPE, _CURVE, _SIZE_BITS = -70101, -70102, -70103, -70104
_PUBLIC_KEY, _EXPORTABLE, _ORIGIN = -70105, -70106, -70107


class Part(StrEnum):
    """Which half of a key is attested; a symmetric key has a private one only."""

    PRIVATE = "private"
    PUBLIC = "public"


_KEY_TYPES = {key_type: key_type.azure_name for key_type in KeyType}
_CURVES = {curve: curve.azure_name for curve in Curve}
_PARTS = {part: part.value for part in Part}
_ORIGINS = {origin: origin.name.lower() for origin in KeyOrigin}


@dataclass(frozen=True, slots=True)
class KeyClaims:
    """What is said of a key version. Nothing of it is secret."""

    pool_id: str
    partition_index: int
    """Which partition says so."""
    key_id: str
    version_id: str
    part: Part
    key_type: KeyType
    curve: Curve
    size_bits: int
    public_key: bytes
    """SHA-256 of the SubjectPublicKeyInfo; b"" for a symmetric key."""
    exportable: bool
    """Whether it may ever leave the pool other than in a backup; fixed when it was made."""
    origin: KeyOrigin

    @staticmethod
    def of(version: KeyVersionRecord, part: Part, pool_id: str, partition_index: int) -> KeyClaims:
        """Return what a partition says of a version."""
        return KeyClaims(
            pool_id=pool_id,
            partition_index=partition_index,
            key_id=version.key_id,
            version_id=version.version_id,
            part=part,
            key_type=version.key_type,
            curve=version.curve,
            size_bits=version.size_bits,
            public_key=hashlib.sha256(version.public_key_der).digest() if version.public_key_der else b"",
            exportable=version.exportable,
            origin=version.origin,
        )

    def encode(self) -> bytes:
        """Return the claims as deterministic CBOR (RFC 8949, section 4.2.1)."""
        import cbor2

        claims: dict[int, Any] = {
            _ISS: f"spiffe://{self.pool_id}/partition/{self.partition_index}",
            _SUB: f"keys/{self.key_id}/versions/{self.version_id}",
            _EAT_PROFILE: PROFILE,
            _PART: _PARTS[self.part],
            _KEY_TYPE: _KEY_TYPES[self.key_type],
            _CURVE: _CURVES[self.curve],
            _SIZE_BITS: self.size_bits,
            _PUBLIC_KEY: self.public_key,
            _EXPORTABLE: self.exportable,
            _ORIGIN: _ORIGINS[self.origin],
        }
        return cbor2.dumps(claims, canonical=True)

    @staticmethod
    def decode(octets: bytes) -> KeyClaims:
        """Return the claims of a token of this profile.

        Raises:
            ValueError: The octets are not exactly what :meth:`encode` would make of some claims.
        """
        import cbor2

        claims = cbor2.loads(octets)
        if not isinstance(claims, dict) or claims.get(_EAT_PROFILE) != PROFILE:
            raise ValueError("the claims are of another profile")
        issuer, subject = _matched(_ISSUER, claims, _ISS), _matched(_SUBJECT, claims, _SUB)
        size_bits, public_key = claims.get(_SIZE_BITS), claims.get(_PUBLIC_KEY)
        exportable = claims.get(_EXPORTABLE)
        if type(size_bits) is not int or not 0 < size_bits <= _SIZE_BITS_MAX:
            raise ValueError("the size is no number of bits")
        if not isinstance(public_key, bytes) or len(public_key) not in {0, _DIGEST_BYTES}:
            raise ValueError("the public key is no digest")
        if type(exportable) is not bool:
            raise ValueError("exportable is not true or false")
        found = KeyClaims(
            pool_id=issuer[1],
            partition_index=int(issuer[2]),
            key_id=subject[1],
            version_id=subject[2],
            part=_named(_PARTS, claims.get(_PART)),
            key_type=_named(_KEY_TYPES, claims.get(_KEY_TYPE)),
            curve=_named(_CURVES, claims.get(_CURVE)),
            size_bits=size_bits,
            public_key=public_key,
            exportable=exportable,
            origin=_named(_ORIGINS, claims.get(_ORIGIN)),
        )
        if found.encode() != octets:
            raise ValueError("the claims are not in their only form")
        return found

    def named(self) -> dict[str, Any]:
        """Return the claims under names, as people see them; octets in hex."""
        named: dict[str, Any] = {
            "iss": f"spiffe://{self.pool_id}/partition/{self.partition_index}",
            "sub": f"keys/{self.key_id}/versions/{self.version_id}",
            "eat_profile": PROFILE,
            "key_type": _KEY_TYPES[self.key_type],
            "size_bits": self.size_bits,
            "exportable": self.exportable,
            "origin": _ORIGINS[self.origin],
        }
        if self.curve is not Curve.NONE:
            named["curve"] = _CURVES[self.curve]
        if self.public_key:
            named["public_key"] = self.public_key.hex()
        return named


def _matched(pattern: re.Pattern[str], claims: dict[int, Any], label: int) -> re.Match[str]:
    value = claims.get(label)
    found = pattern.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"claim {label} is no such name")
    return found


def _named(names: dict[K, str], value: Any) -> K:
    for member, name in names.items():
        if name == value and isinstance(value, str):
            return member
    raise ValueError("a claim has a value that this profile has not")
