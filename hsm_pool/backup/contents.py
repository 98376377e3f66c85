"""Keys and roles in a backup: records, their material opened by one pool and sealed again by another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hsm_pool.core.model import (
    KeyRecord,
    KeyVersionRecord,
    PrincipalRecord,
    Restorable,
    RoleRecord,
    SealedMaterial,
    bytes_about,
)
from hsm_pool.core.restore import BATCH_BYTES, BATCH_RECORDS
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import BackupRefused
from hsm_pool.store import codec
from hsm_pool.store.sealing import PoolKeys, open_material, seal_material
from mhsm.record.v1 import record_pb2

PART_BYTES = 512 * 1024
"""Size a part aims at; one key with its versions is never split."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with all its versions, oldest first; material sealed by the pool that holds it."""

    key: KeyRecord
    versions: tuple[KeyVersionRecord, ...]

    @property
    def records(self) -> tuple[KeyRecord | KeyVersionRecord, ...]:
        """All records."""
        return (self.key, *self.versions)

    @property
    def size_about(self) -> int:
        """Roughly how long it is, in bytes."""
        return sum(map(bytes_about, self.records))


@dataclass(frozen=True, slots=True)
class StoredRole:
    """A principal with his role assignments, or a custom role."""

    record: RoleRecord

    @property
    def records(self) -> tuple[RoleRecord]:
        """All records."""
        return (self.record,)

    @property
    def size_about(self) -> int:
        """Roughly how long it is, in bytes."""
        return bytes_about(self.record)


Stored = StoredKey | StoredRole


def into_parts(everything: Iterable[Stored]) -> list[tuple[Stored, ...]]:
    """Group keys and roles into parts; at least one part, even of nothing."""
    parts: list[tuple[Stored, ...]] = []
    part: list[Stored] = []
    size = 0
    for stored in everything:
        if part and size + stored.size_about > PART_BYTES:
            parts.append(tuple(part))
            part, size = [], 0
        part.append(stored)
        size += stored.size_about
    return [*parts, tuple(part)]


def into_batches(everything: Iterable[Stored]) -> list[tuple[Restorable, ...]]:
    """Group records into what one transaction stages."""
    batches: list[tuple[Restorable, ...]] = []
    batch: list[Restorable] = []
    size = 0
    for record in (record for stored in everything for record in stored.records):
        if batch and (len(batch) == BATCH_RECORDS or size + bytes_about(record) > BATCH_BYTES):
            batches.append(tuple(batch))
            batch, size = [], 0
        batch.append(record)
        size += bytes_about(record)
    return [*batches, tuple(batch)]


def take(keys: PoolKeys, part: Sequence[Stored]) -> SecretBytes:
    """Return the plaintext of a part, to be sealed at once.

    Raises:
        Tampered: Material does not open.
    """
    message = record_pb2.BackupPart()
    for stored in part:
        if isinstance(stored, StoredRole):
            if isinstance(stored.record, PrincipalRecord):
                message.principals.append(codec.encode_principal(stored.record))
            else:
                message.role_definitions.append(codec.encode_role_definition(stored.record))
            continue
        entry = message.keys.add(key=codec.encode_key(stored.key))
        for version in stored.versions:
            encoded = codec.encode_version(version)
            encoded.ClearField("sealed_material")
            entry.versions.append(encoded)
            material = open_material(
                keys,
                version.key_id,
                version.version_id,
                version.key_type,
                version.curve,
                version.size_bits,
                version.sealed_material,
            )
            entry.materials.append(material.reveal())
    return SecretBytes(message.SerializeToString(deterministic=True))


def put_back(keys: PoolKeys, plaintext: SecretBytes) -> list[Stored]:
    """Return the keys of a part, their material sealed by this pool, and its roles.

    Raises:
        BackupRefused: It is not what :func:`take` makes.
    """
    try:
        message = record_pb2.BackupPart.FromString(plaintext.reveal())
        return [
            *(_put_back(keys, entry) for entry in message.keys),
            *(StoredRole(codec.decode_principal(entry)) for entry in message.principals),
            *(StoredRole(codec.decode_role_definition(entry)) for entry in message.role_definitions),
        ]
    except BackupRefused:
        raise
    except Exception:  # noqa: BLE001 - protobuf's own error, or a number without meaning
        raise BackupRefused("a part of the backup is not readable") from None


def _put_back(keys: PoolKeys, entry: record_pb2.BackupKey) -> StoredKey:
    key = codec.decode_key(entry.key)
    versions: list[KeyVersionRecord] = []
    for encoded, material in zip(entry.versions, entry.materials, strict=True):
        version = codec.decode_version(encoded)
        sealed: SealedMaterial = seal_material(
            keys,
            version.key_id,
            version.version_id,
            version.key_type,
            version.curve,
            version.size_bits,
            SecretBytes(material),
        )
        versions.append(replace(version, sealed_material=sealed))
    stated = tuple((version.key_id, version.version_id) for version in versions)
    if not versions or stated != tuple((key.key_id, version_id) for version_id in key.version_ids):
        raise BackupRefused("a part of the backup is not readable")
    return StoredKey(key, tuple(versions))
