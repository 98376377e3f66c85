"""The append-only log of one partition on its own disk (G7).

``append`` returns when the kernel has the record, so a record survives kill -9 of the
process; one thread syncs the file within 100 ms, and a checkpoint covers only what is
synced, so a log that is shorter than its checkpoint was cut and not merely unlucky.

A record that cannot be written stops the operations (``stop``) or is counted as lost
(``continue``). After a failed write nothing of it stays in the file.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import structlog

from hsm_pool import limits
from hsm_pool.audit import files
from hsm_pool.audit.files import Header
from hsm_pool.audit.record import own_record
from hsm_pool.audit.tree import Forgotten, Tree, leaf_hash
from hsm_pool.errors import AuditUnavailable

_log = structlog.get_logger()
_SYNC_SECONDS = 0.05
"""How long records are gathered before a sync."""
_NOTE = b'"operationName":"NoteCheckpoint"'
_RETRY_SECONDS = 0.25
"""How often a log that could not be written is tried again."""


T = TypeVar("T")
OnFailure = Literal["stop", "continue"]


class AuditLog:
    """The log of one partition. Thread-safe; :meth:`close` ends its thread.

    Args:
        directory: Made if it is missing; nobody else writes there.
        identity: URI of the partition.
        partition: Its index.
        on_failure: What happens when a record cannot be written.
        file_bytes: Size after which a new file is begun.
    """

    def __init__(
        self,
        directory: Path,
        identity: str,
        partition: int,
        on_failure: OnFailure = "stop",
        file_bytes: int = limits.AUDIT_FILE_BYTES,
    ) -> None:
        self.directory = directory
        self.lost = 0
        self.log_id = ""
        self.sequence = 0
        self.synced_size = 0
        self.file = directory / files.records_name(0)
        """The file that is written."""
        self.noteworthy_size = 0
        """Size when the newest record was appended that is not about checkpoints themselves."""
        self._identity, self._partition = identity, partition
        self._on_failure = on_failure
        self._file_bytes = file_bytes
        self._failure = ""
        self._broken = False
        self._synced = threading.Condition()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._dirty = threading.Event()
        self._old: list[int] = []
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open()
        self._thread = threading.Thread(target=self._run, name="audit-sync", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sync and stop; nothing is appended afterwards."""
        self._stopping.set()
        self._dirty.set()
        self._thread.join()
        self._sync()
        with self._lock:
            self._failure, self._broken = "the partition is stopping", True
            os.close(self._file)

    # -- appending -----------------------------------------------------------------------

    @property
    def failure(self) -> str:
        """Why records cannot be written; "" while they can."""
        return self._failure

    @property
    def refuses(self) -> bool:
        """Whether operations must stop now."""
        return bool(self._failure) and self._on_failure == "stop"

    @property
    def size(self) -> int:
        """Records in the log."""
        return self._tree.size

    def check(self) -> None:
        """Let an operation begin.

        Raises:
            AuditUnavailable: Its record could not be written.
        """
        if self.refuses:
            raise AuditUnavailable(f"the audit log cannot be written: {self._failure}")

    def append(self, record: bytes) -> None:
        """Append a record; when this returns it survives kill -9.

        Raises:
            AuditUnavailable: It could not be written, and operations stop then.
        """
        with self._lock:
            self._append([record])
            self.noteworthy_size = self._tree.size

    def append_mutations(self, sequence: int, records: Sequence[bytes]) -> None:
        """Append the records that a transaction of the chain carries, once.

        Raises:
            AuditUnavailable: They could not be written, and operations stop then.
        """
        with self._lock:
            if sequence <= self.sequence:
                return
            if self.sequence + 1 < sequence:
                gap = own_record(
                    "AuditChainGap",
                    self._identity,
                    self._partition,
                    first=self.sequence + 1,
                    last=sequence - 1,
                )
                records = [gap, *records]
            self._append(records, sequence)
            self.sequence = sequence
            # Taking note of a checkpoint is a mutation, too: it must not ask for the next one.
            if not all(_NOTE in record for record in records):
                self.noteworthy_size = self._tree.size

    def _append(self, records: Sequence[bytes], sequence: int = 0) -> None:
        if not self._failure:
            try:
                self._write(b"".join(record + b"\n" for record in records))
            except OSError as error:
                self._fail(os.strerror(error.errno or errno.EIO))
            else:
                for record in records:
                    self._tree.append(leaf_hash(record))
                # The header of the next file names it.
                self.sequence = max(self.sequence, sequence)
                self._dirty.set()
                if self._offset >= self._file_bytes:
                    self._rotate()
                return
        if self._on_failure == "stop":
            raise AuditUnavailable(f"the audit log cannot be written: {self._failure}")
        self.lost += len(records)

    def _write(self, octets: bytes) -> None:
        """Write all or nothing."""
        written = os.write(self._file, octets)
        if written != len(octets):
            # The rest would fail with the true reason; a half record must not stay.
            try:
                os.ftruncate(self._file, self._offset)
            except OSError:
                self._fail("a record that was written in part could not be removed", broken=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._offset += written

    def _fail(self, reason: str, *, broken: bool = False) -> None:
        if self._broken:
            return
        if not self._failure:
            _log.error("audit log cannot be written", reason=reason, operations=self._on_failure)
        self._failure, self._broken = reason, broken
        self._dirty.set()

    # -- files ---------------------------------------------------------------------------

    def _open(self) -> None:
        """Go on after the last whole record; what a kill cut was never acknowledged."""
        existing = files.listed(self.directory, files.RECORDS)
        if not existing:
            self.log_id, self.sequence, self._tree = uuid.uuid4().hex, 0, Tree()
            self._begin_file()
            self._append([own_record("AuditLogCreate", self._identity, self._partition)])
            return
        path = existing[-1]
        header = files.read_header(path)
        self.log_id, self.sequence = header.log_id, header.sequence
        self._tree = Tree(header.first, header.frontier)
        self._offset = len(header.line())
        for record in _whole_records(path):
            self._tree.append(leaf_hash(record))
            self._offset += len(record) + 1
            self.sequence = max(self.sequence, files.sequence_of(record)[0])
        self.file = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, self._offset)
        # What a killed process wrote is not known to be durable, and no checkpoint waits for the next record.
        self._dirty.set()

    def _begin_file(self) -> None:
        header = Header(self.log_id, self._tree.size, self._tree.frontier(), self.sequence).line()
        path = self.directory / files.records_name(self._tree.size)
        # Whole or absent: a file without its header could not be hashed.
        temporary = path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            if os.write(descriptor, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            temporary.rename(path)
        except OSError:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self._sync_directory()
        self.file, self._file, self._offset = path, descriptor, len(header)

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        """Begin a new file; a disk without room for one goes on with the old one."""
        finished = self._file
        try:
            self._begin_file()
        except OSError as error:
            _log.warning("audit log cannot begin a new file", reason=os.strerror(error.errno or 0))
            self._file_bytes += limits.AUDIT_FILE_BYTES
            return
        self._old.append(finished)
        existing = files.listed(self.directory, files.RECORDS)
        if len(existing) > 1:
            self._tree.forget(files.read_header(existing[-2]).first)

    # -- syncing -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._broken:
                self._stopping.wait()
            elif self._failure:
                self._stopping.wait(_RETRY_SECONDS)
                self._try_again()
            else:
                self._dirty.wait()
                # Records that arrive meanwhile share the sync.
                self._stopping.wait(_SYNC_SECONDS)
                self._sync()

    def _try_again(self) -> None:
        with self._lock:
            reason, self._failure = self._failure, ""
            resumed = own_record("AuditLogResume", self._identity, self._partition, lostRecords=self.lost)
            try:
                self._write(resumed + b"\n")
            except OSError:
                self._failure = reason
                return
            self._tree.append(leaf_hash(resumed))
        _log.info("audit log can be written again", lost=self.lost)

    def _sync(self) -> None:
        """Make durable what is appended now."""
        self._dirty.clear()
        with self._lock:
            old, self._old = self._old, []
            current, size = self._file, self._tree.size
        try:
            for descriptor in (*old, current):
                os.fdatasync(descriptor)
        except OSError as error:
            # What the kernel dropped cannot be told from what it kept: only a restart reads it anew.
            with self._lock:
                self._fail(f"{os.strerror(error.errno or errno.EIO)}; restart the partition", broken=True)
            return
        finally:
            for descriptor in old:
                os.close(descriptor)
        with self._synced:
            self.synced_size = max(self.synced_size, size)
            self._synced.notify_all()

    def wait_synced(self, size: int, timeout_seconds: float) -> bool:
        """Wait until so many records are durable; return whether they are."""
        with self._synced:
            return self._synced.wait_for(lambda: self.synced_size >= size, timeout_seconds)

    # -- proofs --------------------------------------------------------------------------

    def root(self, size: int) -> bytes:
        """Return the root as of a recent size.

        Raises:
            Forgotten: It is not recent.
        """
        with self._lock:
            return self._tree.root(size)

    def consistency_proof(self, old_size: int, size: int) -> tuple[bytes, ...]:
        """Return the proof between two sizes.

        Raises:
            Forgotten: Files that it needs were removed.
        """
        return self._proof(old_size, lambda tree: tree.consistency_proof(old_size, size))

    def inclusion_proof(self, index: int, size: int) -> tuple[bytes, ...]:
        """Return the proof of a record.

        Raises:
            Forgotten: Its file was removed.
        """
        return self._proof(index, lambda tree: tree.inclusion_proof(index, size))

    def root_of(self, size: int) -> bytes:
        """Return the root as of any size whose records are kept.

        Raises:
            Forgotten: They are not.
        """
        return self._proof(size, lambda tree: tree.root(size))

    def _proof(self, index: int, prove: Callable[[Tree], T]) -> T:
        with self._lock:
            try:
                return prove(self._tree)
            except Forgotten:
                size = self._tree.size
        # An old one is hashed from the files: some seconds for a million records.
        try:
            return prove(self._read_tree(index, size))
        except FileNotFoundError:
            raise Forgotten from None

    def _read_tree(self, index: int, size: int) -> Tree:
        """Return a tree that remembers everything from the file of a record on."""
        existing = files.listed(self.directory, files.RECORDS)
        headers = [files.read_header(path) for path in existing]
        start = max((number for number, header in enumerate(headers) if header.first <= index), default=0)
        tree = Tree(headers[start].first, headers[start].frontier)
        for path in existing[start:]:
            for record in files.read_lines(path, skip_header=True):
                if tree.size == size:
                    break
                tree.append(leaf_hash(record))
        return tree


def _whole_records(path: Path) -> list[bytes]:
    """Return the records of a file; those of a transaction are there together or not at all.

    They are written at once. Where a kill cut them the transaction was not applied here, and
    is read from the chain again.
    """
    records = list(files.read_lines(path, skip_header=True))
    last, count = 0, 0
    for record in records:
        sequence, expected = files.sequence_of(record)
        if sequence:
            count = count + 1 if sequence == last else 1
            last, complete = sequence, count == expected
    if last and not complete:
        del records[-count:]
    return records
