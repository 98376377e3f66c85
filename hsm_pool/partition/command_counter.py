"""Each command of the controller is obeyed once at most, whatever crashes (G5).

A command carries a counter of its issuer and an expiry. The counter is written to the
partition's own disk and synced *before* the partition acts; one that is not above it is
refused, also by the next incarnation. On a fresh data directory there is no counter: then
the expiry, at most a minute, keeps old commands out.
"""

from __future__ import annotations

import threading
from pathlib import Path

from hsm_pool import limits
from hsm_pool.errors import CommandStale
from hsm_pool.store.state_file import write_atomically

_FILE = "fabric-command-counter"


class CommandCounter:
    """The last counter of the one issuer on the fabric plane. Thread-safe."""

    def __init__(self, data_directory: Path) -> None:
        self._path = data_directory / _FILE
        self._lock = threading.Lock()
        self._last = int(self._path.read_text()) if self._path.exists() else 0

    def accept(self, counter: int, expires_ms: int, now_ms: int) -> None:
        """Take a command; returns when its counter is on disk.

        Args:
            counter: Of the command.
            expires_ms: When it is void, Unix milliseconds.
            now_ms: Now, Unix milliseconds.

        Raises:
            CommandStale: The command is a repeat, older than another one, or not valid now.
            OSError: The counter cannot be written; the command must not be obeyed.
        """
        if not now_ms < expires_ms <= now_ms + limits.COMMAND_SECONDS_MAX * 1000:
            raise CommandStale("the command is void, or valid for too long")
        # Counters never run ahead of the clock, so nobody can use them up.
        if counter > expires_ms:
            raise CommandStale("the counter is ahead of its own expiry")
        with self._lock:
            if counter <= self._last:
                raise CommandStale("a command with this counter, or a higher one, came before")
            write_atomically(self._path, str(counter).encode())
            self._last = counter
