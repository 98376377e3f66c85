"""Logs that are not there any more, though somebody holds a checkpoint of them (G7).

A partition that is replaced on an empty disk begins a log with a new id. The one before is gone with
its disk; its last checkpoint is not: both peers cosigned and kept it, as do the chain, backups and
ceremony records.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hsm_pool.audit.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Anchor:
    """A checkpoint that somebody else kept, and who."""

    checkpoint: Checkpoint
    source: str


@dataclass(frozen=True, slots=True)
class LostLog:
    """A log that is gone, by the newest checkpoint that is left of it."""

    checkpoint: Checkpoint
    kept_by: tuple[str, ...]
    """Who holds that checkpoint."""
    known: bool
    """Whether the operator said that he knows of the loss."""
    replaced: bool
    """Whether the partition has another log now."""

    @property
    def log_id(self) -> str:
        """Id of the log."""
        return log_id_of(self.checkpoint)

    @property
    def what(self) -> str:
        """What is gone, and who says so."""
        checkpoint = f"checkpoint {self.checkpoint.number} of {self.checkpoint.size} records"
        if self.replaced:
            kept = f"its {checkpoint} is kept by {', '.join(self.kept_by)}"
            return f"log {self.log_id} is gone, it was deleted or replaced; {kept}"
        return f"there is no log, although {self.kept_by[0]} knows one: {self.log_id}, {checkpoint}"


def log_id_of(checkpoint: Checkpoint) -> str:
    """Return the id of the log that a checkpoint is of."""
    return checkpoint.origin.rpartition("/")[2]


def find(
    anchors: Iterable[Anchor], present: Mapping[int, str | None], known: Collection[str]
) -> list[LostLog]:
    """Return the lost logs, by partition and id.

    Args:
        anchors: What others kept.
        present: Origin of the log that each partition has now, None where it cannot be read: such a
            log is damaged and not lost. A partition without any log is missing.
        known: Ids of logs whose loss the operator knows of.
    """
    by_origin: dict[tuple[int, str], list[Anchor]] = {}
    for anchor in anchors:
        partition, origin = anchor.checkpoint.partition, anchor.checkpoint.origin
        if partition in present and present[partition] in {None, origin}:
            continue
        by_origin.setdefault((partition, origin), []).append(anchor)
    lost = []
    for (partition, _), kept in sorted(by_origin.items()):
        newest = max((anchor.checkpoint for anchor in kept), key=lambda checkpoint: checkpoint.size)
        sources = tuple(dict.fromkeys(entry.source for entry in kept if entry.checkpoint == newest))
        lost.append(LostLog(newest, sources, log_id_of(newest) in known, partition in present))
    return lost
