"""Taking a backup to a location and restoring it from one: resumable, never half-written."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hsm_pool.client import backup_calls
from hsm_pool.client.calls import Call
from hsm_pool.client.locations import Location
from hsm_pool.client.pool import Pool
from hsm_pool.core.membership import PARTITIONS
from hsm_pool.errors import InvalidField, KeyExists, RestoreState
from hsm_pool.limits import BACKUP_MANIFEST_BYTES_MAX, BACKUP_PART_BYTES_MAX
from mhsm.backup.v1 import backup_pb2
from mhsm.keys.v1 import keys_pb2

MANIFEST = "manifest.json"
STARTED = "started.json"
_POLL_SECONDS = 0.1
_LOST = (
    "partition {partition} does not hold the snapshot of this backup any more (restarted, or after ten "
    "minutes): what is in this place stays incomplete; take a new backup in another place and remove this one"
)
T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""


def _part(index: int) -> str:
    return f"part-{index:05d}"


@dataclass(frozen=True, slots=True)
class TakenBackup:
    """A backup that is complete."""

    backup_id: str
    keys: int
    parts: int
    bytes_written: int


def take(pool: Pool, location: Location, progress: Progress, partition: int = 0) -> TakenBackup:
    """Take a full backup; go on with one that was interrupted in the same place.

    Raises:
        KeyExists: A complete backup, or something else, is there.
        InvalidField: What notes the interrupted one is not readable.
        RestoreState: The interrupted one is not held by its partition any more: the place stays incomplete.
    """
    there = location.names()
    if MANIFEST in there:
        raise KeyExists("a complete backup is there; choose another place")
    if STARTED in there:
        started = location.read(STARTED, BACKUP_MANIFEST_BYTES_MAX)
        backup_id = _field(started, STARTED, "backup_id", str)
        partition = _field(started, STARTED, "partition", int)
        if not 0 <= partition < PARTITIONS:
            raise _unreadable(STARTED)
    elif there:
        raise KeyExists("something else is there; choose an empty place")
    else:
        # Noted before it is started, so that a repeat can name what an interrupted run has started.
        backup_id = uuid.uuid4().hex
        location.write(STARTED, json.dumps({"backup_id": backup_id, "partition": partition}).encode())
    if _part(0) in there:
        # Before anything is started: parts of one snapshot do not go with those of another.
        _of_snapshot(pool, backup_calls.read_backup_part(backup_id, 0), partition)
    begun = pool.call(backup_calls.start_backup(backup_id), partition)
    parts, written = begun.parts, 0
    for index in range(parts):
        content = _of_snapshot(pool, backup_calls.read_backup_part(backup_id, index), partition)
        if _part(index) not in there:
            location.write(_part(index), content)
        elif location.read(_part(index), BACKUP_PART_BYTES_MAX) != content:
            raise RestoreState(_LOST.format(partition=partition))
        written += len(content)
        progress("parts written", index + 1, parts)
    manifest = _of_snapshot(pool, backup_calls.finish_backup(backup_id), partition)
    location.write(MANIFEST, manifest)
    return TakenBackup(backup_id, begun.keys, parts, written + len(manifest))


def _of_snapshot(pool: Pool, call: Call[T], partition: int) -> T:
    try:
        return pool.call(call, partition)
    except RestoreState as error:
        raise RestoreState(_LOST.format(partition=partition)) from error


def manifest_of(location: Location) -> bytes:
    """Return the manifest of a complete backup.

    Raises:
        InvalidField: There is none: the backup was interrupted, or is somewhere else.
    """
    there = location.names()
    if MANIFEST not in there:
        what = "it was begun and not finished" if STARTED in there else "the manifest is missing"
        raise InvalidField(f"there is no complete backup: {what}", field="location")
    return location.read(MANIFEST, BACKUP_MANIFEST_BYTES_MAX)


def restore(pool: Pool, location: Location, progress: Progress) -> backup_pb2.Restore:
    """Restore a full backup over everything; go on with a restore of it that was interrupted.

    Raises:
        BackupRefused: It cannot be restored in this pool.
        RestoreState: A restore of another backup is under way.
    """
    manifest = manifest_of(location)
    pool.call(backup_calls.check_restore(manifest))
    state = pool.call(backup_calls.get_restore())
    if state is None or _over(state):
        state = pool.call(backup_calls.start_restore(manifest))
    elif state.backup_id != _field(manifest, MANIFEST, "backup_id", str):
        raise RestoreState("a restore of another backup is under way; cancel it first")
    for index in range(state.parts):
        if index not in state.staged_parts and state.phase == backup_pb2.RESTORE_PHASE_STAGING:
            content = location.read(_part(index), BACKUP_PART_BYTES_MAX)
            state = pool.call(backup_calls.stage_restore_part(state.restore_id, index, content))
        progress("parts staged", index + 1, state.parts)
    state = pool.call(backup_calls.commit_restore(state.restore_id))
    return await_end(pool, state, progress)


def cancel(pool: Pool, progress: Progress) -> backup_pb2.Restore:
    """Cancel the restore that is staging; the pool is as it was.

    Raises:
        RestoreState: None is under way, or it was committed.
    """
    state = pool.call(backup_calls.get_restore())
    if state is None or _over(state):
        raise RestoreState("no restore is under way")
    return await_end(pool, pool.call(backup_calls.cancel_restore(state.restore_id)), progress)


def await_end(pool: Pool, state: backup_pb2.Restore, progress: Progress) -> backup_pb2.Restore:
    """Wait until the partitions have done what was decided; they do it without anybody waiting."""
    total = state.records_left
    while not _over(state):
        progress("records left", total - state.records_left, max(total, 1))
        time.sleep(_POLL_SECONDS)
        found = pool.call(backup_calls.get_restore())
        if found is None or found.restore_id != state.restore_id:
            raise RestoreState("another restore has begun meanwhile")
        state, total = found, max(total, found.records_left)
    return state


def restore_key(
    pool: Pool, location: Location, name: str, progress: Progress, request_id: str | None = None
) -> keys_pb2.Key:
    """Restore one key, which must not exist, from a full backup.

    Raises:
        InvalidField: The backup does not hold it, or its manifest is not readable.
        KeyExists: The pool has it, active or soft-deleted.
    """
    manifest = manifest_of(location)
    request_id = request_id or str(uuid.uuid4())
    parts = len(_field(manifest, MANIFEST, "parts", list))
    for index in range(parts):
        content = location.read(_part(index), BACKUP_PART_BYTES_MAX)
        found = pool.call(backup_calls.restore_key_from_part(manifest, index, content, name, request_id))
        if found is not None:
            return found
        progress("parts searched", index + 1, parts)
    raise InvalidField(f"the backup does not hold {name}", field="name")


def _over(state: backup_pb2.Restore) -> bool:
    return state.phase in {backup_pb2.RESTORE_PHASE_DONE, backup_pb2.RESTORE_PHASE_CANCELLED}


def _field(content: bytes, file: str, name: str, kind: type[T]) -> T:
    """Return a field of a file of the place.

    Raises:
        InvalidField: It has no such field of this type.
    """
    try:
        value = json.loads(content)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unreadable(file) from None
    if not isinstance(value, kind):
        raise _unreadable(file)
    return value


def _unreadable(file: str) -> InvalidField:
    return InvalidField(f"{file} in this place is not readable", field="location")
