"""The pool's hash chain: one log entry a transaction, and a digest of the whole table (G6).

Every log entry names the entry before it, what each changed record was before and
after, and the digest of the table of all records afterwards. A partition applies only
the next sequence with the matching digests; at a start, the table that was loaded must
have exactly the digest that the head's entry states.

**Epochs.** A transaction belongs to the epoch that the pool record names after it: the
one that puts an epoch in force is the first of that epoch. Head, entry, changed records
and audit records are under its keys. Epochs never go back along the chain, so whoever
holds the keys of old epochs only can continue no chain that has left them (G4).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hsm_pool import limits
from hsm_pool.core.model import POOL, PoolRecord, Record, RecordName
from hsm_pool.store import codec
from hsm_pool.store.sealing import PoolKeys, Tampered, open_record, seal_record
from mhsm.record.v1 import record_pb2

HEAD_KEY = "head"
HEADER_KEY = "header"
RECORD_PREFIX = "record/"
LOG_PREFIX = "log/"
FRESH_PREFIX = "fresh/"

_HEAD_LABEL = b"mhsm/head/v1"
_LOG_LABEL = b"mhsm/log/v1"
_GENESIS_LABEL = b"mhsm/genesis/v1"
_AUDIT: RecordName = ("audit",)


@dataclass(frozen=True, slots=True)
class Head:
    """Newest sequence of the chain and the digest of its log entry."""

    sequence: int
    digest: bytes
    value: bytes
    """As it stands in the store."""
    epoch: int = 0
    """Of its transaction; 0 before the first one."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """A mutation, ready to be committed against the head it was built on."""

    transaction_id: bytes
    sequence: int
    puts: Mapping[str, bytes]
    deletes: tuple[str, ...]


class TableDigest:
    """SHA-256 over the sorted table (opaque id, digest), in 256 buckets so that a change is cheap."""

    def __init__(self) -> None:
        self._buckets: list[dict[bytes, bytes]] = [{} for _ in range(256)]
        self._digests = [_bucket_digest({})] * 256

    def get(self, opaque_id: bytes) -> bytes:
        """Return the digest of a record's value, b"" when it does not exist."""
        return self._buckets[opaque_id[0]].get(opaque_id, b"")

    def after(self, changes: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the table's digest as it would be after the changes (b"" deletes)."""
        digests = list(self._digests)
        touched: dict[int, dict[bytes, bytes]] = {}
        for opaque_id, digest in changes:
            bucket = touched.setdefault(opaque_id[0], dict(self._buckets[opaque_id[0]]))
            if digest:
                bucket[opaque_id] = digest
            else:
                bucket.pop(opaque_id, None)
        for index, bucket in touched.items():
            digests[index] = _bucket_digest(bucket)
        return _root(digests)

    def update(self, changes: Iterable[tuple[bytes, bytes]]) -> None:
        """Make the changes (b"" deletes)."""
        touched = set()
        for opaque_id, digest in changes:
            index = opaque_id[0]
            touched.add(index)
            if digest:
                self._buckets[index][opaque_id] = digest
            else:
                self._buckets[index].pop(opaque_id, None)
        for index in touched:
            self._digests[index] = _bucket_digest(self._buckets[index])

    def root(self) -> bytes:
        """Return the table's digest."""
        return _root(self._digests)


def _bucket_digest(bucket: Mapping[bytes, bytes]) -> bytes:
    return hashlib.sha256(b"".join(key + bucket[key] for key in sorted(bucket))).digest()


def _root(digests: list[bytes]) -> bytes:
    return hashlib.sha256(b"mhsm/table/v1\x00" + b"".join(digests)).digest()


def value_digest(value: bytes) -> bytes:
    """Return the digest under which the chain knows a record's value."""
    return hashlib.sha256(value).digest()


def genesis_digest(pool_id: str) -> bytes:
    """Return what the first log entry names as the entry before it."""
    return hashlib.sha256(_GENESIS_LABEL + b"\x00" + pool_id.encode()).digest()


def log_key(sequence: int) -> str:
    """Return the ring slot of a sequence."""
    return f"{LOG_PREFIX}{sequence % limits.LOG_RING_ENTRIES:05d}"


def record_key(opaque_id: bytes) -> str:
    """Return the key of a record."""
    return RECORD_PREFIX + opaque_id.hex()


def build_transaction(
    keys: PoolKeys,
    partition_index: int,
    head: Head,
    table: TableDigest,
    changes: Mapping[RecordName, Record | None],
    audit: Sequence[bytes],
    header: bytes = b"",
) -> Transaction:
    """Seal the changes into the transaction that follows head. No changes make an empty mutation.

    A header comes with the change of the pool record that names its digest. The audit records of
    the mutations ride along, so that a mutation that is committed is on record everywhere (G7).
    """
    sequence = head.sequence + 1
    pool = changes.get(POOL)
    epoch = pool.epoch if isinstance(pool, PoolRecord) else keys.epoch
    puts: dict[str, bytes] = {}
    deletes: list[str] = []
    digests: list[tuple[bytes, bytes]] = []
    entry = record_pb2.LogEntry(
        sequence=sequence,
        transaction_id=os.urandom(16),
        previous_digest=head.digest,
        partition_index=partition_index,
        epoch=epoch,
    )
    for name, record in sorted(changes.items()):
        opaque_id = keys.opaque_id(name)
        old = table.get(opaque_id)
        if record is None:
            if not old:
                continue
            deletes.append(record_key(opaque_id))
            new = b""
        else:
            record_type, body = codec.encode(record)
            value = seal_record(keys, epoch, record_type, opaque_id, sequence, head.digest, body)
            puts[record_key(opaque_id)] = value
            new = value_digest(value)
        digests.append((opaque_id, new))
        entry.changes.add(opaque_id=opaque_id, old_digest=old, new_digest=new)
    entry.table_digest = table.after(digests)
    body = zlib.compress(b"\n".join(audit))
    kind, opaque_id = record_pb2.RECORD_TYPE_AUDIT, keys.opaque_id(_AUDIT)
    entry.sealed_audit = seal_record(keys, epoch, kind, opaque_id, sequence, head.digest, body)
    entry.mac = keys.mac(epoch, _LOG_LABEL, entry.SerializeToString(deterministic=True))
    log_value = entry.SerializeToString(deterministic=True)
    puts[log_key(sequence)] = log_value
    if header:
        puts[HEADER_KEY] = header
    puts[HEAD_KEY] = _head_value(keys, epoch, sequence, value_digest(log_value))
    return Transaction(entry.transaction_id, sequence, puts, tuple(deletes))


def _head_value(keys: PoolKeys, epoch: int, sequence: int, digest: bytes) -> bytes:
    head = record_pb2.Head(sequence=sequence, digest=digest, epoch=epoch)
    head.mac = keys.mac(epoch, _HEAD_LABEL, _head_content(head))
    return head.SerializeToString(deterministic=True)


def _head_content(head: record_pb2.Head) -> bytes:
    return head.epoch.to_bytes(4, "big") + head.sequence.to_bytes(8, "big") + head.digest


def read_head(keys: PoolKeys, value: bytes) -> Head:
    """Parse and check a head.

    Raises:
        Tampered: It is not this pool's.
    """
    try:
        message = record_pb2.Head.FromString(value)
    except Exception:  # noqa: BLE001
        raise Tampered("the head of the chain is not readable") from None
    keys.check_mac(message.epoch, _HEAD_LABEL, _head_content(message), message.mac, "the head of the chain")
    return Head(message.sequence, message.digest, value, message.epoch)


def read_log_entry(keys: PoolKeys, value: bytes) -> record_pb2.LogEntry:
    """Parse and check a log entry against the epoch that it names; its place in the chain is not checked.

    Raises:
        Tampered: It is not this pool's.
    """
    try:
        entry = record_pb2.LogEntry.FromString(value)
    except Exception:  # noqa: BLE001
        raise Tampered("a log entry is not readable") from None
    mac, entry.mac = entry.mac, b""
    keys.check_mac(entry.epoch, _LOG_LABEL, entry.SerializeToString(deterministic=True), mac, "a log entry")
    entry.mac = mac
    return entry


def read_audit(keys: PoolKeys, entry: record_pb2.LogEntry) -> list[bytes]:
    """Return the audit records of a checked log entry.

    Raises:
        Tampered: There are none, or they do not open in their place.
    """
    if not entry.sealed_audit:
        raise Tampered(f"sequence {entry.sequence} came without its audit records")
    epochs = range(entry.epoch, entry.epoch + 1)
    kind, sequence, body = open_record(keys, keys.opaque_id(_AUDIT), entry.sealed_audit, epochs)
    if kind != record_pb2.RECORD_TYPE_AUDIT or sequence != entry.sequence:
        raise Tampered(f"the audit records of sequence {entry.sequence} belong elsewhere")
    return zlib.decompress(body).split(b"\n")


def check_link(head: Head, entry: record_pb2.LogEntry) -> None:
    """Check that an entry follows a head.

    Raises:
        Tampered: It does not.
    """
    if entry.sequence != head.sequence + 1:
        raise Tampered(f"sequence {entry.sequence} does not follow sequence {head.sequence}")
    if entry.previous_digest != head.digest:
        raise Tampered(f"sequence {entry.sequence} names another history before it")
    if entry.epoch < head.epoch:
        raise Tampered(
            f"sequence {entry.sequence} is of epoch {entry.epoch}, which epoch {head.epoch} has replaced"
        )
