"""The controller's journal: what it wants and what it sends, on disk before it is done.

One file of lines, ``<CRC-32 in hex> <JSON>``, only ever appended to; each append is synced
before it returns. Several processes share it (the controller and an operator's command):
whoever appends holds the file's lock, and holds it while a command is under way, so that
commands leave in the order of their counters. A last line that is torn was never acted upon
and is cut off; a damaged line before it stops the controller, which then says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fabric_controller.own_files import NotOwnFile, open_own_file
from fabric_controller.work import Entry, EntryRefused, Work, checkpoint_entry, fold

JOURNAL_FILE: Final = "journal"
OLD_JOURNAL_FILE: Final = "journal.1"

JOURNAL_BYTES_MAX: Final = 1024 * 1024
"""Beyond this, a journal without an open goal is put aside and a new one begun."""

_READ_BYTES_MAX: Final = 64 * JOURNAL_BYTES_MAX


LOCK_SECONDS: Final = 15.0
"""How long a command waits for the journal; whoever has it sends a command meanwhile, for 10 s at most."""

_LOCK_POLL_SECONDS = 0.05


class JournalHeld(Exception):
    """Another process does not give the journal back."""


class JournalDamaged(Exception):
    """The journal holds something that was not written to it."""


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def read_entries(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a journal, and how many bytes of it they are: the rest is torn.

    Raises:
        JournalDamaged: A line is damaged, and it is not the last one.
    """
    entries: list[dict[str, Any]] = []
    offset = 0
    for line in content.splitlines(keepends=True):
        entry = _entry(line[:-1]) if line.endswith(b"\n") else None
        if entry is None:
            if offset + len(line) < len(content):
                raise JournalDamaged(f"the journal is damaged at byte {offset}")
            break
        entries.append(entry)
        offset += len(line)
    return entries, offset


class Journal:
    """The journal of a data directory. Not thread-safe; several processes may have it open.

    Raises:
        JournalDamaged: A line in the middle is not one that was written, or the file is a link
            or another user's.
        OSError: The file cannot be read or made.
    """

    def __init__(self, data_directory: Path, pool: Collection[int]) -> None:
        """Open the journal of a pool with these partitions, and read it."""
        self._pool = frozenset(pool)
        data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = data_directory
        self._path = data_directory / JOURNAL_FILE
        self._descriptor = self._open()
        self._offset = 0
        self.work = Work()
        self.refresh()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def refresh(self) -> Work:
        """Read what was appended since the last look, by whomever, and return the work.

        Raises:
            JournalDamaged: A line in the middle is not one that was written.
        """
        if os.fstat(self._descriptor).st_nlink == 0:  # put aside by another process
            os.close(self._descriptor)
            self._descriptor = self._open()
            self._offset, self.work = 0, Work()
        content = os.pread(self._descriptor, _READ_BYTES_MAX, self._offset)
        entries, length = read_entries(content)
        try:
            for entry in entries:
                self.work = fold(self.work, entry, self._pool)
        except EntryRefused as error:
            raise JournalDamaged(str(error)) from None
        self._offset += length
        return self.work

    @contextmanager
    def exclusive(self, wait_seconds: float = LOCK_SECONDS) -> Iterator[Work]:
        """Hold the journal, as it is now: nobody else appends or sends a command meanwhile.

        Raises:
            JournalHeld: Another process has held it for longer than any command takes: it hangs.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            self._lock(deadline)
            if os.fstat(self._descriptor).st_nlink:
                break
            self.refresh()
        try:
            self.refresh()
            # Under the lock nobody writes: what is left is torn, and was never acted upon.
            os.ftruncate(self._descriptor, self._offset)
            yield self.work
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _lock(self, deadline: float) -> None:
        pause = threading.Event()
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise JournalHeld("another process holds the journal") from None
                pause.wait(_LOCK_POLL_SECONDS)

    def append(self, entry: Entry) -> Work:
        """Append an entry with the time of now; returns when it is on disk. Hold :meth:`exclusive`."""
        line = _line({**entry, "time_ms": time.time_ns() // 1_000_000})
        os.pwrite(self._descriptor, line, self._offset)
        os.fdatasync(self._descriptor)
        return self.refresh()

    def begin_anew(self) -> None:
        """Put a long journal without an open goal aside, all or nothing. Call it before the work begins."""
        with self.exclusive() as work:
            if self._offset < JOURNAL_BYTES_MAX or work.goal is not None:
                return
            new = self._directory / f"{JOURNAL_FILE}.new"
            new.unlink(missing_ok=True)
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            entry = {**checkpoint_entry(work), "time_ms": time.time_ns() // 1_000_000}
            os.write(descriptor, _line(entry))
            os.fsync(descriptor)
            os.close(descriptor)
            old = self._directory / OLD_JOURNAL_FILE
            old.unlink(missing_ok=True)
            old.write_bytes(self._path.read_bytes())
            old.chmod(0o600)
            new.replace(self._path)
            self._sync_directory()

    def history(self) -> list[dict[str, Any]]:
        """Return all entries, the oldest first.

        Raises:
            JournalDamaged: A line in the middle is not one that was written.
        """
        self.refresh()
        return read_entries(os.pread(self._descriptor, self._offset, 0))[0]

    def _open(self) -> int:
        try:
            descriptor = open_own_file(self._path, os.O_RDWR | os.O_CREAT)
        except NotOwnFile as error:
            raise JournalDamaged(str(error)) from None
        try:
            found, owner = os.fstat(descriptor), self._directory.stat()
            if found.st_uid not in {owner.st_uid, os.geteuid()}:
                raise JournalDamaged(f"{self._path} is another user's")
            if os.geteuid() == 0:  # the controller that is to read it may be another user
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except BaseException:
            os.close(descriptor)
            raise
        self._sync_directory()
        return descriptor

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
