"""The chain's mutations in the logs: each with all its records, the same ones at every partition (G7)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hsm_pool.audit import files
from hsm_pool.audit.tree import leaf_hash

Find = Callable[[int, str], None]
"""Takes a partition, or -1 for all of them, and what is wrong."""


@dataclass(slots=True)
class _Transaction:
    """The records of one transaction of the chain, as far as they were read."""

    sequence: int
    expected: int
    count: int = 0
    size: int = 0
    """Of the log, with the newest of them."""
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def whole(self) -> bool:
        return self.count == self.expected


class Mutations:
    """What the logs of a pool say of its chain."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._known: dict[int, tuple[int, bytes]] = {}

    def of_log(self, partition: int, before: int) -> LogMutations:
        """Return what takes the records of one log.

        Args:
            partition: Whose log it is.
            before: Newest sequence whose records stand before the first one that is read.
        """
        return LogMutations(self._find, self._known, partition, before)

    def compare_spans(self, spans: Iterable[tuple[int, int]]) -> None:
        """Find mutations that have a record in no log.

        Args:
            spans: First and last sequence of each log that has any.
        """
        known = [span for span in spans if span[0]]
        if not known:
            return
        expected, last = min(span[0] for span in known), max(span[1] for span in known)
        # Not number by number: a line that nobody signed may name any.
        while expected in self._known:
            expected += 1
        if expected <= last:
            self._find(-1, f"mutations of the chain have no record in any log, the first is {expected}")


class LogMutations:
    """The mutations in one log, in order."""

    def __init__(self, find: Find, known: dict[int, tuple[int, bytes]], partition: int, before: int) -> None:
        self._find, self._known, self._partition = find, known, partition
        self._first, self._last = 0, before
        self._open: _Transaction | None = None

    @property
    def span(self) -> tuple[int, int]:
        """First and last sequence that is on record, (0, ...) for none."""
        return self._first, self._last

    def take(self, record: bytes, size: int) -> int:
        """Take the next record of the log, whatever it is about.

        Args:
            record: The record.
            size: Of the log, with it.

        Returns:
            The sequence that it names, 0 for none.
        """
        sequence, expected = files.sequence_of(record)
        if not sequence:
            if b'"AuditChainGap"' in record and (end := _gap_end(record)) is not None:
                self._close()
                self._last = end
            return 0
        if self._open is None or self._open.sequence != sequence:
            self._close()
            self._follow(sequence)
            self._open = _Transaction(sequence, expected)
        self._open.count += 1
        self._open.size = size
        self._open.digest.update(leaf_hash(record))
        return sequence

    def end(self, covered: int) -> None:
        """Note that the log ends.

        Args:
            covered: Records that its checkpoints cover. What follows them may still be in writing.
        """
        if self._open and not self._open.whole and self._open.size > covered:
            self._last = self._open.sequence - 1
            self._open = None
        self._close()

    def _follow(self, sequence: int) -> None:
        if sequence <= self._last:
            self._find(self._partition, f"mutation {sequence} stands after mutation {self._last}")
        elif sequence > self._last + 1:
            missing = f"{self._last + 1} to {sequence - 1}"
            self._find(self._partition, f"mutations {missing} of the chain have no record")
        self._first, self._last = self._first or sequence, sequence

    def _close(self) -> None:
        closed, self._open = self._open, None
        if closed is None:
            return
        if not closed.whole:
            what = f"mutation {closed.sequence} has {closed.count} of its {closed.expected} records"
            self._find(self._partition, what)
            return
        # All partitions keep the same records of a mutation.
        digest = closed.digest.digest()
        other, known = self._known.setdefault(closed.sequence, (self._partition, digest))
        if known != digest:
            what = f"mutation {closed.sequence} has other records than at partition {other}"
            self._find(self._partition, what)


def _gap_end(record: bytes) -> int | None:
    try:
        fields = files.parse_json(record)
        if fields["operationName"] != "AuditChainGap":
            return None
        return files.whole_number(fields["properties"]["last"])
    except (ValueError, KeyError, TypeError):
        return None
