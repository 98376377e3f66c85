"""What each partition does by itself.

It goes on with a decided restore, gets the key of a proposed epoch, and has the chain take
note of the newest checkpoint of its audit log, and of what is kept of it (G7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hsm_pool import limits
from hsm_pool.audit import record as audit
from hsm_pool.audit import retention
from hsm_pool.audit.checkpoint import Note
from hsm_pool.audit.lost_logs import log_id_of
from hsm_pool.audit.record import Operation
from hsm_pool.audit.retention import KeptFrom
from hsm_pool.audit.trail import AuditTrail
from hsm_pool.core import epochs, membership
from hsm_pool.core.commands import AdvanceRestore, Command, HoldEpoch, NoteCheckpoint
from hsm_pool.core.model import (
    RESTORE,
    CheckpointRecord,
    PoolRecord,
    RestorePhase,
    RestoreRecord,
    checkpoint_name,
)
from hsm_pool.partition.passes import Passes
from hsm_pool.store.committer import Committer, Mutation
from hsm_pool.store.replica import Replica, boot_time

_POLL_SECONDS = 0.25
_DECIDED = {RestorePhase.REMOVING, RestorePhase.PLACING, RestorePhase.CANCELLING}


class ReportFirmware(Protocol):
    """Takes note of what the firmware that runs here does."""

    def __call__(self, pool: PoolRecord, *, serves: bool) -> Command | None:
        """Return what is to be reported to the pool, if anything; ``serves``: a lease is held now."""


@dataclass(frozen=True, slots=True)
class _Noted:
    """What the chain has taken note of, of one audit log."""

    size: int
    kept: KeptFrom


class Housekeeper(Passes):
    """Of a restore the partition that holds the housekeeping role does the work."""

    def __init__(
        self,
        replica: Replica,
        committer: Committer,
        hold_epoch: Callable[[int], bool],
        report_firmware: ReportFirmware,
        trail: AuditTrail,
    ) -> None:
        super().__init__("housekeeper", _POLL_SECONDS)
        self._trail = trail
        self._note_at = boot_time() + limits.AUDIT_NOTE_SECONDS
        self._hold_epoch = hold_epoch
        self._asked = epochs.Asked()
        self._report_firmware = report_firmware
        self._replica = replica
        self._committer = committer

    def _pass(self) -> None:
        self._report()
        self._hold()
        self._note_checkpoint()
        while not self._stopping.is_set() and self._advance():
            pass

    def _report(self) -> None:
        """Say which firmware runs here, if the pool does not know."""
        serves = self._replica.lease_remaining() > 0
        command = self._report_firmware(self._replica.state.pool(), serves=serves)
        if command is not None:
            mutation = Mutation(command, None, lambda _: b"", None, b"", 0)
            self._committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)

    def _hold(self) -> None:
        """Get the key of a proposed epoch, and say so."""
        pool, index = self._replica.state.pool(), self._replica.index
        holds = self._replica.keys.holds(pool.next_epoch)
        self._asked = epochs.asked(self._asked, pool, boot_time())
        if not epochs.must_ask(self._asked, pool, index, boot_time(), holds=holds):
            return
        if self._hold_epoch(pool.next_epoch) and index not in pool.holders:
            self._submit(HoldEpoch(pool.next_epoch, index))

    def _note_checkpoint(self) -> None:
        """Have the chain take note of the own log, seldom, and only if there is news.

        That is its newest checkpoint, and what is kept of it when its oldest records shall go.
        """
        replica = self._replica
        if boot_time() < self._note_at or replica.withdrawn:
            return
        self._note_at = boot_time() + limits.AUDIT_NOTE_SECONDS
        with replica.condition:
            sequence, known = replica.head.sequence, self._noted()
            peers = replica.tracker.peers().values()
        noted = known.get(self._trail.log.log_id)
        elsewhere = max((peer.applied_sequence for peer in peers), default=0)
        removal = self._trail.removals.step(noted.kept if noted else None, sequence, elsewhere)
        note = self._trail.worth_noting(noted.size if noted else 0)
        note = note or (self._trail.history.newest_cosigned if removal else None)
        if note is None:
            return
        operation = Operation("NoteCheckpoint", self._trail.identity, partition=replica.index)
        operation.kept_from = retention.stated((log.kept for log in known.values()), removal)
        first = (removal.first_record, removal.first_checkpoint) if removal else (0, 0)
        audit.begin(operation)
        try:
            self._submit(NoteCheckpoint(replica.index, note.checkpoint.number, note.text, *first))
        finally:
            audit.begin(None)

    def _noted(self) -> dict[str, _Noted]:
        """Return what the chain knows of the audit logs, by their ids."""
        found = {}
        for index in range(membership.PARTITIONS):
            record = self._replica.state.get(checkpoint_name(index))
            if isinstance(record, CheckpointRecord):
                checkpoint = Note.parse(record.checkpoint).checkpoint
                log_id = log_id_of(checkpoint)
                kept = KeptFrom(log_id, record.first_record, record.first_checkpoint)
                found[log_id] = _Noted(checkpoint.size, kept)
        return found

    def _advance(self) -> bool:
        """Do one batch; return whether there may be more."""
        record = self._replica.state.get(RESTORE)
        if not isinstance(record, RestoreRecord) or record.phase not in _DECIDED:
            return False
        if not self._replica.is_housekeeper():
            return False
        self._submit(AdvanceRestore(record.restore_id))
        return True

    def _submit(self, command: Command) -> None:
        mutation = Mutation(command, None, lambda _: b"", None, b"", 0)
        self._committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)
