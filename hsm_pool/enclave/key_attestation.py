"""Key attestation: proof, without the pool, that a key version is one of the pool's, and of which kind.

The members are those of Azure's ``attestation``. The blobs are not: a vendor's form cannot be made by
anybody else, so these have a version of their own. Each is a token of the key that the pool's owner
certified for the partition, over a token of the partition's platform, over the claims (a nested CBOR
web token, RFC 8392): as with evidence, one root says that an HSM holds the key, the other that it is ours.
What is simulated is the platform; docs/threat-model.md says what follows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509

from hsm_pool import limits
from hsm_pool.core.model import KeyVersionRecord
from hsm_pool.enclave.evidence import Attester
from hsm_pool.enclave.key_claims import KeyClaims, Part
from hsm_pool.enclave.verifier import TrustAnchors, open_token
from hsm_pool.errors import EvidenceRefused
from security_domain.encoding import decode, encode
from security_domain.errors import InvalidFile

VERSION: Final = "MHSM-SIMULATOR-1"
"""Says which form the blobs have; not one of a vendor's."""

_MEMBERS = {"certificatePemFile", "privateKeyAttestation", "version"}
_PUBLIC = "publicKeyAttestation"


@dataclass(frozen=True, slots=True)
class KeyAttestation:
    """What Azure's answer has; the octets are not encoded."""

    certificates_pem: bytes
    """Of the platform and of the owner: each the partition's, then the root."""
    private_key: bytes
    public_key: bytes
    """b"" for a symmetric key."""
    version: str = VERSION

    def to_json(self) -> dict[str, str]:
        """Return the members under Azure's names, octets in base64url."""
        members = {
            "certificatePemFile": encode(self.certificates_pem),
            "privateKeyAttestation": encode(self.private_key),
            "version": self.version,
        }
        if self.public_key:
            members[_PUBLIC] = encode(self.public_key)
        return members

    @staticmethod
    def from_json(content: Any) -> KeyAttestation:
        """Return the attestation of members.

        Raises:
            ValueError: They are not those of an attestation.
        """
        if not isinstance(content, dict) or set(content) - {_PUBLIC} != _MEMBERS:
            raise ValueError("the members are not those of an attestation")
        if not all(isinstance(value, str) for value in content.values()):
            raise ValueError("a member is not a text")
        try:
            return KeyAttestation(
                decode(content["certificatePemFile"]),
                decode(content["privateKeyAttestation"]),
                decode(content.get(_PUBLIC, "")),
                content["version"],
            )
        except InvalidFile:
            raise ValueError("a member is not base64url") from None


def attest(version: KeyVersionRecord, attester: Attester) -> KeyAttestation:
    """Return a partition's attestation of a version: the same octets whenever this partition makes it."""
    claims = KeyClaims.of(version, Part.PRIVATE, attester.pool_id, attester.partition_index)
    public = dataclasses.replace(claims, part=Part.PUBLIC)
    return KeyAttestation(
        certificates_pem=attester.certificates_pem,
        private_key=attester.certify_key(claims.encode()),
        public_key=attester.certify_key(public.encode()) if claims.public_key else b"",
    )


def verify(attestation: KeyAttestation, anchors: TrustAnchors, now: datetime) -> KeyClaims:
    """Return what an attestation says that is worth believing; contacts nobody.

    Args:
        attestation: As it came; nothing of it is believed beforehand.
        anchors: The pool's two roots.
        now: The certificates must be valid then.

    Raises:
        EvidenceRefused: A chain or a signature does not verify, the two halves do not say the same, or
            the members do not belong together.
    """
    if attestation.version != VERSION:
        raise EvidenceRefused(f"the attestation is of version {attestation.version!r}, not {VERSION}")
    claims, certificates = _opened(attestation.private_key, anchors, now)
    if claims.part is not Part.PRIVATE:
        raise EvidenceRefused("the attestation of the private key is about another part")
    if claims.public_key:
        public, others = _opened(attestation.public_key, anchors, now)
        if public != dataclasses.replace(claims, part=Part.PUBLIC) or others != certificates:
            raise EvidenceRefused("the attestations of the two halves do not belong together")
    elif attestation.public_key:
        raise EvidenceRefused("a symmetric key has no public half")
    if _certificates(attestation.certificates_pem) != certificates:
        raise EvidenceRefused("the certificates are not those of the signatures and of the roots")
    return claims


def _opened(token: bytes, anchors: TrustAnchors, now: datetime) -> tuple[KeyClaims, list[x509.Certificate]]:
    inner, owner_uri, owner = open_token(token, anchors.owner_root, "owner", now)
    octets, platform_uri, platform = open_token(inner, anchors.platform_root, "platform", now)
    try:
        claims = KeyClaims.decode(octets)
    except Exception:  # noqa: BLE001 - the CBOR parser raises several kinds
        raise EvidenceRefused("the claims are not those of a key attestation") from None
    names = (
        f"spiffe://{claims.pool_id}/platform/{claims.partition_index}",
        f"spiffe://{claims.pool_id}/partition/{claims.partition_index}",
    )
    if (platform_uri, owner_uri) != names:
        raise EvidenceRefused("the attestation is signed for another partition than it names")
    return claims, [platform, anchors.platform_root, owner, anchors.owner_root]


def _certificates(octets: bytes) -> list[x509.Certificate]:
    if len(octets) > limits.EVIDENCE_TOKEN_BYTES_MAX:
        raise EvidenceRefused("the certificates are too large")
    try:
        return x509.load_pem_x509_certificates(octets)
    except ValueError:
        raise EvidenceRefused("the certificates are not readable") from None
