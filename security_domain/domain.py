"""Making a security domain: root, owner key, one-time wrapping key, shares, file."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from security_domain import container, shares
from security_domain.container import OfficerEntry, SecurityDomainFile
from security_domain.encoding import canonical, encode
from security_domain.errors import InvalidFile
from security_domain.officers import check_officers
from security_domain.secret import Secret
from security_domain.wrapping import DerivedKeys, OneTimeKey, raw_public, wrap_to_officer

ROOT_BYTES = 32


@dataclass(frozen=True, slots=True)
class Core:
    """What a security domain keeps for its officers: it stays the same when shares are rotated."""

    pool_id: str
    generation: int
    root: Secret
    owner_key: Secret
    """Owner's P-384 key, PKCS#8 DER."""

    @property
    def derived(self) -> DerivedKeys:
        """The keys that follow from the root."""
        return DerivedKeys(self.root, self.pool_id, self.generation)

    def check(self, file: SecurityDomainFile) -> None:
        """Check that a file is of this domain.

        Raises:
            InvalidFile: It is of another pool or generation, or was changed.
        """
        if (self.pool_id, self.generation) != (file.pool_id, file.generation):
            raise InvalidFile("the payload is of another pool or generation")
        derived = self.derived
        stated = (file.key_check_value, file.recovery_public_key, file.backup_public_key)
        found = (
            derived.check_value,
            raw_public(derived.recovery.public_key()),
            raw_public(derived.backup.public_key()),
        )
        if not all(hmac.compare_digest(*pair) for pair in zip(found, stated, strict=True)):
            raise InvalidFile("the key-check value does not fit: the file was changed")

    def wipe(self) -> None:
        """Overwrite both secrets."""
        self.root.wipe()
        self.owner_key.wipe()


@dataclass(frozen=True, slots=True)
class NewDomain:
    """A new security domain: the file, and the public key to which the pool's keys are sealed."""

    file: bytes
    recovery_public_key: bytes
    core: Core
    """To be offered in other formats, and wiped."""
    backup_private_key: Secret
    """X25519, 32 bytes: opens the pool's backups; the partitions keep it with the pool's keys."""


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
    check_officers(officer_certificates_der, required)
    owner_key = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    core = Core(pool_id, generation, Secret(os.urandom(ROOT_BYTES)), Secret(owner_key))
    file = share_out(core, 1, officer_certificates_der, required)
    derived = core.derived
    return NewDomain(
        file,
        raw_public(derived.recovery.public_key()),
        core,
        Secret(derived.backup.private_bytes_raw()),
    )


def share_out(core: Core, sharing: int, officer_certificates_der: Sequence[bytes], required: int) -> bytes:
    """Wrap a domain's core under a fresh one-time key and share that key among officers.

    Rotating shares is calling this again with the next ``sharing``. It does not revoke:
    an earlier file with an earlier quorum still opens the same core.

    Args:
        core: What is to be kept.
        sharing: Counts the times the core was shared out, from 1.
        officer_certificates_der: As for :func:`create`.
        required: As for :func:`create`.

    Raises:
        InvalidOfficers: The officers or the quorum are not acceptable.
        InvalidFile: The sharing is out of bounds.
    """
    officers = check_officers(officer_certificates_der, required)
    wrapping = OneTimeKey()
    mnemonics = shares.split(wrapping.key, required, len(officers))
    entries = []
    for index, (officer, mnemonic) in enumerate(zip(officers, mnemonics, strict=True), start=1):
        share = {
            "pool_id": core.pool_id,
            "generation": core.generation,
            "index": index,
            "required": required,
            "total": len(officers),
            "mnemonic": mnemonic,
        }
        token = wrap_to_officer(officer.public_key, officer.thumbprint, canonical(share))
        commitment = shares.commitment(core.pool_id, core.generation, index, mnemonic)
        entries.append(OfficerEntry(index, officer.thumbprint, officer.certificate_der, token, commitment))
    derived = core.derived
    owner = serialization.load_der_private_key(core.owner_key.reveal(), None)
    unsealed = SecurityDomainFile(
        pool_id=core.pool_id,
        generation=core.generation,
        sharing=sharing,
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
        "pool_id": core.pool_id,
        "generation": core.generation,
        "root": encode(core.root.reveal()),
        "owner_key": encode(core.owner_key.reveal()),
    }
    sealed = replace(unsealed, payload=wrapping.seal(canonical(payload), unsealed.header()))
    wrapping.key.wipe()
    file = sealed.serialise()
    container.parse(file)  # a file that its reader refuses would be found out when it is needed
    return file
