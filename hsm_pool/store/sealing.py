"""The pool's keys and what is sealed under them (G3, G6).

Every record is sealed with AES-256-GCM-SIV (RFC 8452) under its own key, derived by
HKDF-SHA256 (RFC 5869) from the key-encryption key of an epoch; the additional data
binds pool, epoch, kind, opaque id, sequence and chain, so a record that was swapped,
spliced, replayed or copied from another pool does not open.
"""

from __future__ import annotations

import os
import struct
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import constant_time, hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool.core.model import Curve, KeyType, RecordName, SealedMaterial
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.crypto.secret_memory import SecretMemory
from mhsm.record.v1 import record_pb2

KEY_BYTES = 32
_NONCE_BYTES = 12
_MAC_KEY = b"mhsm/mac-key/v1"
_BUCKETS = (256, 512, 1024, 2048, 4096)


class Tampered(Exception):
    """Something in the store is not what this pool wrote (G6). The text says what."""


class MissingEpoch(Exception):
    """The chain has put an epoch in force whose key is not here: the partition must heal anew."""


class RolledBack(Tampered):
    """The store ends before what this partition has applied; a read that lags looks the same once."""


class PoolKeys:
    """The keys that make a partition a member of its pool, in secret memory.

    ``name_key`` lives as long as the pool; each epoch adds a key-encryption key, and the
    MAC key of the chain is derived from it: whoever holds old epochs only can forge
    nothing. ``epoch`` is the one in force: the replica sets it as the chain says, and no
    chain that ends before it is taken. The backup keys are those of the security
    domain's generations, so that every pool of one domain restores its backups without
    the officers.
    """

    def __init__(self, pool_id: str, secret: SecretBytes) -> None:
        message = record_pb2.PoolKeysSecret.FromString(secret.reveal())
        if message.epoch not in message.key_encryption_keys:
            raise ValueError("the epoch in force has no key")
        self.pool_id = pool_id
        self.epoch = message.epoch
        self._name_key = _protect(message.name_key)
        self._backup_private_keys = {
            generation: _protect(key) for generation, key in message.backup_private_keys.items()
        }
        self._keks = {epoch: _protect(kek) for epoch, kek in message.key_encryption_keys.items()}

    @staticmethod
    def generate(pool_id: str, generation: int, backup_private_key: SecretBytes) -> PoolKeys:
        """Make the keys of a new pool, epoch 1; the backup key comes from its security domain.

        Args:
            pool_id: Of the pool.
            generation: Of the security domain.
            backup_private_key: Of the security domain, X25519.
        """
        message = record_pb2.PoolKeysSecret(
            key_encryption_keys={1: os.urandom(KEY_BYTES)},
            name_key=os.urandom(KEY_BYTES),
            epoch=1,
            backup_private_keys={generation: backup_private_key.reveal()},
        )
        return PoolKeys(pool_id, SecretBytes(message.SerializeToString(deterministic=True)))

    def export(self) -> SecretBytes:
        """Return the keys serialised, to be sealed at once for a peer, the officers or the platform."""
        message = record_pb2.PoolKeysSecret(
            key_encryption_keys={epoch: bytes(kek.view()[:KEY_BYTES]) for epoch, kek in self._keks.items()},
            name_key=bytes(self._name_key.view()[:KEY_BYTES]),
            epoch=self.epoch,
            backup_private_keys={
                generation: bytes(key.view()[:KEY_BYTES])
                for generation, key in self._backup_private_keys.items()
            },
        )
        return SecretBytes(message.SerializeToString(deterministic=True))

    def backup_private_key(self, generation: int) -> SecretBytes | None:
        """Return the X25519 key that opens backups of a generation, None when it is not here."""
        key = self._backup_private_keys.get(generation)
        return SecretBytes(bytes(key.view()[:KEY_BYTES])) if key else None

    def holds(self, epoch: int) -> bool:
        """Return whether the key-encryption key of an epoch is here."""
        return epoch in self._keks

    def with_epoch(self, epoch: int, generation: int = 0, backup_key: SecretBytes | None = None) -> PoolKeys:
        """Return these keys and a new key-encryption key; it is not in force yet.

        Args:
            epoch: Of the new key.
            generation: Of a new security domain, with ``backup_key``.
            backup_key: Of a new security domain, X25519.
        """
        message = record_pb2.PoolKeysSecret.FromString(self.export().reveal())
        message.key_encryption_keys[epoch] = os.urandom(KEY_BYTES)
        if backup_key:
            message.backup_private_keys[generation] = backup_key.reveal()
        return PoolKeys(self.pool_id, SecretBytes(message.SerializeToString(deterministic=True)))

    def take(self, other: PoolKeys) -> None:
        """Add what another set of this pool's keys holds besides.

        Of a generation that was begun more than once, the other set has the newer backup key.
        """
        self._backup_private_keys = {**self._backup_private_keys, **other._backup_private_keys}
        self._keks = {**other._keks, **self._keks}

    @property
    def memory_kind(self) -> str:
        """Where the keys live: "memfd_secret" or "mlock"."""
        return self._name_key.kind

    def opaque_id(self, name: RecordName) -> bytes:
        """Return the name under which the store sees a record, 32 bytes."""
        return _mac(self._name_key.view()[:KEY_BYTES], b"mhsm/name/v1\x00" + "\x00".join(name).encode())

    def mac(self, epoch: int, label: bytes, data: bytes) -> bytes:
        """Return HMAC-SHA-256 under the MAC key of an epoch.

        Raises:
            Tampered: The epoch is unknown.
        """
        return _mac(self.derive(epoch, _MAC_KEY), label + b"\x00" + data)

    def check_mac(self, epoch: int, label: bytes, data: bytes, mac: bytes, what: str) -> None:
        """Check a MAC under the MAC key of an epoch; whether that epoch may be is for the caller to check.

        Raises:
            Tampered: It does not fit, or the epoch is unknown.
        """
        if not self.holds(epoch) or not constant_time.bytes_eq(self.mac(epoch, label, data), mac):
            raise Tampered(f"{what} does not carry this pool's MAC")

    def derive(self, epoch: int, info: bytes) -> bytes:
        """Return a 32-byte key derived from an epoch's key-encryption key.

        Raises:
            Tampered: The epoch is unknown.
        """
        kek = self._keks.get(epoch)
        if kek is None:
            raise Tampered(f"a record names the unknown epoch {epoch}")
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=self.pool_id.encode(), info=info).derive(
            kek.view()[:KEY_BYTES]
        )

    def __repr__(self) -> str:
        return f"PoolKeys(epoch={self.epoch}, redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets cannot be pickled")


def _mac(key: bytes | memoryview, data: bytes) -> bytes:
    mac = HMAC(key, hashes.SHA256())
    mac.update(data)
    return mac.finalize()


def _protect(octets: bytes) -> SecretMemory:
    if len(octets) != KEY_BYTES:
        raise ValueError("a pool key has a wrong length")
    memory = SecretMemory(KEY_BYTES)
    memory.write(octets)
    return memory


def _binding(*parts: bytes | str | int) -> bytes:
    """Return an unambiguous encoding of the parts."""
    encoded = bytearray()
    for part in parts:
        octets = (
            struct.pack(">Q", part)
            if isinstance(part, int)
            else part.encode()
            if isinstance(part, str)
            else part
        )
        encoded += struct.pack(">I", len(octets)) + octets
    return bytes(encoded)


def record_binding(
    pool_id: str, epoch: int, record_type: int, opaque_id: bytes, sequence: int, previous_digest: bytes
) -> bytes:
    """Return what a sealed record is bound to; it enters the key and the additional data."""
    return _binding("mhsm/record/v1", pool_id, epoch, record_type, opaque_id, sequence, previous_digest)


def seal_record(
    keys: PoolKeys,
    epoch: int,
    record_type: int,
    opaque_id: bytes,
    sequence: int,
    previous_digest: bytes,
    body: bytes,
) -> bytes:
    """Return an Envelope, serialised, padded to a bucket so that its size says little."""
    binding = record_binding(keys.pool_id, epoch, record_type, opaque_id, sequence, previous_digest)
    nonce = os.urandom(_NONCE_BYTES)
    ciphertext = AESGCMSIV(keys.derive(epoch, binding)).encrypt(nonce, _pad(body), binding)
    return record_pb2.Envelope(
        epoch=epoch,
        sequence=sequence,
        previous_digest=previous_digest,
        record_type=record_pb2.RecordType.ValueType(record_type),
        nonce=nonce,
        ciphertext=ciphertext,
    ).SerializeToString(deterministic=True)


def open_record(
    keys: PoolKeys, opaque_id: bytes, value: bytes, epochs: range | None = None
) -> tuple[int, int, bytes]:
    """Open an Envelope.

    Args:
        keys: Of the pool.
        opaque_id: Under which it stands.
        value: The envelope, serialised.
        epochs: Those that it may be sealed under; None for any that is held.

    Returns:
        (record type, sequence, body).

    Raises:
        Tampered: It is not a record that this pool sealed under this id in one of these epochs.
    """
    try:
        envelope = record_pb2.Envelope.FromString(value)
    except Exception:  # noqa: BLE001 - whatever the parser dislikes is tampering
        raise Tampered("a record is not an envelope") from None
    if epochs is not None and envelope.epoch not in epochs:
        raise Tampered(f"a record is sealed under epoch {envelope.epoch}, which is not in force there")
    binding = record_binding(
        keys.pool_id,
        envelope.epoch,
        envelope.record_type,
        opaque_id,
        envelope.sequence,
        envelope.previous_digest,
    )
    try:
        padded = AESGCMSIV(keys.derive(envelope.epoch, binding)).decrypt(
            envelope.nonce, envelope.ciphertext, binding
        )
    except (InvalidTag, ValueError):
        raise Tampered("a record does not open under its own id, sequence and chain") from None
    return envelope.record_type, envelope.sequence, _unpad(padded)


def _material_binding(
    pool_id: str, epoch: int, key_id: str, version_id: str, key_type: int, curve: int, size: int
) -> bytes:
    return _binding("mhsm/material/v1", pool_id, epoch, key_id, version_id, key_type, curve, size)


def seal_material(
    keys: PoolKeys,
    key_id: str,
    version_id: str,
    key_type: KeyType,
    curve: Curve,
    size_bits: int,
    material: SecretBytes,
) -> SealedMaterial:
    """Seal key material to its key version."""
    binding = _material_binding(keys.pool_id, keys.epoch, key_id, version_id, key_type, curve, size_bits)
    nonce = os.urandom(_NONCE_BYTES)
    ciphertext = AESGCMSIV(keys.derive(keys.epoch, binding)).encrypt(nonce, _pad(material.reveal()), binding)
    return SealedMaterial(keys.epoch, nonce, ciphertext)


def open_material(
    keys: PoolKeys,
    key_id: str,
    version_id: str,
    key_type: KeyType,
    curve: Curve,
    size_bits: int,
    sealed: SealedMaterial,
) -> SecretBytes:
    """Open key material.

    Raises:
        Tampered: It was not sealed for this key version.
    """
    binding = _material_binding(keys.pool_id, sealed.epoch, key_id, version_id, key_type, curve, size_bits)
    try:
        padded = AESGCMSIV(keys.derive(sealed.epoch, binding)).decrypt(
            sealed.nonce, sealed.ciphertext, binding
        )
    except (InvalidTag, ValueError):
        raise Tampered("key material does not open under its own key version") from None
    return SecretBytes(_unpad(padded))


def _pad(body: bytes) -> bytes:
    needed = len(body) + 4
    for bucket in _BUCKETS:
        if needed <= bucket:
            break
    else:
        bucket = -(-needed // 4096) * 4096
    return struct.pack(">I", len(body)) + body + bytes(bucket - needed)


def _unpad(padded: bytes) -> bytes:
    (length,) = struct.unpack_from(">I", padded)
    return padded[4 : 4 + length]
