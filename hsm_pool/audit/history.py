"""The checkpoints of one partition's log, on its own disk: numbered, chained, none missing.

A checkpoint is synced before any peer sees it, so that a number is never given twice.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from hsm_pool.audit import files
from hsm_pool.audit.checkpoint import FIRST_PREVIOUS, Checkpoint, Note, SignerKey

_FILE_BYTES = 4 * 1024 * 1024


class CheckpointHistory:
    """Appends checkpoints, their cosignatures and the keys that made both. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._file: int | None = None
        self._signers: dict[tuple[str, str], SignerKey] = {}
        """Those that the file holds, by name and key: a partition whose disk was lost begins names anew."""
        self.newest: Note | None = None
        self.newest_cosigned: Note | None = None
        """With all cosignatures that arrived."""
        existing = files.listed(directory, files.CHECKPOINTS)
        # A file that was begun and not written yet leaves the newest checkpoint in the one before.
        for path in existing[-2:-1]:
            for line in files.read_lines(path):
                self._take(files.parse(line, path.name))
        if existing:
            self._resume(existing[-1])

    def _resume(self, path: Path) -> None:
        self._signers.clear()
        whole = 0
        for line in files.read_lines(path):
            whole += len(line) + 1
            self._take(files.parse(line, path.name))
        os.truncate(path, whole)
        # The next start writes signers again: it has a new key.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def _take(self, value: dict[str, Any]) -> None:
        if "signer" in value:
            self._signers[_name_and_key(value["signer"])] = SignerKey.from_document(value["signer"])
        elif "checkpoint" in value:
            self.newest = Note.parse(value["checkpoint"])
        elif self.newest and value["number"] == self.newest.checkpoint.number:
            self.newest = self.newest_cosigned = self.newest.with_cosignatures(value["cosignatures"])

    def newest_and_signers(self) -> tuple[Note | None, list[SignerKey]]:
        """Return the newest checkpoint with the keys that signed it.

        A key is missing while the file that held it was followed by one without a checkpoint.
        """
        with self._lock:
            if self.newest is None:
                return None, []
            lines = self.newest.signatures
            keys = self._signers.values()
            return self.newest, [key for key in keys if any(key.is_named_by(line) for line in lines)]

    def next(self, origin: str, size: int, root: bytes) -> Checkpoint:
        """Return the checkpoint that follows the newest one."""
        before = self.newest.checkpoint if self.newest else None
        number, previous = (before.number + 1, before.digest) if before else (1, FIRST_PREVIOUS)
        return Checkpoint(origin, size, root, number, previous)

    def append(self, note: Note, signer: SignerKey) -> None:
        """Append a signed checkpoint and make it durable.

        Raises:
            OSError: It could not be written; then it does not exist.
        """
        with self._lock:
            if self._file is not None and os.fstat(self._file).st_size >= _FILE_BYTES:
                os.close(self._file)
                self._file = None
            if self._file is None:
                path = self._directory / files.checkpoints_name(note.checkpoint.number)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._signers.clear()
            self._write([*self._new_signer(signer), {"checkpoint": note.text}])
            self._signers[_name_and_key(signer.document())] = signer
            self.newest = note

    def append_cosignature(self, note: Note, line: str, signer: SignerKey) -> None:
        """Append a cosignature of the newest checkpoint.

        Raises:
            OSError: It could not be written.
        """
        with self._lock:
            if self.newest is None or self.newest.checkpoint != note.checkpoint:
                return
            value = {"number": note.checkpoint.number, "cosignatures": [line]}
            self._write([*self._new_signer(signer), value])
            self._signers[_name_and_key(signer.document())] = signer
            self.newest = self.newest_cosigned = self.newest.with_cosignatures([line])

    def _new_signer(self, signer: SignerKey) -> list[dict[str, Any]]:
        document = signer.document()
        return [] if _name_and_key(document) in self._signers else [{"signer": document}]

    def _write(self, values: list[dict[str, Any]]) -> None:
        assert self._file is not None
        octets = b"".join(
            json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n" for value in values
        )
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, octets) != len(octets):
                raise OSError("the checkpoint was written in part")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def first_kept(self, first_record: int) -> int:
        """Return the oldest checkpoint that is still needed.

        Args:
            first_record: The oldest record that is kept.
        """
        existing = files.listed(self._directory, files.CHECKPOINTS)
        while len(existing) > 1 and _first_size(existing[1]) <= first_record:
            del existing[0]
        newest = self.newest.checkpoint.number if self.newest else 1
        return min(_first_number(existing[0]), newest) if existing else 1

    def remove_before(self, number: int) -> None:
        """Remove the files whose checkpoints are all older than one that begins a file.

        Raises:
            OSError: One could not be removed; it goes with the next removal.
        """
        for path in files.listed(self._directory, files.CHECKPOINTS):
            if _first_number(path) < number:
                path.unlink()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _name_and_key(document: dict[str, str]) -> tuple[str, str]:
    return document["name"], document["public_key"]


def _first_number(path: Path) -> int:
    return int(path.stem.removeprefix(files.CHECKPOINTS))


def _first_size(path: Path) -> int:
    for line in files.read_lines(path):
        value = files.parse(line, path.name)
        if "checkpoint" in value:
            return Note.parse(value["checkpoint"]).checkpoint.size
    return 0
