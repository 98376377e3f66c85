"""Records of the core to their stored protobuf form and back."""

from __future__ import annotations

from hsm_pool.core.model import (
    Admission,
    Curve,
    KeyOperation,
    KeyRecord,
    KeyType,
    KeyVersionRecord,
    PoolRecord,
    Record,
    RequestRecord,
    RestorePhase,
    RestoreRecord,
    SealedMaterial,
    StagedRecord,
)
from mhsm.record.v1 import record_pb2

KEY = record_pb2.RECORD_TYPE_KEY
KEY_VERSION = record_pb2.RECORD_TYPE_KEY_VERSION
REQUEST = record_pb2.RECORD_TYPE_REQUEST
POOL = record_pb2.RECORD_TYPE_POOL
RESTORE = record_pb2.RECORD_TYPE_RESTORE
STAGED = record_pb2.RECORD_TYPE_STAGED


def encode(record: Record) -> tuple[int, bytes]:
    """Return (record type, body) of a record."""
    message = record_pb2.Record()
    match record:
        case KeyRecord():
            message.key.CopyFrom(encode_key(record))
            kind = KEY
        case KeyVersionRecord():
            message.key_version.CopyFrom(encode_version(record))
            kind = KEY_VERSION
        case RequestRecord():
            message.request.CopyFrom(
                record_pb2.RequestRecord(
                    request_key=record.request_key,
                    request_digest=record.request_digest,
                    reply=record.reply,
                    answered_ms=record.answered_ms,
                )
            )
            kind = REQUEST
        case PoolRecord():
            message.pool.CopyFrom(
                record_pb2.PoolRecord(
                    recoverable_days=record.recoverable_days,
                    drained=sorted(record.drained),
                    header_digest=record.header_digest,
                    epoch=record.epoch,
                    next_epoch=record.next_epoch,
                    holders=sorted(record.holders),
                    housekeeper=record.housekeeper,
                    admissions=[
                        record_pb2.Admission(
                            index=index,
                            number=admission.number,
                            incarnation=admission.incarnation,
                            member_id=admission.member_id,
                            ready=admission.ready,
                        )
                        for index, admission in sorted(record.admissions.items())
                    ],
                )
            )
            kind = POOL
        case RestoreRecord():
            message.restore.CopyFrom(
                record_pb2.RestoreRecord(
                    restore_id=record.restore_id,
                    phase=record.phase,
                    manifest=record.manifest,
                    parts=record.parts,
                    staged_parts=sorted(record.staged_parts),
                )
            )
            kind = RESTORE
        case StagedRecord():
            if isinstance(record.record, KeyRecord):
                message.staged.key.CopyFrom(encode_key(record.record))
            else:
                message.staged.key_version.CopyFrom(encode_version(record.record))
            kind = STAGED
    return kind, message.SerializeToString(deterministic=True)


def decode(record_type: int, body: bytes) -> Record:
    """Return the record of a body.

    Raises:
        ValueError: The body is not a record of that type.
    """
    message = record_pb2.Record.FromString(body)
    which = message.WhichOneof("record")
    if which == "key" and record_type == KEY:
        return decode_key(message.key)
    if which == "key_version" and record_type == KEY_VERSION:
        return decode_version(message.key_version)
    if which == "request" and record_type == REQUEST:
        request = message.request
        return RequestRecord(request.request_key, request.request_digest, request.reply, request.answered_ms)
    if which == "pool" and record_type == POOL:
        pool = message.pool
        return PoolRecord(
            pool.recoverable_days,
            frozenset(pool.drained),
            pool.header_digest,
            pool.epoch or 1,
            pool.next_epoch,
            frozenset(pool.holders),
            housekeeper=pool.housekeeper,
            admissions={
                entry.index: Admission(entry.number, entry.incarnation, entry.member_id, entry.ready)
                for entry in pool.admissions
            },
        )
    if which == "restore" and record_type == RESTORE:
        restore = message.restore
        return RestoreRecord(
            restore.restore_id,
            RestorePhase(restore.phase),
            restore.manifest,
            restore.parts,
            frozenset(restore.staged_parts),
        )
    if which == "staged" and record_type == STAGED:
        if message.staged.WhichOneof("record") == "key":
            return StagedRecord(decode_key(message.staged.key))
        return StagedRecord(decode_version(message.staged.key_version))
    raise ValueError("a record's body does not fit its type")


def encode_key(record: KeyRecord) -> record_pb2.KeyRecord:
    """Return the message of a key."""
    return record_pb2.KeyRecord(
        key_id=record.key_id,
        version_ids=record.version_ids,
        deleted_time_ms=record.deleted_time_ms,
        scheduled_purge_time_ms=record.scheduled_purge_time_ms,
    )


def decode_key(message: record_pb2.KeyRecord) -> KeyRecord:
    """Return the key of a message."""
    return KeyRecord(
        message.key_id,
        tuple(message.version_ids),
        message.deleted_time_ms,
        message.scheduled_purge_time_ms,
    )


def encode_version(record: KeyVersionRecord) -> record_pb2.KeyVersionRecord:
    """Return the message of a key version."""
    return record_pb2.KeyVersionRecord(
        key_id=record.key_id,
        version_id=record.version_id,
        key_type=int(record.key_type),  # type: ignore[arg-type]
        curve=int(record.curve),  # type: ignore[arg-type]
        size_bits=record.size_bits,
        public_key_der=record.public_key_der,
        key_operations=[int(operation) for operation in record.key_operations],  # type: ignore[misc]
        enabled=record.enabled,
        not_before_ms=record.not_before_ms,
        expires_ms=record.expires_ms,
        created_ms=record.created_ms,
        updated_ms=record.updated_ms,
        exportable=record.exportable,
        tags=dict(record.tags),
        sealed_material=record_pb2.SealedMaterial(
            epoch=record.sealed_material.epoch,
            nonce=record.sealed_material.nonce,
            ciphertext=record.sealed_material.ciphertext,
        ),
    )


def decode_version(message: record_pb2.KeyVersionRecord) -> KeyVersionRecord:
    """Return the key version of a message.

    Raises:
        ValueError: A number in it has no meaning.
    """
    return KeyVersionRecord(
        key_id=message.key_id,
        version_id=message.version_id,
        key_type=KeyType(message.key_type),
        curve=Curve(message.curve),
        size_bits=message.size_bits,
        public_key_der=message.public_key_der,
        key_operations=tuple(KeyOperation(operation) for operation in message.key_operations),
        enabled=message.enabled,
        not_before_ms=message.not_before_ms,
        expires_ms=message.expires_ms,
        created_ms=message.created_ms,
        updated_ms=message.updated_ms,
        exportable=message.exportable,
        tags=dict(message.tags),
        sealed_material=SealedMaterial(
            message.sealed_material.epoch,
            message.sealed_material.nonce,
            message.sealed_material.ciphertext,
        ),
    )
