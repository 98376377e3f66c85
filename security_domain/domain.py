"""Making a security domain: root, owner key, one-time wrapping key, shares, file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from security_domain import container, shares
from security_domain.container import OfficerEntry, SecurityDomainFile
from security_domain.encoding import canonical, encode
from security_domain.officers import check_officers
from security_domain.secret import Secret
from security_domain.wrapping import DerivedKeys, OneTimeKey, raw_public, wrap_to_officer

ROOT_BYTES = 32


@dataclass(frozen=True, slots=True)
class NewDomain:
    """A new security domain: the file, and the public key to which the pool's keys are sealed."""

    file: bytes
    recovery_public_key: bytes


def create(
    pool_id: str, generation: int, officer_certificates_der: Sequence[bytes], required: int
) -> NewDomain:
    """Make a security domain that any ``required`` of the officers open (G4).

    Args:
        pool_id: Pool, 1-64 characters.
        generation: From 1.
        officer_certificates_der: 3-10 certificates of distinct RSA keys of 2048 bits or more.
        required: Quorum, 2 to the number of officers.

    Raises:
        InvalidOfficers: The officers or the quorum are not acceptable.
        InvalidFile: The pool id or the generation is out of bounds.
    """
    container.check_identity(pool_id, generation)
    officers = check_officers(officer_certificates_der, required)
    root = Secret(os.urandom(ROOT_BYTES))
    derived = DerivedKeys(root, pool_id, generation)
    owner = ec.generate_private_key(ec.SECP384R1())
    wrapping = OneTimeKey()
    mnemonics = shares.split(wrapping.key, required, len(officers))
    entries = []
    for index, (officer, mnemonic) in enumerate(zip(officers, mnemonics, strict=True), start=1):
        share = {
            "pool_id": pool_id,
            "generation": generation,
            "index": index,
            "required": required,
            "total": len(officers),
            "mnemonic": mnemonic,
        }
        token = wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))
        commitment = shares.commitment(pool_id, generation, index, mnemonic)
        entries.append(OfficerEntry(index, officer.thumbprint, officer.certificate_der, token, commitment))
    unsealed = SecurityDomainFile(
        pool_id=pool_id,
        generation=generation,
        required=required,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        officers=tuple(entries),
        recovery_public_key=raw_public(derived.recovery.public_key()),
        backup_public_key=raw_public(derived.backup.public_key()),
        owner_public_key_der=owner.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        key_check_value=derived.check_value,
        payload=b"",
    )
    payload = {
        "pool_id": pool_id,
        "generation": generation,
        "root": encode(root.reveal()),
        "owner_key": encode(
            owner.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        ),
    }
    sealed = replace(unsealed, payload=wrapping.seal(canonical(payload), unsealed.header()))
    root.wipe()
    wrapping.key.wipe()
    file = sealed.serialise()
    container.parse(file)  # a file that its reader refuses would be found out when it is needed
    return NewDomain(file, sealed.recovery_public_key)
