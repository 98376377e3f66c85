"""Records of the core to their stored protobuf form and back."""

from __future__ import annotations

from hsm_pool.core.model import (
    Admission,
    CheckpointRecord,
    Curve,
    KeyOperation,
    KeyOrigin,
    KeyRecord,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    PoolRecord,
    PrincipalRecord,
    Record,
    RequestRecord,
    RestorePhase,
    RestoreRecord,
    RoleAssignment,
    RoleDefinitionRecord,
    RolesRecord,
    RotationPolicy,
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
PRINCIPAL = record_pb2.RECORD_TYPE_PRINCIPAL
ROLE_DEFINITION = record_pb2.RECORD_TYPE_ROLE_DEFINITION
ROLES = record_pb2.RECORD_TYPE_ROLES
CHECKPOINT = record_pb2.RECORD_TYPE_CHECKPOINT


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
                            made_up_ms=admission.made_up_ms,
                        )
                        for index, admission in sorted(record.admissions.items())
                    ],
                    security_versions=[
                        record_pb2.ReportedSecurityVersion(index=index, security_version=version)
                        for index, version in sorted(record.security_versions.items())
                    ],
                    security_version_floor=record.security_version_floor,
                    purge_protection=record.purge_protection,
                    keys_max=record.keys_max,
                    versions_per_key_max=record.versions_per_key_max,
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
                    principals=record.principals,
                )
            )
            kind = RESTORE
        case CheckpointRecord():
            message.checkpoint.CopyFrom(
                record_pb2.CheckpointRecord(
                    partition_index=record.partition_index,
                    checkpoint=record.checkpoint,
                    notes=record.notes,
                    number=record.number,
                    first_record=record.first_record,
                    first_checkpoint=record.first_checkpoint,
                )
            )
            kind = CHECKPOINT
        case StagedRecord():
            message.staged.CopyFrom(_encode_staged(record))
            kind = STAGED
        case PrincipalRecord():
            message.principal.CopyFrom(encode_principal(record))
            kind = PRINCIPAL
        case RoleDefinitionRecord():
            message.role_definition.CopyFrom(encode_role_definition(record))
            kind = ROLE_DEFINITION
        case RolesRecord():
            message.roles.CopyFrom(record_pb2.RolesRecord(changes=record.changes))
            kind = ROLES
    return kind, message.SerializeToString(deterministic=True)


def decode(record_type: int, body: bytes) -> Record:
    """Return the record of a body.

    Raises:
        ValueError: The body is not a record of that type.
    """
    try:
        message = record_pb2.Record.FromString(body)
    except Exception:  # noqa: BLE001 - the protobuf parser's own error
        raise ValueError("a record is not readable") from None
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
                entry.index: Admission(
                    entry.number, entry.incarnation, entry.member_id, entry.ready, entry.made_up_ms
                )
                for entry in pool.admissions
            },
            security_versions={entry.index: entry.security_version for entry in pool.security_versions},
            security_version_floor=pool.security_version_floor,
            purge_protection=pool.purge_protection,
            keys_max=pool.keys_max,
            versions_per_key_max=pool.versions_per_key_max,
        )
    if which == "restore" and record_type == RESTORE:
        restore = message.restore
        return RestoreRecord(
            restore.restore_id,
            RestorePhase(restore.phase),
            restore.manifest,
            restore.parts,
            frozenset(restore.staged_parts),
            tuple(restore.principals),
        )
    if which == "checkpoint" and record_type == CHECKPOINT:
        noted = message.checkpoint
        return CheckpointRecord(
            noted.partition_index,
            noted.number,
            noted.checkpoint,
            noted.notes,
            noted.first_record,
            noted.first_checkpoint,
        )
    if which == "staged" and record_type == STAGED:
        return _decode_staged(message.staged)
    if which == "principal" and record_type == PRINCIPAL:
        return decode_principal(message.principal)
    if which == "role_definition" and record_type == ROLE_DEFINITION:
        return decode_role_definition(message.role_definition)
    if which == "roles" and record_type == ROLES:
        return RolesRecord(message.roles.changes)
    raise ValueError("a record's body does not fit its type")


def _encode_staged(record: StagedRecord) -> record_pb2.StagedRecord:
    match record.record:
        case KeyRecord():
            return record_pb2.StagedRecord(key=encode_key(record.record))
        case KeyVersionRecord():
            return record_pb2.StagedRecord(key_version=encode_version(record.record))
        case PrincipalRecord():
            return record_pb2.StagedRecord(principal=encode_principal(record.record))
        case RoleDefinitionRecord():
            return record_pb2.StagedRecord(role_definition=encode_role_definition(record.record))


def _decode_staged(message: record_pb2.StagedRecord) -> StagedRecord:
    match message.WhichOneof("record"):
        case "key":
            return StagedRecord(decode_key(message.key))
        case "key_version":
            return StagedRecord(decode_version(message.key_version))
        case "principal":
            return StagedRecord(decode_principal(message.principal))
        case "role_definition":
            return StagedRecord(decode_role_definition(message.role_definition))
    raise ValueError("a record's body does not fit its type")


def encode_principal(record: PrincipalRecord) -> record_pb2.PrincipalRecord:
    """Return the message of a principal's role assignments."""
    message = record_pb2.PrincipalRecord(principal_id=record.principal_id)
    for assignment in record.assignments:
        message.assignments.add(
            name=assignment.name,
            role_definition_id=assignment.role_definition_id,
            scope=assignment.scope,
        )
    return message


def decode_principal(message: record_pb2.PrincipalRecord) -> PrincipalRecord:
    """Return a principal's role assignments of a message."""
    return PrincipalRecord(
        message.principal_id,
        tuple(
            RoleAssignment(entry.name, message.principal_id, entry.role_definition_id, entry.scope)
            for entry in message.assignments
        ),
    )


def encode_role_definition(record: RoleDefinitionRecord) -> record_pb2.RoleDefinitionRecord:
    """Return the message of a custom role."""
    return record_pb2.RoleDefinitionRecord(
        role_definition_id=record.role_definition_id,
        role_name=record.role_name,
        description=record.description,
        data_actions=record.data_actions,
        not_data_actions=record.not_data_actions,
    )


def decode_role_definition(message: record_pb2.RoleDefinitionRecord) -> RoleDefinitionRecord:
    """Return the custom role of a message."""
    return RoleDefinitionRecord(
        message.role_definition_id,
        message.role_name,
        message.description,
        tuple(message.data_actions),
        tuple(message.not_data_actions),
    )


def encode_key(record: KeyRecord) -> record_pb2.KeyRecord:
    """Return the message of a key."""
    policy = record.rotation_policy
    return record_pb2.KeyRecord(
        key_id=record.key_id,
        version_ids=record.version_ids,
        deleted_time_ms=record.deleted_time_ms,
        scheduled_purge_time_ms=record.scheduled_purge_time_ms,
        rotation_policy=record_pb2.RotationPolicyRecord(
            time_after_create=policy.time_after_create,
            time_before_expiry=policy.time_before_expiry,
            expiry_time=policy.expiry_time,
            created_ms=policy.created_ms,
            updated_ms=policy.updated_ms,
        )
        if policy
        else None,
    )


def decode_key(message: record_pb2.KeyRecord) -> KeyRecord:
    """Return the key of a message."""
    policy = message.rotation_policy
    return KeyRecord(
        message.key_id,
        tuple(message.version_ids),
        message.deleted_time_ms,
        message.scheduled_purge_time_ms,
        RotationPolicy(
            policy.time_after_create,
            policy.time_before_expiry,
            policy.expiry_time,
            policy.created_ms,
            policy.updated_ms,
        )
        if message.HasField("rotation_policy")
        else None,
    )


def encode_version(record: KeyVersionRecord) -> record_pb2.KeyVersionRecord:
    """Return the message of a key version."""
    policy = record.release_policy
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
        release_policy=record_pb2.ReleasePolicyRecord(data=policy.data, immutable=policy.immutable)
        if policy
        else None,
        origin=int(record.origin),  # type: ignore[arg-type]
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
        release_policy=KeyReleasePolicy(message.release_policy.data, message.release_policy.immutable)
        if message.HasField("release_policy")
        else None,
        origin=KeyOrigin(message.origin),
    )
