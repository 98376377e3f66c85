"""The pure core: ``apply(command, view) -> (reply, changes)``.

Sources: Azure Key Vault REST API (keys) and Managed HSM soft delete; the rules are
tabulated in docs/architecture.md. Nothing here reads a clock, a file or a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hsm_pool import limits
from hsm_pool.core import (
    epochs,
    key_release,
    key_transfer,
    membership,
    pool_limits,
    restore,
    role_management,
    rotation,
    secure_wrap,
)
from hsm_pool.core.commands import (
    ActivateEpoch,
    ActivateFirmware,
    AdmitPartition,
    AdvanceRestore,
    CancelRestore,
    Command,
    CommitRestore,
    CompleteAdmission,
    CreateKeyVersion,
    CreateRoleAssignment,
    CreateRoleDefinition,
    DeletedKeyReply,
    DeleteKey,
    DeleteRoleAssignment,
    DeleteRoleDefinition,
    DrainPartition,
    EmptyReply,
    HoldEpoch,
    NoteCheckpoint,
    ProposeEpoch,
    PurgeDeletedKey,
    PurgeDueKey,
    RecoverDeletedKey,
    RelinquishHousekeeping,
    ReplaceSecurityDomain,
    Reply,
    ReportSecurityVersion,
    RestartPartition,
    RestoreKey,
    ResumePartition,
    RotateKey,
    RotationPolicyReply,
    StageRecords,
    StartRestore,
    UpdateKeyVersion,
    UpdateRotationPolicy,
    VersionReply,
)
from hsm_pool.core.model import (
    POOL,
    CheckpointRecord,
    KeyOrigin,
    KeyRecord,
    KeyVersionRecord,
    PoolRecord,
    Record,
    RecordName,
    checkpoint_name,
    key_name,
    stored_bytes,
    version_name,
)
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import (
    DeletedKeyNotFound,
    InvalidField,
    KeyChanged,
    KeyExists,
    KeyNotFound,
    KeySoftDeleted,
    LimitExceeded,
    PurgeProtected,
    RotationPolicyMissing,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command answers and what it changes."""

    reply: Reply
    changes: Changes


def apply(command: Command, view: View) -> Outcome:
    """Decide a command.

    Raises:
        MHSMError: The command is refused; nothing changes (G8).
    """
    match command:
        case CreateKeyVersion():
            return _create(command, view)
        case UpdateKeyVersion():
            return _update(command, view)
        case DeleteKey():
            return _delete(command, view)
        case RecoverDeletedKey():
            return _recover(command, view)
        case PurgeDeletedKey() | PurgeDueKey():
            return _purge(command, view)
        case UpdateRotationPolicy():
            return _update_rotation_policy(command, view)
        case RotateKey():
            return _rotate(command, view)
        case (
            DrainPartition()
            | ResumePartition()
            | RestartPartition()
            | RelinquishHousekeeping()
            | AdmitPartition()
            | CompleteAdmission()
            | ActivateFirmware()
            | ReportSecurityVersion()
        ):
            return Outcome(EmptyReply(), membership.apply(command, view))
        case ReplaceSecurityDomain() | ProposeEpoch() | HoldEpoch() | ActivateEpoch():
            return Outcome(EmptyReply(), epochs.apply(command, view))
        case StartRestore() | StageRecords() | CommitRestore() | CancelRestore() | AdvanceRestore():
            return Outcome(EmptyReply(), restore.apply(command, view))
        case NoteCheckpoint():
            return _note_checkpoint(command, view)
        case RestoreKey():
            changes = restore.restore_key(command, view)
            return Outcome(VersionReply(command.versions[-1], pool_record(view).retention), changes)
        case (
            CreateRoleDefinition() | DeleteRoleDefinition() | CreateRoleAssignment() | DeleteRoleAssignment()
        ):
            return Outcome(*role_management.apply(command, view))


def _note_checkpoint(command: NoteCheckpoint, view: View) -> Outcome:
    """Keep the newest checkpoint and removal; a log that was begun anew counts from 1 again."""
    index, notes = command.partition_index, 1
    newest = (command.number, command.checkpoint)
    kept = (command.first_record, command.first_checkpoint)
    known = view.get(checkpoint_name(index))
    if isinstance(known, CheckpointRecord):
        notes += known.notes
        if known.checkpoint.partition("\n")[0] == command.checkpoint.partition("\n")[0]:
            if known.number >= command.number:
                newest = (known.number, known.checkpoint)
            kept = max(kept, (known.first_record, known.first_checkpoint))
            if (newest, kept) == (
                (known.number, known.checkpoint),
                (known.first_record, known.first_checkpoint),
            ):
                return Outcome(EmptyReply(), {})
    record = CheckpointRecord(index, *newest, notes, *kept)
    return Outcome(EmptyReply(), {checkpoint_name(index): record})


def pool_record(view: View) -> PoolRecord:
    """Return the pool's own record."""
    record = view.get(POOL)
    return record if isinstance(record, PoolRecord) else PoolRecord()


def active_key(view: View, key_id: str) -> KeyRecord:
    """Return a key that is not deleted.

    Raises:
        KeyNotFound: No such key.
        KeySoftDeleted: The key is soft-deleted.
        RestoreState: A restore is under way.
    """
    restore.refuse_while_restoring(view)
    record = view.get(key_name(key_id))
    if not isinstance(record, KeyRecord):
        raise KeyNotFound(f"key {key_id} does not exist")
    if record.deleted:
        raise KeySoftDeleted(f"key {key_id} is soft-deleted: recover or purge it")
    return record


def deleted_key(view: View, key_id: str) -> KeyRecord:
    """Return a soft-deleted key.

    Raises:
        DeletedKeyNotFound: No soft-deleted key of that id.
        RestoreState: A restore is under way.
    """
    restore.refuse_while_restoring(view)
    record = view.get(key_name(key_id))
    if not isinstance(record, KeyRecord) or not record.deleted:
        raise DeletedKeyNotFound(f"no soft-deleted key {key_id}")
    return record


def version_of(view: View, key: KeyRecord, version_id: str = "") -> KeyVersionRecord:
    """Return a version of a key, "" for the newest.

    Raises:
        KeyNotFound: No such version.
    """
    wanted = version_id or key.version_ids[-1]
    record = view.get(version_name(key.key_id, wanted))
    if not isinstance(record, KeyVersionRecord):
        raise KeyNotFound(f"key {key.key_id} has no version {wanted}")
    return record


def _create(command: CreateKeyVersion, view: View) -> Outcome:
    restore.refuse_while_restoring(view)
    existing = view.get(key_name(command.key_id))
    key = KeyRecord(command.key_id, ())
    if isinstance(existing, KeyRecord):
        if existing.deleted:
            raise KeyExists(f"key {command.key_id} is soft-deleted: recover or purge it", state="deleted")
        if command.must_not_exist:
            raise KeyExists(f"key {command.key_id} exists", state="active")
        key = existing
    else:
        pool_limits.check_keys(view)
    key_transfer.check_new(command.key_operations, exportable=command.exportable)
    secure_wrap.check_new(command.key_operations, exportable=command.exportable)
    key_release.check_new(
        command.key_type, command.key_operations, command.exportable, command.release_policy
    )
    version = KeyVersionRecord(
        key_id=command.key_id,
        version_id=command.version_id,
        key_type=command.key_type,
        curve=command.curve,
        size_bits=command.size_bits,
        public_key_der=command.public_key_der,
        key_operations=command.key_operations,
        enabled=command.enabled,
        not_before_ms=command.not_before_ms,
        expires_ms=command.expires_ms or rotation.expires_ms(key.rotation_policy, command.time_ms),
        created_ms=command.time_ms,
        updated_ms=command.time_ms,
        exportable=command.exportable,
        tags=dict(command.tags or {}),
        sealed_material=command.sealed_material,
        release_policy=command.release_policy,
        origin=command.origin,
    )
    return _add_version(view, key, version)


def _add_version(view: View, key: KeyRecord, version: KeyVersionRecord) -> Outcome:
    pool_limits.check_versions(view, key.key_id, len(key.version_ids) + 1)
    _check_times(version.not_before_ms, version.expires_ms)
    _check_room(view, key.key_id, key.version_ids, version)
    grown = replace(key, version_ids=(*key.version_ids, version.version_id))
    changes: Changes = {key_name(key.key_id): grown, version_name(key.key_id, version.version_id): version}
    pool_limits.check_bytes(view, changes)
    return Outcome(VersionReply(version, pool_record(view).retention), changes)


def _update(command: UpdateKeyVersion, view: View) -> Outcome:
    key = active_key(view, command.key_id)
    old = version_of(view, key, command.version_id)
    new = replace(
        old,
        enabled=old.enabled if command.enabled is None else command.enabled,
        not_before_ms=old.not_before_ms if command.not_before_ms is None else command.not_before_ms,
        expires_ms=old.expires_ms if command.expires_ms is None else command.expires_ms,
        key_operations=old.key_operations if command.key_operations is None else command.key_operations,
        tags=old.tags if command.tags is None else dict(command.tags),
        updated_ms=max(command.time_ms, old.updated_ms),
        release_policy=key_release.replaced(old, command.release_policy),
    )
    key_transfer.check_changed(old.key_operations, new.key_operations)
    secure_wrap.check_changed(old.key_operations, new.key_operations)
    _check_times(new.not_before_ms, new.expires_ms)
    _check_room(view, key.key_id, [other for other in key.version_ids if other != new.version_id], new)
    changes: Changes = {version_name(new.key_id, new.version_id): new}
    pool_limits.check_bytes(view, changes)
    return Outcome(VersionReply(new, pool_record(view).retention), changes)


def _check_room(view: View, key_id: str, others: Sequence[str], changed: KeyVersionRecord) -> None:
    """Keep a key with all its versions small enough for one transaction: it is restored in one."""
    used = stored_bytes(changed)
    for version_id in others:
        record = view.get(version_name(key_id, version_id))
        used += stored_bytes(record) if record else 0
    if used > limits.KEY_STORED_BYTES_MAX:
        raise LimitExceeded(f"key {key_id} with its versions and tags is larger than a pool stores")


def _check_times(not_before_ms: int, expires_ms: int) -> None:
    if not_before_ms and expires_ms and expires_ms <= not_before_ms:
        raise InvalidField("expires must lie after not_before", field="attributes.expires")


def _delete(command: DeleteKey, view: View) -> Outcome:
    key = active_key(view, command.key_id)
    retention = pool_record(view).retention
    deleted = replace(
        key,
        deleted_time_ms=command.time_ms,
        scheduled_purge_time_ms=command.time_ms + retention.recoverable_days * rotation.DAY_MS,
    )
    return Outcome(
        DeletedKeyReply(deleted, version_of(view, key), retention), {key_name(key.key_id): deleted}
    )


def _recover(command: RecoverDeletedKey, view: View) -> Outcome:
    key = deleted_key(view, command.key_id)
    recovered = replace(key, deleted_time_ms=0, scheduled_purge_time_ms=0)
    reply = VersionReply(version_of(view, key), pool_record(view).retention)
    return Outcome(reply, {key_name(key.key_id): recovered})


def _purge(command: PurgeDeletedKey | PurgeDueKey, view: View) -> Outcome:
    key = deleted_key(view, command.key_id)
    if not rotation.purge_due(key, command.time_ms):
        if isinstance(command, PurgeDueKey):
            raise KeyChanged(f"the retention of key {key.key_id} is not over")
        if pool_record(view).purge_protection:
            raise PurgeProtected(
                f"purge protection is on: key {key.key_id} is purged at its scheduled purge date, not before"
            )
    changes: dict[RecordName, Record | None] = {key_name(key.key_id): None}
    for version_id in key.version_ids:
        changes[version_name(key.key_id, version_id)] = None
    return Outcome(EmptyReply(), changes)


def rotatable_version(view: View, key_id: str) -> KeyVersionRecord:
    """Return the newest version of a key that may be rotated on demand.

    Raises:
        KeyNotFound: No such key.
        KeySoftDeleted: The key is soft-deleted.
        RotationPolicyMissing: It has no rotation policy (Azure Managed HSM wants one first).
    """
    key = active_key(view, key_id)
    if key.rotation_policy is None:
        raise RotationPolicyMissing(f"key {key_id} has no rotation policy: give it one before it is rotated")
    return version_of(view, key)


def _update_rotation_policy(command: UpdateRotationPolicy, view: View) -> Outcome:
    key = active_key(view, command.key_id)
    policy = rotation.checked(command.policy)
    if policy is not None:
        created_ms = key.rotation_policy.created_ms if key.rotation_policy else command.time_ms
        policy = replace(policy, created_ms=created_ms, updated_ms=max(command.time_ms, created_ms))
    changed = replace(key, rotation_policy=policy)
    return Outcome(RotationPolicyReply(changed), {key_name(key.key_id): changed})


def _rotate(command: RotateKey, view: View) -> Outcome:
    """Add a version like the newest. What was due is compared with what is due now: never rotated twice."""
    newest = rotatable_version(view, command.key_id)
    key = active_key(view, command.key_id)
    if command.replaces and (
        command.replaces != newest.version_id
        or not rotation.rotation_due(key, newest, command.time_ms, pool_limits.versions_per_key_max(view))
    ):
        raise KeyChanged(f"the rotation of key {key.key_id} is not due any more")
    if (newest.key_type, newest.curve, newest.size_bits) != (
        command.key_type,
        command.curve,
        command.size_bits,
    ):
        raise KeyChanged(f"key {key.key_id} got a version of another kind meanwhile: rotate it again")
    version = replace(
        newest,
        version_id=command.version_id,
        public_key_der=command.public_key_der,
        sealed_material=command.sealed_material,
        not_before_ms=0,
        expires_ms=rotation.expires_ms(key.rotation_policy, command.time_ms),
        created_ms=command.time_ms,
        updated_ms=command.time_ms,
        origin=KeyOrigin.GENERATED,
    )
    return _add_version(view, key, version)
