"""The format of backups: content key, parts and manifest. FORMAT.md specifies it."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import BackupRefused
from hsm_pool.limits import BACKUP_MANIFEST_BYTES_MAX, KEY_BACKUP_BYTES_MAX
from security_domain.encoding import bind, canonical, decode, encode, parse_object
from security_domain.errors import InvalidFile
from security_domain.wrapping import SUITE

FORMAT = "mhsm-backup/1"
KEY_FORMAT = "mhsm-key-backup/1"
PARTS_MAX = 4_000
_REFUSED = "the backup was changed, or belongs to another security domain"
_ID = re.compile(r"[0-9a-f]{32}")
_FIELDS: dict[str, type] = {
    "format": str,
    "backup_id": str,
    "source_pool_id": str,
    "security_domain_pool_id": str,
    "generation": int,
    "created": str,
    "sequence": int,
    "head_digest": str,
    "keys": int,
    "sealed_content_key": str,
    "parts": list,
    "audit_checkpoints": list,
    "mac": str,
}


@dataclass(frozen=True, slots=True)
class Domain:
    """The security domain a backup is encrypted to."""

    pool_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a manifest says of the pool when the backup was taken."""

    source_pool_id: str
    sequence: int
    head_digest: bytes
    keys: int
    audit_checkpoints: tuple[str, ...] = ()
    """Newest checkpoints of all partitions' audit logs: anchors for ``mhsm audit verify`` (G7)."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose MAC was checked."""

    backup_id: str
    snapshot: Snapshot
    part_digests: tuple[bytes, ...]
    content_key: ContentKey


class ContentKey:
    """The key of one backup's parts."""

    def __init__(self, backup_id: str, key: SecretBytes) -> None:
        self.backup_id = backup_id
        self._key = key

    def seal(self, index: int, plaintext: bytes) -> bytes:
        """Return a part; the same plaintext gives the same octets."""
        return AESGCMSIV(self._key.reveal()).encrypt(index.to_bytes(12, "big"), plaintext, self._data(index))

    def open(self, index: int, part: bytes) -> SecretBytes:
        """Return the plaintext of a part.

        Raises:
            BackupRefused: It is not that part of this backup.
        """
        try:
            opened = AESGCMSIV(self._key.reveal()).decrypt(index.to_bytes(12, "big"), part, self._data(index))
        except (InvalidTag, ValueError):
            raise BackupRefused(_REFUSED) from None
        return SecretBytes(opened)

    def _data(self, index: int) -> bytes:
        return bind("mhsm-backup/part/v1", self.backup_id, index)


class Sealer:
    """Makes one backup: its content key, its parts, and last its manifest."""

    def __init__(
        self, backup_id: str, domain: Domain, backup_private_key: SecretBytes, form: str = FORMAT
    ) -> None:
        self.backup_id = backup_id
        self._domain = domain
        self._form = form
        self._private_key = backup_private_key
        content_key = SecretBytes(os.urandom(32))
        self.content_key = ContentKey(self.backup_id, content_key)
        public_key = X25519PrivateKey.from_private_bytes(backup_private_key.reveal()).public_key()
        info = _content_key_info(domain, self.backup_id)
        self._sealed_content_key = SUITE.encrypt(content_key.reveal(), public_key, info)

    def manifest(self, snapshot: Snapshot, part_digests: Sequence[bytes]) -> dict[str, Any]:
        """Return the fields of the manifest, MAC included."""
        fields: dict[str, Any] = {
            "format": self._form,
            "backup_id": self.backup_id,
            "source_pool_id": snapshot.source_pool_id,
            "security_domain_pool_id": self._domain.pool_id,
            "generation": self._domain.generation,
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "sequence": snapshot.sequence,
            "head_digest": encode(snapshot.head_digest),
            "keys": snapshot.keys,
            "sealed_content_key": encode(self._sealed_content_key),
            "parts": [encode(digest) for digest in part_digests],
            "audit_checkpoints": list(snapshot.audit_checkpoints),
        }
        return {**fields, "mac": encode(_mac(self._private_key, fields))}


KeyOf = Callable[[int], SecretBytes | None]
"""Returns the backup key of a generation of the security domain, None when it is not here."""


def open_manifest(manifest: bytes, pool_id: str, key_of: KeyOf, form: str = FORMAT) -> Manifest:
    """Parse a manifest, check its MAC and open its content key.

    Args:
        manifest: The manifest.
        pool_id: Of the security domain.
        key_of: The backup keys that are here.
        form: What it must be a manifest of.

    Raises:
        BackupRefused: It is no manifest, was changed, or is of another security domain.
    """
    try:
        fields = parse_object(manifest, BACKUP_MANIFEST_BYTES_MAX, _FIELDS)
        return _opened(fields, pool_id, key_of, form)
    except InvalidFile:
        raise BackupRefused(_REFUSED) from None


def _opened(fields: dict[str, Any], pool_id: str, key_of: KeyOf, form: str) -> Manifest:
    domain = Domain(pool_id, fields["generation"])
    backup_private_key = key_of(domain.generation)
    if backup_private_key is None:
        raise InvalidFile(_REFUSED)
    unsigned = {name: value for name, value in fields.items() if name != "mac"}
    authentic = hmac.compare_digest(_mac(backup_private_key, unsigned), decode(fields["mac"]))
    stated = (fields["format"], fields["security_domain_pool_id"], fields["generation"])
    if not authentic or stated != (form, domain.pool_id, domain.generation):
        raise InvalidFile(_REFUSED)
    backup_id, parts, checkpoints = fields["backup_id"], fields["parts"], fields["audit_checkpoints"]
    if not all(isinstance(text, str) for text in checkpoints):
        raise InvalidFile(_REFUSED)
    if not _ID.fullmatch(backup_id) or len(parts) > PARTS_MAX:
        raise InvalidFile(_REFUSED)
    private_key = X25519PrivateKey.from_private_bytes(backup_private_key.reveal())
    info = _content_key_info(domain, backup_id)
    try:
        content_key = SecretBytes(SUITE.decrypt(decode(fields["sealed_content_key"]), private_key, info))
    except Exception:  # noqa: BLE001 - HPKE raises several kinds
        raise InvalidFile(_REFUSED) from None
    return Manifest(
        backup_id,
        Snapshot(
            fields["source_pool_id"],
            fields["sequence"],
            decode(fields["head_digest"], 32),
            fields["keys"],
            tuple(checkpoints),
        ),
        tuple(decode(digest, 32) for digest in parts),
        ContentKey(backup_id, content_key),
    )


def open_part(manifest: Manifest, index: int, part: bytes) -> SecretBytes:
    """Check a part against the manifest and open it.

    Raises:
        BackupRefused: It is not that part.
    """
    if not 0 <= index < len(manifest.part_digests) or part_digest(part) != manifest.part_digests[index]:
        raise BackupRefused(_REFUSED)
    return manifest.content_key.open(index, part)


def part_digest(part: bytes) -> bytes:
    """Return the digest under which a manifest knows a part."""
    return hashlib.sha256(part).digest()


def seal_key_backup(
    domain: Domain, backup_private_key: SecretBytes, snapshot: Snapshot, plaintext: bytes
) -> bytes:
    """Return a single key's backup: manifest and its only part in one."""
    sealer = Sealer(os.urandom(16).hex(), domain, backup_private_key, KEY_FORMAT)
    content = sealer.content_key.seal(0, plaintext)
    return canonical({**sealer.manifest(snapshot, [part_digest(content)]), "content": encode(content)})


def open_key_backup(backup: bytes, pool_id: str, key_of: KeyOf) -> SecretBytes:
    """Open a single key's backup.

    Raises:
        BackupRefused: It is none, was changed, or is of another security domain.
    """
    try:
        fields = parse_object(backup, KEY_BACKUP_BYTES_MAX, {**_FIELDS, "content": str})
        content = decode(fields.pop("content"))
        manifest = _opened(fields, pool_id, key_of, KEY_FORMAT)
    except InvalidFile:
        raise BackupRefused(_REFUSED) from None
    return open_part(manifest, 0, content)


def _content_key_info(domain: Domain, backup_id: str) -> bytes:
    return bind("mhsm-backup/content-key/v1", domain.pool_id, domain.generation, backup_id)


def _mac(backup_private_key: SecretBytes, fields: dict[str, Any]) -> bytes:
    info = bind("mhsm-backup/manifest/v1")
    key = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(backup_private_key.reveal())
    return hmac.digest(key, canonical(fields), "sha256")
