"""What of a log may be gone (G7).

A log cannot say so itself: whoever has its disk can append a line, and the partition signs that when
it goes on. So the running partition says it on the chain, and the logs of all partitions hold it
before anything is removed. Whoever says so names what is kept of every log, so that nobody removes
the last word about another one's log with his own old records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hsm_pool.audit import files


@dataclass(frozen=True, slots=True)
class KeptFrom:
    """The oldest record and checkpoint of a log that are kept; what lies before them may be gone."""

    log_id: str
    first_record: int = 0
    first_checkpoint: int = 1

    def document(self) -> dict[str, str | int]:
        """Return it for a record."""
        return {
            "log": self.log_id,
            "firstRecord": self.first_record,
            "firstCheckpoint": self.first_checkpoint,
        }


def stated(known: Iterable[KeptFrom], removal: KeptFrom | None) -> tuple[KeptFrom, ...]:
    """Return what a note on the chain says is kept: of every log of which something may be gone.

    Args:
        known: What the chain says of the logs.
        removal: What it shall take note of now.
    """
    kept = {log.log_id: log for log in known if log.first_record}
    if removal:
        kept[removal.log_id] = removal
    return tuple(kept.values())


def kept_by(record: bytes) -> list[KeptFrom]:
    """Return what a record of the chain says is kept of the logs, [] for a record that says nothing."""
    if b'"keptFrom":' not in record:
        return []
    try:
        fields = files.parse_json(record)
        if fields["operationName"] != "NoteCheckpoint":
            return []
        return [
            KeptFrom(
                str(entry["log"]),
                files.whole_number(entry["firstRecord"]),
                files.whole_number(entry["firstCheckpoint"]),
            )
            for entry in fields["properties"]["keptFrom"]
        ]
    except (ValueError, KeyError, TypeError):
        return []


class Claims:
    """What the logs of a pool, taken together, say is kept of each of them."""

    def __init__(self) -> None:
        self._claims: list[tuple[int, int, int, KeptFrom]] = []
        self._covered: dict[int, tuple[int, int]] = {}

    def take(self, partition: int, record: bytes, sequence: int, size: int) -> None:
        """Take a record of the chain.

        Args:
            partition: In whose log it stands.
            record: The record.
            sequence: Of the transaction that it is of.
            size: Of that log, with it.
        """
        self._claims.extend((partition, sequence, size, kept) for kept in kept_by(record))

    def cover(self, partition: int, size: int, sequence: int) -> None:
        """Note how far the checkpoints of a log reach: what follows may be anybody's.

        Args:
            partition: Whose log it is.
            size: Records that they cover.
            sequence: Newest sequence of the chain among them.
        """
        self._covered[partition] = (size, sequence)

    def kept_from(self, partition: int, log_id: str) -> KeptFrom:
        """Return what of a log is kept, now that all logs were read.

        The word of another partition's log counts. The log's own does only while no other one has come
        that far, as when an export took the others first: the next mutation contradicts a forged one.

        Args:
            partition: Whose log it is.
            log_id: Id of the log.
        """
        others = (sequence for index, (_, sequence) in self._covered.items() if index != partition)
        elsewhere = max(others, default=0)
        believed = [
            kept
            for index, sequence, size, kept in self._claims
            if kept.log_id == log_id
            and size <= self._covered.get(index, (0, 0))[0]
            and (index != partition or sequence > elsewhere)
        ]
        return max(believed, key=lambda kept: kept.first_record, default=KeptFrom(log_id))
