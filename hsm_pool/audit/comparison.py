"""What the records of one log and the checkpoints that somebody holds say of each other.

A record that was changed changes every root after it. So each holder is named once, with the place.
"""

from __future__ import annotations

from hsm_pool.audit.checkpoint import Checkpoint
from hsm_pool.audit.lost_logs import Anchor


class Comparison:
    """Compares the roots of one log, in the order of their sizes."""

    def __init__(self) -> None:
        self._agreed: dict[str, int] = {}
        self._differing: dict[str, list[Checkpoint]] = {}
        self._beyond: dict[str, str] = {}

    def compare(self, anchor: Anchor, root: bytes) -> None:
        """Take a checkpoint, and the root that the records of its size have."""
        if anchor.checkpoint.root != root:
            self._differing.setdefault(anchor.source, []).append(anchor.checkpoint)
        elif anchor.source not in self._differing:
            self._agreed[anchor.source] = anchor.checkpoint.size

    def beyond(self, anchor: Anchor, size: int) -> None:
        """Take a checkpoint that covers more than the records of this size."""
        self._beyond[anchor.source] = (
            f"the log was cut: it has {size} records, a checkpoint that {anchor.source} holds covers "
            f"{anchor.checkpoint.size}"
        )

    def findings(self) -> list[str]:
        """Return what is wrong, if anything is."""
        differing = (self._differs(source, found) for source, found in self._differing.items())
        return [*differing, *self._beyond.values()]

    def sources_beyond(self) -> set[str]:
        """Return who holds checkpoints of more records than there are."""
        return set(self._beyond)

    def _differs(self, source: str, checkpoints: list[Checkpoint]) -> str:
        first = checkpoints[0]
        where = f"after record {self._agreed[source] - 1} " if self._agreed.get(source) else ""
        later = f"; {len(checkpoints) - 1} later ones do not agree either" if len(checkpoints) > 1 else ""
        return (
            f"the first {first.size} records are not those of checkpoint {first.number} that {source} holds: "
            f"{where}records were changed, reordered, added or removed{later}"
        )
