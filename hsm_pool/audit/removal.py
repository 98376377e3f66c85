"""Removes the oldest files of a partition's log when it is larger than its retention (G7).

The chain takes note of a removal first, and another partition must have that on record; see
:mod:`hsm_pool.audit.retention` for why. Only files that lead from one to the next count, so that
whoever has the disk cannot make a partition remove its records by putting a file beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import structlog

from hsm_pool.audit import files
from hsm_pool.audit.history import CheckpointHistory
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.retention import KeptFrom
from hsm_pool.audit.tree import Tree, leaf_hash

_log = structlog.get_logger()
_BLOCK_BYTES = 1024 * 1024
_FILES_MIN = 2
"""The file that is written, and one before it."""


@dataclass(frozen=True, slots=True)
class _Removal:
    """A removal that the chain has taken note of."""

    kept: KeptFrom
    sequence: int
    """What another partition must have applied before."""
    size: int
    """What a checkpoint of this log must cover before."""


class Removals:
    """What of one log is removed, and when. Not thread-safe.

    Args:
        log: The log.
        history: Its checkpoints.
        retention_bytes: Whole files of records go, oldest first, beyond this size.
    """

    def __init__(self, log: AuditLog, history: CheckpointHistory, retention_bytes: int) -> None:
        self.retention_bytes = retention_bytes
        self._records, self._history = log, history
        self._noted: _Removal | None = None
        self._counted: dict[Path, tuple[int, int]] = {}

    def step(self, noted: KeptFrom | None, sequence: int, elsewhere: int) -> KeptFrom | None:
        """Remove what the chain says is not kept, or return what it shall take note of.

        It is called every :data:`limits.AUDIT_NOTE_SECONDS`: what another partition has on record is
        covered by its checkpoint at the next call. A partition that is killed goes on where it was.

        Args:
            noted: What the chain says is kept of this log, None for everything.
            sequence: Of the state that says so.
            elsewhere: Newest sequence that another partition has applied, and so has on record.
        """
        try:
            if self._noted and self._is_on_record(self._noted, elsewhere):
                self._remove(self._noted.kept)
                self._noted = None
            written = {self._records.file}
            existing = files.listed(self._records.directory, files.RECORDS)
            # A new one may have been begun meanwhile.
            written.add(self._records.file)
            if noted and existing and existing[0].name < files.records_name(noted.first_record):
                self._noted = self._noted or _Removal(noted, sequence, self._records.size)
                return None
            return self._beyond_retention(existing, written)
        except files.Unreadable as error:
            _log.error("the audit log has a file that is not its own; nothing is removed", file=str(error))
        except OSError as error:
            # The next call tries again.
            _log.warning("no old record could be removed", reason=error.strerror)
        return None

    def _is_on_record(self, removal: _Removal, elsewhere: int) -> bool:
        newest = self._history.newest
        covered = newest.checkpoint.size if newest else 0
        return elsewhere >= removal.sequence and covered >= removal.size

    def _remove(self, kept: KeptFrom) -> None:
        for path in files.listed(self._records.directory, files.RECORDS):
            if path.name < files.records_name(kept.first_record):
                path.unlink()
        self._history.remove_before(kept.first_checkpoint)

    def _beyond_retention(self, existing: list[Path], written: set[Path]) -> KeptFrom | None:
        sizes = [path.stat().st_size for path in existing]
        total, gone = sum(sizes), 0
        while len(existing) - gone > _FILES_MIN and total > self.retention_bytes:
            total -= sizes[gone]
            gone += 1
        if not gone:
            return None
        if existing[-1] not in written:
            raise files.Unreadable(existing[-1].name)
        for number, (path, following) in enumerate(pairwise(existing)):
            self._check_leads(path, sizes[number], following, hashed=number < gone)
        first_record = files.read_header(existing[gone]).first
        return KeptFrom(self._records.log_id, first_record, self._history.first_kept(first_record))

    def _check_leads(self, path: Path, size: int, following: Path, *, hashed: bool) -> None:
        """Check that the records of a file lead to the next one; before it goes, that they are the very ones.

        Raises:
            Unreadable: They do not.
        """
        header, after = files.read_header(path), files.read_header(following)
        if path.name != files.records_name(header.first) or following.name != files.records_name(after.first):
            raise files.Unreadable(path.name)
        if hashed:
            tree = Tree(header.first, header.frontier)
            for record in files.read_lines(path, skip_header=True):
                tree.append(leaf_hash(record))
            if (tree.size, tree.frontier()) != (after.first, after.frontier):
                raise files.Unreadable(path.name)
            return
        if self._counted.get(path, (0, 0))[0] != size:
            self._counted[path] = (size, _lines(path) - 1)
        if header.first + self._counted[path][1] != after.first:
            raise files.Unreadable(path.name)


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK_BYTES), b""))
