"""Backups and restores of a partition: snapshots in memory, restores in the chain (G1, G3)."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

from hsm_pool import limits
from hsm_pool.backup import bundle, contents
from hsm_pool.backup.bundle import Domain, Manifest, Sealer, Snapshot
from hsm_pool.backup.contents import Stored, StoredKey, StoredRole
from hsm_pool.core import lifecycle, pool_limits, restore, roles
from hsm_pool.core.commands import (
    CancelRestore,
    Command,
    CommitRestore,
    RestoreKey,
    StageRecords,
    StartRestore,
)
from hsm_pool.core.model import KeyRecord, RestorePhase, RestoreRecord, key_name
from hsm_pool.core.roles import Access
from hsm_pool.core.state import State, View
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import BackupRefused, InvalidField, RestoreState
from hsm_pool.partition.partition import Partition
from hsm_pool.partition.serving import Serving
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import boot_time
from security_domain import container
from security_domain.encoding import canonical

_SNAPSHOT_SECONDS = 600.0


@dataclass(slots=True)
class _Backup:
    sealer: Sealer
    snapshot: Snapshot
    parts: list[tuple[Stored, ...]]
    digests: dict[int, bytes] = field(default_factory=dict)
    used_at: float = 0.0
    finished: bool = False

    @property
    def started(self) -> StartedBackup:
        return StartedBackup(self.sealer.backup_id, len(self.parts), self.snapshot.keys)


@dataclass(frozen=True, slots=True)
class StartedBackup:
    """A snapshot that can be read."""

    backup_id: str
    parts: int
    keys: int


@dataclass(frozen=True, slots=True)
class RestoreStatus:
    """A restore, and how many records are still to be removed, placed or dropped."""

    record: RestoreRecord
    records_left: int
    backup_id: str


class Backups:
    """Backups and restores, one of each at a time. Thread-safe."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._backup: _Backup | None = None
        self._lock = threading.Lock()

    # -- taking --------------------------------------------------------------------------

    def start(self, backup_id: str, access: Access, until: float) -> StartedBackup:
        """Take a snapshot of all keys and roles; a repeat returns the same one.

        Raises:
            RestoreState: Another snapshot is being read, or a restore is under way.
            NotFresh: This partition cannot tell at the moment.
        """
        serving = self._partition.serving()
        with self._lock:
            if self._backup and self._backup.sealer.backup_id == backup_id:
                return self._backup.started
            if self._live():
                raise RestoreState(
                    "another backup is being taken from this partition; finish it, or use another partition"
                )

            def decide(state: State) -> tuple[list[StoredKey], list[StoredRole]]:
                restore.refuse_while_restoring(state)
                found = [_stored(state, key_id) for key_id in state.key_ids(limits.KEYS_MAX)]
                return found, [StoredRole(record) for record in state.role_records()]

            keys, assigned = serving.replica.consult_all(roles.permitted(access, decide), until)
            head = serving.replica.head
            partition = self._partition
            checkpoints = (*partition.audit.newest_checkpoints(), *partition.noted_checkpoints())
            snapshot = Snapshot(
                partition.settings.pool_id, head.sequence, head.digest, len(keys), checkpoints
            )
            domain = self._domain()
            sealer = Sealer(backup_id, domain, _backup_key(serving, domain))
            self._backup = _Backup(
                sealer, snapshot, contents.into_parts([*keys, *assigned]), used_at=boot_time()
            )
            return self._backup.started

    def read_part(self, backup_id: str, index: int) -> bytes:
        """Return one part, sealed; a repeat returns the same octets.

        Raises:
            RestoreState: No such snapshot is held here.
            InvalidField: No such part.
        """
        serving = self._partition.serving()
        with self._lock:
            backup = self._named(backup_id)
            if index >= len(backup.parts):
                raise InvalidField("the backup has no such part", field="index")
            backup.used_at = boot_time()
        content = backup.sealer.content_key.seal(
            index, contents.take(serving.keys, backup.parts[index]).reveal()
        )
        with self._lock:
            backup.digests[index] = bundle.part_digest(content)
        return content

    def finish(self, backup_id: str) -> bytes:
        """Return the manifest; the snapshot may then be replaced by another one.

        Raises:
            RestoreState: No such snapshot is held here, or parts were not read.
        """
        self._partition.serving()
        with self._lock:
            backup = self._named(backup_id)
            missing = len(backup.parts) - len(backup.digests)
            if missing:
                raise RestoreState(f"{missing} of {len(backup.parts)} parts were not read yet")
            backup.finished = True
            digests = [backup.digests[index] for index in range(len(backup.parts))]
            return canonical(backup.sealer.manifest(backup.snapshot, digests))

    def _live(self) -> _Backup | None:
        backup = self._backup
        if backup is None or backup.finished or backup.used_at + _SNAPSHOT_SECONDS < boot_time():
            return None
        return backup

    def _named(self, backup_id: str) -> _Backup:
        if self._backup is None or self._backup.sealer.backup_id != backup_id:
            raise RestoreState("no such backup is being taken from this partition; start one")
        return self._backup

    # -- restoring -----------------------------------------------------------------------

    def check(self, manifest: bytes, access: Access, until: float) -> tuple[int, int]:
        """Return (keys in the backup, keys that a full restore would destroy).

        Raises:
            BackupRefused: It cannot be restored here.
            LimitExceeded: It has more keys than a pool holds.
        """
        serving = self._partition.serving()
        opened = self._open(serving, manifest)

        def decide(state: State) -> int:
            pool_limits.check_restored(state, opened.snapshot.keys)
            return state.key_count()

        return opened.snapshot.keys, serving.replica.consult_all(roles.permitted(access, decide), until)

    def start_restore(
        self, manifest: bytes, access: Access, request_key: bytes, until: float
    ) -> RestoreStatus:
        """Put the pool in restore mode; a repeat returns the same restore.

        Raises:
            BackupRefused: It cannot be restored here.
            RestoreState: Another restore is under way.
        """
        self.check(manifest, access, until)
        serving = self._partition.serving()
        restore_id = hashlib.sha256(b"mhsm/restore/v1\x00" + request_key).hexdigest()[:32]
        parts = len(self._open(serving, manifest).part_digests)
        command = StartRestore(restore_id, manifest, parts, access.principals)
        digest = hashlib.sha256(manifest).digest()
        self._commit(serving, access, command, until, request_key, digest)
        return self._status_of(restore_id, access, until)

    def stage(
        self, restore_id: str, index: int, content: bytes, access: Access, until: float
    ) -> RestoreStatus:
        """Stage one part.

        Raises:
            RestoreState: No such restore is staging.
            BackupRefused: It is not that part of the backup.
        """
        serving = self._partition.serving()
        status = self._status_of(restore_id, access, until)
        if status.record.phase is not RestorePhase.STAGING:
            raise RestoreState("the restore is not staging any more", phase=status.record.phase.name)
        if index in status.record.staged_parts:
            return status
        manifest = self._open(serving, status.record.manifest)
        stored = contents.put_back(serving.keys, bundle.open_part(manifest, index, content))
        batches = contents.into_batches(stored)
        for number, batch in enumerate(batches, start=1):
            command = StageRecords(restore_id, index, batch, last=number == len(batches))
            self._commit(serving, access, command, until)
        return self._status_of(restore_id, access, until)

    def commit(self, restore_id: str, access: Access, until: float) -> RestoreStatus:
        """Decide for the staged keys; the partitions do the rest by themselves.

        Raises:
            RestoreState: Parts are missing, or no such restore is under way.
        """
        serving = self._partition.serving()
        self._commit(serving, access, CommitRestore(restore_id), until)
        return self._status_of(restore_id, access, until)

    def cancel(self, restore_id: str, access: Access, until: float) -> RestoreStatus:
        """Decide for the keys of before.

        Raises:
            RestoreState: The restore was committed already, or none such is under way.
        """
        serving = self._partition.serving()
        self._commit(serving, access, CancelRestore(restore_id), until)
        return self._status_of(restore_id, access, until)

    def status(self, access: Access, until: float) -> RestoreStatus | None:
        """Return the restore under way, or the last one."""
        serving = self._partition.serving()

        def decide(state: State) -> RestoreStatus | None:
            record = restore.restore_of(state)
            if record is None:
                return None
            left = 0
            if not record.phase.over:
                removing = record.phase is RestorePhase.REMOVING
                left = state.staged_count() + (state.key_count() if removing else 0)
            backup_id = self._open(serving, record.manifest).backup_id if record.manifest else ""
            return RestoreStatus(record, left, backup_id)

        return serving.replica.consult_all(roles.permitted(access, decide), until)

    # -- single keys ---------------------------------------------------------------------

    def backup_key(self, key_id: str, access: Access, until: float) -> bytes:
        """Return a key with all its versions, encrypted to the security domain.

        Raises:
            KeyNotFound: No such key.
            KeySoftDeleted: It is soft-deleted.
        """
        serving = self._partition.serving()

        def decide(view: View) -> StoredKey:
            lifecycle.active_key(view, key_id)
            return _stored(view, key_id)

        consulted = serving.replica.consult(roles.permitted(access, decide), until)
        head = serving.replica.head
        snapshot = Snapshot(self._partition.settings.pool_id, head.sequence, head.digest, 1)
        plaintext, domain = contents.take(serving.keys, [consulted.value]), self._domain()
        return bundle.seal_key_backup(domain, _backup_key(serving, domain), snapshot, plaintext.reveal())

    def open_key_backup(self, backup: bytes) -> RestoreKey:
        """Return the command that restores a single key's backup.

        Raises:
            BackupRefused: It cannot be restored here.
        """
        serving = self._partition.serving()
        plaintext = bundle.open_key_backup(backup, self._domain().pool_id, serving.keys.backup_private_key)
        (stored,) = contents.put_back(serving.keys, plaintext)
        if not isinstance(stored, StoredKey):
            raise BackupRefused("this is not the backup of a key")
        return RestoreKey(stored.key, stored.versions)

    def find_key(self, manifest: bytes, index: int, content: bytes, key_id: str) -> RestoreKey | None:
        """Return the command that restores a key from a part of a full backup, None if it is not there.

        Raises:
            BackupRefused: The backup cannot be restored here.
        """
        serving = self._partition.serving()
        opened = self._open(serving, manifest)
        for stored in contents.put_back(serving.keys, bundle.open_part(opened, index, content)):
            if isinstance(stored, StoredKey) and stored.key.key_id == key_id:
                return RestoreKey(stored.key, stored.versions)
        return None

    # -- shared --------------------------------------------------------------------------

    def _domain(self) -> Domain:
        header = self._partition.header
        assert header is not None
        domain = container.parse(header.security_domain_file)
        return Domain(domain.pool_id, domain.generation)

    def _open(self, serving: Serving, manifest: bytes) -> Manifest:
        return bundle.open_manifest(manifest, self._domain().pool_id, serving.keys.backup_private_key)

    def _status_of(self, restore_id: str, access: Access, until: float) -> RestoreStatus:
        status = self.status(access, until)
        if status is None or status.record.restore_id != restore_id:
            raise RestoreState("no such restore is under way")
        return status

    @staticmethod
    def _commit(
        serving: Serving,
        access: Access,
        command: Command,
        until: float,
        request_key: bytes | None = None,
        digest: bytes = b"",
    ) -> None:
        now = serving.now_ms()
        mutation = Mutation(command, access, lambda _: b"", request_key, digest, now)
        serving.committer.submit(mutation, until)


def _stored(view: View, key_id: str) -> StoredKey:
    record = view.get(key_name(key_id))
    if not isinstance(record, KeyRecord):
        raise BackupRefused("a key disappeared while the backup was taken")
    return StoredKey(record, tuple(lifecycle.version_of(view, record, v) for v in record.version_ids))


def _backup_key(serving: Serving, domain: Domain) -> SecretBytes:
    key = serving.keys.backup_private_key(domain.generation)
    assert key is not None, "the key of the generation in force is always here"
    return key
