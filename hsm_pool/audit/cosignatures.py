"""Whether every witness still knows what it cosigned (G7).

A witness has a checkpoint on its own disk before it cosigns it. So a cosignature in the log of another
partition contradicts a witness whose disk was put back to an older state, or emptied: before anybody
makes use of what it forgot.
"""

from __future__ import annotations

from collections.abc import Iterable

from hsm_pool.audit.checkpoint import Checkpoint, signer_of


class Cosignatures:
    """The cosignatures of all logs, and who made them."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int, str], int] = {}
        self._oldest_incarnation: dict[int, int] = {}

    def signed(self, line: str) -> None:
        """Note that a partition has signed a checkpoint of the log that it has now; the line was verified."""
        partition, incarnation = _who(line)
        oldest = self._oldest_incarnation.get(partition, incarnation)
        self._oldest_incarnation[partition] = min(oldest, incarnation)

    def cosigned(self, checkpoint: Checkpoint, line: str) -> None:
        """Note the cosignature of a checkpoint; the line was verified."""
        place = (*_who(line), checkpoint.origin)
        self._newest[place] = max(self._newest.get(place, 0), checkpoint.number)

    def forgotten(self, witness: int, known: Iterable[Checkpoint]) -> list[str]:
        """Return what a witness cosigned and does not know any more.

        An incarnation before the witness's own log had another disk, which is gone with what it knew.

        Args:
            witness: The partition.
            known: The newest checkpoint of each log that it says it knows, read after the logs.
        """
        if witness not in self._oldest_incarnation:
            return []
        numbers = {checkpoint.origin: checkpoint.number for checkpoint in known}
        missing: dict[str, int] = {}
        for (partition, incarnation, origin), number in self._newest.items():
            ours = partition == witness and incarnation >= self._oldest_incarnation[witness]
            if ours and number > max(numbers.get(origin, 0), missing.get(origin, 0)):
                missing[origin] = number
        return [
            f"it cosigned checkpoint {number} of partition {origin.split('/')[3]} and knows "
            f"{numbers.get(origin) or 'none'} of that log: what it witnessed was put back or deleted"
            for origin, number in missing.items()
        ]


def _who(line: str) -> tuple[int, int]:
    """Return (partition, incarnation) of a signer's line."""
    _, partition, incarnation = signer_of(line).rsplit("/", 2)
    return int(partition), int(incarnation)
