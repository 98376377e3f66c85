"""Whether every witness still knows what it cosigned (G7).

A witness has a checkpoint on its own disk before it cosigns it. So a cosignature in the log of another
partition contradicts a witness whose disk was put back to an older state, or emptied: before anybody
makes use of what it forgot.
"""

from __future__ import annotations

from collections.abc import Iterable

from hsm_pool.audit.checkpoint import Checkpoint, SignerKey


class Cosignatures:
    """The cosignatures of all logs, and who made them."""

    def __init__(self) -> None:
        self._newest: dict[tuple[SignerKey, str], int] = {}
        self._signers: dict[int, set[SignerKey]] = {}

    def signed(self, partition: int, key: SignerKey) -> None:
        """Note that a partition has signed the log that it has now; the signature was verified."""
        self._signers.setdefault(partition, set()).add(key)

    def cosigned(self, checkpoint: Checkpoint, key: SignerKey) -> None:
        """Note the cosignature of a checkpoint; it was verified."""
        place = (key, checkpoint.origin)
        self._newest[place] = max(self._newest.get(place, 0), checkpoint.number)

    def forgotten(self, witness: int, known: Iterable[Checkpoint]) -> list[str]:
        """Return what a witness cosigned and does not know any more.

        Only keys count that have signed the witness's own log, too: what others cosigned was on a disk
        that is gone, and its log with it.

        Args:
            witness: The partition.
            known: The newest checkpoint of each log that it says it knows, read after the logs.
        """
        numbers = {checkpoint.origin: checkpoint.number for checkpoint in known}
        missing: dict[str, int] = {}
        for (key, origin), number in self._newest.items():
            ours = key in self._signers.get(witness, ())
            if ours and number > max(numbers.get(origin, 0), missing.get(origin, 0)):
                missing[origin] = number
        return [
            f"it cosigned checkpoint {number} of partition {origin.split('/')[3]} and knows "
            f"{numbers.get(origin) or 'none'} of that log: what it witnessed was put back or deleted"
            for origin, number in missing.items()
        ]
