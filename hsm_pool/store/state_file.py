"""What a partition keeps on its own disk: incarnation, last applied head, platform seal.

The last applied head is written and synced before a renewal reports it, so a store
that was rolled back behind it is noticed at the next start (G6). It carries a MAC of the
epoch it was written in; with the platform seal the pool keys lie beside it, encrypted
under the simulated platform's sealing key.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store.sealing import PoolKeys, Tampered
from mhsm.record.v1 import record_pb2

_LABEL = b"mhsm/state-file/v1"
_SLOT_BYTES = 512
_PREFIX = ">HI"
"""Length of the body in bytes, and epoch of the MAC."""
_PREFIX_BYTES = struct.calcsize(_PREFIX)
_NONCE_BYTES = 12


_FOR_THE_AGENT = 0o640
"""The node agent reads incarnation and lock, through the directory's group where it is another user."""


def write_atomically(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file's content so that a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class StateDirectory:
    """The directory of one partition, locked while the process lives.

    The lock is what lets others take a newer incarnation as proof that the older one
    is dead: a stopped process still holds it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, _FOR_THE_AGENT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise RuntimeError("another process of this partition is alive") from error
        self.incarnation = self._next_incarnation()
        self._slots = os.open(directory / "head", os.O_RDWR | os.O_CREAT, 0o600)
        self._turn = 0

    def close(self) -> None:
        """Release the lock."""
        os.close(self._slots)
        os.close(self._lock)

    def _next_incarnation(self) -> int:
        path = self._directory / "incarnation"
        previous = int(path.read_text()) if path.exists() else 0
        write_atomically(path, str(previous + 1).encode(), _FOR_THE_AGENT)
        return previous + 1

    def write_head(self, keys: PoolKeys, sequence: int, digest: bytes) -> None:
        """Note the last applied head; returns when it is on disk.

        Two slots are written in turn, so a torn write leaves the other one whole.
        """
        body = record_pb2.PartitionStateSecret(
            pool_id=keys.pool_id, sequence=sequence, head_digest=digest
        ).SerializeToString(deterministic=True)
        epoch = keys.epoch
        content = struct.pack(_PREFIX, len(body), epoch) + body
        slot = content + keys.mac(epoch, _LABEL, content)
        os.pwrite(self._slots, slot.ljust(_SLOT_BYTES, b"\x00"), self._turn * _SLOT_BYTES)
        os.fdatasync(self._slots)
        self._turn = 1 - self._turn

    def read_head(self, keys: PoolKeys) -> tuple[int, bytes] | None:
        """Return (sequence, digest) of the newest whole slot; None when no head was ever noted.

        Raises:
            Tampered: Slots exist and none of them is this pool's.
        """
        best: tuple[int, bytes] | None = None
        written = False
        for turn in (0, 1):
            slot = os.pread(self._slots, _SLOT_BYTES, turn * _SLOT_BYTES)
            if not slot.strip(b"\x00"):
                continue
            written = True
            try:
                length, epoch = struct.unpack_from(_PREFIX, slot)
                end = _PREFIX_BYTES + length
                content, mac = slot[:end], slot[end : end + 32]
                keys.check_mac(epoch, _LABEL, content, mac, "the state file")
                state = record_pb2.PartitionStateSecret.FromString(content[_PREFIX_BYTES:])
            except (Tampered, struct.error):
                continue
            if best is None or state.sequence > best[0]:
                best = (state.sequence, state.head_digest)
                self._turn = 1 - turn
        if written and best is None:
            raise Tampered("the partition's state file does not carry this pool's MAC")
        return best

    def has_head(self) -> bool:
        """Return whether a head was ever noted here: then the store must hold a chain (G6)."""
        return bool(os.pread(self._slots, 2 * _SLOT_BYTES, 0).strip(b"\x00"))

    def write_seal(self, sealing_key: SecretBytes, keys: PoolKeys) -> None:
        """Seal the pool keys to this platform."""
        nonce = os.urandom(_NONCE_BYTES)
        aead = AESGCM(_seal_key(sealing_key, keys.pool_id))
        sealed = aead.encrypt(nonce, keys.export().reveal(), keys.pool_id.encode())
        write_atomically(self._directory / "platform-seal", nonce + sealed)

    def read_seal(self, sealing_key: SecretBytes, pool_id: str) -> PoolKeys | None:
        """Open the platform seal; None when there is none or it is not this platform's."""
        path = self._directory / "platform-seal"
        if not path.exists():
            return None
        content = path.read_bytes()
        try:
            aead = AESGCM(_seal_key(sealing_key, pool_id))
            opened = aead.decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], pool_id.encode())
        except (InvalidTag, ValueError):
            return None
        return PoolKeys(pool_id, SecretBytes(opened))


def _seal_key(sealing_key: SecretBytes, pool_id: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=pool_id.encode(), info=b"mhsm/platform-seal/v1").derive(
        sealing_key.reveal()
    )
