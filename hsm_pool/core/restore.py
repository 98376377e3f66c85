"""Restores, decided purely: staged records replace all keys and roles, or are dropped; never half of either.

::

    STAGING ──commit──► REMOVING ──► PLACING ──► DONE
       └─────cancel───► CANCELLING ──► CANCELLED

A transaction of the store holds about a hundred records, a pool thousands. So the
decision is one transaction, and what follows from it is done in batches that any
partition can go on with: until the phase is over, no key is served. Whoever restores keeps
his own role assignments beside those of the backup, and the custom roles that they name as
they are, so that a pool is never without him.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from hsm_pool.core import pool_limits
from hsm_pool.core.commands import (
    AdvanceRestore,
    CancelRestore,
    CommitRestore,
    RestoreKey,
    StageRecords,
    StartRestore,
)
from hsm_pool.core.model import (
    RESTORE,
    KeyRecord,
    PrincipalRecord,
    Record,
    RecordName,
    Restorable,
    RestorePhase,
    RestoreRecord,
    RoleDefinitionRecord,
    StagedRecord,
    bytes_about,
    key_name,
    name_of,
    principal_name,
    role_definition_name,
    version_name,
)
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import KeyExists, RestoreState

BATCH_RECORDS = 50
"""Records that one command stages, removes or places: with their deletions they fit a transaction."""

BATCH_BYTES = 256 * 1024
"""So many bytes of them, about."""


def restore_of(view: View) -> RestoreRecord | None:
    """Return the restore under way, or the last one."""
    record = view.get(RESTORE)
    return record if isinstance(record, RestoreRecord) else None


def refuse_while_restoring(view: View) -> None:
    """Refuse whatever rests on keys.

    Raises:
        RestoreState: A restore is under way.
    """
    restore = restore_of(view)
    if restore and not restore.phase.over:
        raise RestoreState(
            "the pool is being restored: no key is served until that is over", phase=restore.phase.name
        )


def apply(
    command: StartRestore | StageRecords | CommitRestore | CancelRestore | AdvanceRestore, view: View
) -> Changes:
    """Decide a command of a full restore.

    Raises:
        RestoreState: The restore is not where the command needs it.
    """
    match command:
        case StartRestore():
            return _start(command, view)
        case StageRecords():
            return _stage(command, view)
        case CommitRestore():
            return _commit(command, view)
        case CancelRestore():
            return _cancel(command, view)
        case AdvanceRestore():
            return _advance(command, view)


def _start(command: StartRestore, view: View) -> Changes:
    """Begin to stage."""
    refuse_while_restoring(view)
    return {
        RESTORE: RestoreRecord(
            command.restore_id,
            RestorePhase.STAGING,
            command.manifest,
            command.parts,
            principals=command.principals,
        )
    }


def _stage(command: StageRecords, view: View) -> Changes:
    """Stage records; a repeat writes them again."""
    restore = _in_phase(view, command.restore_id, RestorePhase.STAGING)
    changes: dict[RecordName, Record | None] = {}
    for record in command.records:
        staged = StagedRecord(record)
        changes[name_of(staged)] = staged
    pool_limits.check_staged_bytes(view, changes)
    if command.last:
        changes[RESTORE] = replace(restore, staged_parts=restore.staged_parts | {command.part})
    return changes


def _commit(command: CommitRestore, view: View) -> Changes:
    """Decide for the staged keys; a repeat changes nothing."""
    restore = restore_of(view)
    decided = {RestorePhase.REMOVING, RestorePhase.PLACING, RestorePhase.DONE}
    if restore and restore.restore_id == command.restore_id and restore.phase in decided:
        return {}
    restore = _in_phase(view, command.restore_id, RestorePhase.STAGING)
    missing = restore.parts - len(restore.staged_parts)
    if missing:
        raise RestoreState(f"{missing} of {restore.parts} parts are not staged yet", phase="STAGING")
    return {RESTORE: replace(restore, phase=RestorePhase.REMOVING)}


def _cancel(command: CancelRestore, view: View) -> Changes:
    """Decide for the keys of before; a repeat changes nothing."""
    restore = restore_of(view)
    decided = {RestorePhase.CANCELLING, RestorePhase.CANCELLED}
    if restore and restore.restore_id == command.restore_id and restore.phase in decided:
        return {}
    restore = _in_phase(view, command.restore_id, RestorePhase.STAGING)
    return {RESTORE: replace(restore, phase=RestorePhase.CANCELLING)}


def _advance(command: AdvanceRestore, view: View) -> Changes:
    """Do the next batch; changes nothing when there is nothing to do."""
    restore = restore_of(view)
    if restore is None or restore.restore_id != command.restore_id:
        return {}
    match restore.phase:
        case RestorePhase.REMOVING:
            changes = _remove_keys(view) or _remove_roles(view, restore)
            return changes or {RESTORE: replace(restore, phase=RestorePhase.PLACING)}
        case RestorePhase.PLACING | RestorePhase.CANCELLING:
            changes = {}
            size = 0
            for staged in view.staged(BATCH_RECORDS):
                size += bytes_about(staged)
                if changes and size > BATCH_BYTES:
                    break
                changes[name_of(staged)] = None
                if restore.phase is RestorePhase.PLACING:
                    changes[name_of(staged.record)] = _placed(view, restore, staged)
            placing = restore.phase is RestorePhase.PLACING
            over = RestorePhase.DONE if placing else RestorePhase.CANCELLED
            return changes or {RESTORE: replace(restore, phase=over, manifest=b"")}
        case _:
            return {}


def restore_key(command: RestoreKey, view: View) -> Changes:
    """Put one key back."""
    refuse_while_restoring(view)
    existing = view.get(key_name(command.key.key_id))
    if isinstance(existing, KeyRecord):
        state = "deleted" if existing.deleted else "active"
        why = "is soft-deleted, recover or purge it" if existing.deleted else "exists"
        raise KeyExists(
            f"key {command.key.key_id} {why}: a restore never overwrites it",
            state=state,
            key=command.key.key_id,
        )
    pool_limits.check_keys(view)
    pool_limits.check_versions(view, command.key.key_id, len(command.versions))
    changes: dict[RecordName, Record | None] = {key_name(command.key.key_id): command.key}
    for version in command.versions:
        changes[version_name(version.key_id, version.version_id)] = version
    pool_limits.check_bytes(view, changes)
    return changes


def _remove_keys(view: View) -> dict[RecordName, Record | None]:
    changes: dict[RecordName, Record | None] = {}
    for key_id in view.key_ids(BATCH_RECORDS):
        record = view.get(key_name(key_id))
        versions = record.version_ids if isinstance(record, KeyRecord) else ()
        if changes and len(changes) + 1 + len(versions) > 2 * BATCH_RECORDS:
            break
        changes[key_name(key_id)] = None
        for version_id in versions:
            changes[version_name(key_id, version_id)] = None
    return changes


def _remove_roles(view: View, restore: RestoreRecord) -> dict[RecordName, Record | None]:
    """Remove roles, but not those of whoever restores."""
    kept = set(_kept_roles(view, restore))
    others = (name for record in view.role_records() if (name := name_of(record)) not in kept)
    return dict.fromkeys(itertools.islice(others, BATCH_RECORDS))


def _kept_roles(view: View, restore: RestoreRecord) -> Iterator[RecordName]:
    """Yield what the right of whoever restores rests on: an assignment without its role allows nothing."""
    for principal in restore.principals:
        record = view.get(principal_name(principal))
        if isinstance(record, PrincipalRecord):
            yield name_of(record)
            for assignment in record.assignments:
                yield role_definition_name(assignment.role_definition_id)


def _placed(view: View, restore: RestoreRecord, staged: StagedRecord) -> Restorable:
    """Return what goes to its place: whoever restores has his roles and those of the backup."""
    record = staged.record
    if isinstance(record, RoleDefinitionRecord):
        kept_role = view.get(name_of(record))
        # Only what was kept is still there. The backup's may allow him nothing.
        return kept_role if isinstance(kept_role, RoleDefinitionRecord) else record
    if not isinstance(record, PrincipalRecord) or record.principal_id not in restore.principals:
        return record
    kept = view.get(name_of(record))
    before = kept.assignments if isinstance(kept, PrincipalRecord) else ()
    brought = {(entry.role_definition_id, entry.scope) for entry in record.assignments}
    others = tuple(entry for entry in before if (entry.role_definition_id, entry.scope) not in brought)
    return PrincipalRecord(record.principal_id, (*record.assignments, *others))


def _in_phase(view: View, restore_id: str, phase: RestorePhase) -> RestoreRecord:
    restore = restore_of(view)
    if restore is None or restore.restore_id != restore_id:
        raise RestoreState("no such restore is under way")
    if restore.phase is not phase:
        raise RestoreState(f"the restore is {restore.phase.name.lower()}", phase=restore.phase.name)
    return restore
