"""A whole table, as it was read from the store: checked against the chain before any of it counts (G6)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hsm_pool import limits
from hsm_pool.core.model import Record, RecordName, name_of
from hsm_pool.core.state import State
from hsm_pool.store import chain, codec
from hsm_pool.store.chain import Head, TableDigest
from hsm_pool.store.sealing import MissingEpoch, PoolKeys, RolledBack, Tampered, open_record
from mhsm.record.v1 import record_pb2

RECENT_TRANSACTIONS: Final = 1024
"""Transactions whose ids are known, and at least so many log entries are checked."""


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A table that is what the chain says."""

    head: Head
    header: bytes
    state: State
    table: TableDigest
    names: dict[bytes, RecordName]
    """Of the records, by opaque id."""
    recent: OrderedDict[int, bytes]
    """Ids of the newest transactions, by sequence."""


def read_table(keys: PoolKeys, values: Mapping[str, bytes], known: tuple[int, bytes] | None) -> LoadedTable:
    """Check a whole table, read at one revision, and open its records.

    Args:
        keys: Of the pool; ``keys.epoch`` is in force as far as this partition knows.
        values: All keys of the pool.
        known: (sequence, digest) of a head that the store must contain, if one is known.

    Raises:
        Tampered: The table is not what the chain says, or lacks the known head.
        MissingEpoch: It is of an epoch whose key is not here.
    """
    head = _read_head(keys, values)
    recent = _walk(keys, head, values, known)
    if head.epoch < keys.epoch:
        raise RolledBack(
            f"the store was rolled back: it ends in epoch {head.epoch}, and epoch {keys.epoch} is in force"
        )
    state, table, names = _read_records(keys, values, head.epoch)
    last = chain.read_log_entry(keys, values[chain.log_key(head.sequence)])
    if last.table_digest != table.root():
        raise Tampered(
            f"the records in the store are not those of sequence {head.sequence}: "
            "one was changed, swapped, replayed, removed or added outside the chain"
        )
    if not last.epoch == head.epoch == state.pool().epoch:
        raise Tampered(f"sequence {head.sequence} is not of the epoch that is in force after it")
    header = values.get(chain.HEADER_KEY, b"")
    if state.pool().header_digest != chain.value_digest(header):
        raise Tampered("the pool header in the store is not the one the chain knows")
    return LoadedTable(head, header, state, table, names, recent)


def audit_records(
    keys: PoolKeys, values: Mapping[str, bytes], head: Head, recorded: int
) -> list[tuple[int, list[bytes]]]:
    """Return the audit records of every transaction after a sequence, as (sequence, records), in order.

    Each entry is the one that the entry after it names: the MAC alone would let the holder of
    an old epoch's keys rewrite what happened in it.

    Raises:
        Tampered: An entry is not the one that the chain names.
    """
    oldest = max(recorded + 1, head.sequence - limits.LOG_RING_ENTRIES + 1)
    named, found = head.digest, []
    for sequence in range(head.sequence, oldest - 1, -1):
        value = values.get(chain.log_key(sequence), b"")
        if chain.value_digest(value) != named:
            raise Tampered(f"the log entry of sequence {sequence} is not the one that the chain names")
        entry = chain.read_log_entry(keys, value)
        named = entry.previous_digest
        found.append((entry.sequence, chain.read_audit(keys, entry)))
    return found[::-1]


def open_as_record(
    keys: PoolKeys, opaque_id: bytes, value: bytes, epochs: range
) -> tuple[int, RecordName, Record]:
    """Open a sealed record; returns (sequence, name, record).

    Raises:
        Tampered: It is not one that this pool has sealed under this id.
    """
    record_type, sequence, body = open_record(keys, opaque_id, value, epochs)
    try:
        record = codec.decode(record_type, body)
    except ValueError as error:
        raise Tampered(str(error)) from None
    name = name_of(record)
    if keys.opaque_id(name) != opaque_id:
        raise Tampered("a record stands under another record's id")
    return sequence, name, record


def opaque_id_of(key: str) -> bytes:
    """Return the opaque id in a record's key.

    Raises:
        Tampered: There is none.
    """
    try:
        opaque_id = bytes.fromhex(key.removeprefix(chain.RECORD_PREFIX))
    except ValueError:
        opaque_id = b""
    if len(opaque_id) != 32:
        raise Tampered("a record stands under a key that is no opaque id")
    return opaque_id


def _read_head(keys: PoolKeys, values: Mapping[str, bytes]) -> Head:
    value = values.get(chain.HEAD_KEY)
    if value is None:
        raise Tampered("the store has lost the head of the chain")
    try:
        return chain.read_head(keys, value)
    except Tampered:
        if _slept_through(keys, value, values.get(chain.HEADER_KEY, b"")):
            raise MissingEpoch from None
        raise


def _slept_through(keys: PoolKeys, head: bytes, header: bytes) -> bool:
    """Return whether head and header agree on a later epoch whose key is not here.

    Neither can be checked without it: the partition gets it from a peer, and then checks.
    """
    try:
        epoch = record_pb2.Head.FromString(head).epoch
        sealed = record_pb2.PoolHeader.FromString(header).sealed_epoch.epoch
    except Exception:  # noqa: BLE001 - the protobuf parser's own error
        return False
    return epoch == sealed and epoch > keys.epoch and not keys.holds(epoch)


def _walk(
    keys: PoolKeys, head: Head, values: Mapping[str, bytes], known: tuple[int, bytes] | None
) -> OrderedDict[int, bytes]:
    """Check the chain from the known head (or the last entries) up to head; return the newest ids."""
    sequence, digest = known or (max(0, head.sequence - RECENT_TRANSACTIONS), b"")
    if head.sequence < sequence:
        raise RolledBack(
            f"the store was rolled back: it ends at sequence {head.sequence}, "
            f"this partition has applied sequence {sequence}"
        )
    if head.sequence - sequence >= limits.LOG_RING_ENTRIES:
        sequence, digest = head.sequence - limits.LOG_RING_ENTRIES + 1, b""
    recent: OrderedDict[int, bytes] = OrderedDict()
    position: Head | None = None
    if sequence == 0:
        position = Head(0, chain.genesis_digest(keys.pool_id), b"")
    elif digest:
        position = _known_head(keys, values, sequence, digest)
    for next_sequence in range(sequence + 1, head.sequence + 1):
        value = values.get(chain.log_key(next_sequence))
        if value is None:
            raise Tampered(f"the log entry of sequence {next_sequence} is missing")
        entry = chain.read_log_entry(keys, value)
        if position is None:
            if entry.sequence != next_sequence:
                raise Tampered(f"the slot of sequence {next_sequence} holds another entry")
        else:
            chain.check_link(position, entry)
        position = Head(next_sequence, chain.value_digest(value), b"", entry.epoch)
        recent[next_sequence] = entry.transaction_id
        while len(recent) > RECENT_TRANSACTIONS:
            recent.popitem(last=False)
    if position is not None and position.digest != head.digest:
        raise Tampered("the head of the chain is not the digest of its log entry")
    return recent


def _known_head(keys: PoolKeys, values: Mapping[str, bytes], sequence: int, digest: bytes) -> Head:
    value = values.get(chain.log_key(sequence), b"")
    if chain.value_digest(value) != digest:
        raise Tampered(
            f"the store does not contain the head of sequence {sequence} that this partition has applied"
        )
    return Head(sequence, digest, b"", chain.read_log_entry(keys, value).epoch)


def _read_records(
    keys: PoolKeys, values: Mapping[str, bytes], newest_epoch: int
) -> tuple[State, TableDigest, dict[bytes, RecordName]]:
    records: list[tuple[int, RecordName, Record]] = []
    names: dict[bytes, RecordName] = {}
    table = TableDigest()
    for key, value in values.items():
        if key.startswith(chain.RECORD_PREFIX):
            opaque_id = opaque_id_of(key)
            sequence, name, record = open_as_record(keys, opaque_id, value, range(1, newest_epoch + 1))
            records.append((sequence, name, record))
            names[opaque_id] = name
            table.update([(opaque_id, chain.value_digest(value))])
    records.sort(key=lambda item: item[0])
    return State((name, record) for _, name, record in records), table, names
