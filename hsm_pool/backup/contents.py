"""Keys in a backup: records with their material, opened by one pool and sealed again by another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hsm_pool.core.model import KeyRecord, KeyVersionRecord, SealedMaterial, bytes_about
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


def into_parts(keys: Iterable[StoredKey]) -> list[tuple[StoredKey, ...]]:
    """Group keys into parts; at least one part, even of no keys."""
    parts: list[tuple[StoredKey, ...]] = []
    part: list[StoredKey] = []
    size = 0
    for key in keys:
        if part and size + key.size_about > PART_BYTES:
            parts.append(tuple(part))
            part, size = [], 0
        part.append(key)
        size += key.size_about
    return [*parts, tuple(part)]


def into_batches(keys: Iterable[StoredKey]) -> list[tuple[KeyRecord | KeyVersionRecord, ...]]:
    """Group records into what one transaction stages."""
    batches: list[tuple[KeyRecord | KeyVersionRecord, ...]] = []
    batch: list[KeyRecord | KeyVersionRecord] = []
    size = 0
    for record in (record for key in keys for record in key.records):
        if batch and (len(batch) == BATCH_RECORDS or size + bytes_about(record) > BATCH_BYTES):
            batches.append(tuple(batch))
            batch, size = [], 0
        batch.append(record)
        size += bytes_about(record)
    return [*batches, tuple(batch)]


def take(keys: PoolKeys, part: Sequence[StoredKey]) -> SecretBytes:
    """Return the plaintext of a part, to be sealed at once.

    Raises:
        Tampered: Material does not open.
    """
    message = record_pb2.BackupPart()
    for stored in part:
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


def put_back(keys: PoolKeys, plaintext: SecretBytes) -> list[StoredKey]:
    """Return the keys of a part, their material sealed by this pool.

    Raises:
        BackupRefused: It is not what :func:`take` makes.
    """
    try:
        message = record_pb2.BackupPart.FromString(plaintext.reveal())
        return [_put_back(keys, entry) for entry in message.keys]
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
