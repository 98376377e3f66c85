"""Freshness leases and the waiting rule, as pure bookkeeping (G2).

A partition p may serve until T after the moment before it *sent* a renewal that it
later saw come back in its own ordered watch. A mutation with sequence m is stable
for an observer, for each other partition p, when one of these holds:

* a renewal of p shows that p has applied m;
* p's last renewal committed *before* m is known, and T x (1 + rate error) + margin
  have passed since the observer saw that renewal: whatever lease it gave has ended
  (a renewal committed after m reaches p only after m did, so it cannot extend a
  lease of a p that has not applied m);
* p surrendered its lease, or its node agent said that this incarnation has exited.

Records changed by a mutation that is not stable yet are *pending*: operations that
depend on them wait. All observers use the same rule, so nobody sees the new state
on one partition and afterwards the old one on another. Times are seconds on the
observer's own boot clock; only bounded clock rates are assumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hsm_pool import limits
from hsm_pool.core.model import RecordName

WAIT_SECONDS = limits.LEASE_SECONDS * (1 + limits.CLOCK_RATE_ERROR) + limits.WAIT_MARGIN_SECONDS
"""How long a renewal that was observed can still give a lease to its sender."""


@dataclass(frozen=True, slots=True)
class PeerRenewal:
    """The newest renewal of another partition."""

    incarnation: int
    counter: int
    applied_sequence: int
    surrendered: bool
    observed_at: float
    lease_until: float = 0.0
    """Until when the lease lasts that its sender had by its own word. What the renewal itself gives is
    not in it: the sender takes nothing while its clock is off or its watch is stuck."""


@dataclass(frozen=True, slots=True)
class _Hold:
    """Who may still hold a lease without having applied a sequence, and until when."""

    index: int
    incarnation: int
    until: float


@dataclass(slots=True)
class _Pending:
    sequence: int
    names: tuple[RecordName, ...]
    holds: tuple[_Hold, ...]


class FreshnessTracker:
    """What one partition knows of the leases of the others. Not thread-safe."""

    def __init__(self, own_index: int) -> None:
        self._own_index = own_index
        self._peers: dict[int, PeerRenewal] = {}
        self._exited: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._queue: deque[_Pending] = deque()
        self._pending: dict[RecordName, int] = {}
        self._everything_until = 0
        self.stable_sequence = 0
        self.applied_sequence = 0

    def peers(self) -> dict[int, PeerRenewal]:
        """Return the newest renewal of each other partition."""
        return dict(self._peers)

    def observe_renewal(self, index: int, renewal: PeerRenewal) -> bool:
        """Take a renewal seen in the watch; return whether it is news."""
        if index == self._own_index:
            return False
        known = self._peers.get(index)
        if known and (renewal.incarnation, renewal.counter) <= (known.incarnation, known.counter):
            return False
        self._peers[index] = renewal
        self._told.pop(index, None)
        return True

    def incarnation_seen(self, index: int) -> int:
        """Return the newest incarnation of another partition that was seen or told of, 0 for none.

        One that was only told of counts for no lease, and no longer than until the next renewal, which is
        never measured by it.
        """
        known = self._peers.get(index)
        return max(known.incarnation if known else 0, self._told.get(index, 0))

    def observe_unproved(self, index: int, now: float, incarnation: int) -> None:
        """Take it that a partition may have begun a lease by now, and that nothing more is known of it.

        Args:
            index: The partition.
            now: The time.
            incarnation: What it was when it renewed last, under keys that give no lease any more; 0
                if it is not known.
        """
        if index == self._own_index:
            return
        self._told[index] = max(incarnation, self._told.get(index, 0))
        known, incarnation_min = self._peers.get(index), self._exited.get(index, 0) + 1
        if known and known.incarnation >= incarnation_min:
            self._peers[index] = replace(known, surrendered=False, observed_at=now)
        else:
            self._peers[index] = PeerRenewal(incarnation_min, 0, 0, False, now)

    def observe_exit(self, index: int, incarnation: int) -> None:
        """Take a node agent's word that an incarnation has exited; one never seen here is ignored."""
        known = self._peers.get(index)
        if known is not None and incarnation <= known.incarnation:
            self._exited[index] = max(incarnation, self._exited.get(index, 0))

    def applied(self, sequence: int, names: tuple[RecordName, ...], now: float) -> None:
        """Note that a transaction was applied here and what it changed."""
        self.applied_sequence = sequence
        self._queue.append(_Pending(sequence, names, self._holds()))
        for name in names:
            self._pending[name] = sequence
        self.advance(now)

    def reset(self, sequence: int, now: float) -> None:
        """Note that the state was loaded anew: until it is stable, every record is pending."""
        self.applied_sequence = sequence
        self._queue.clear()
        self._pending.clear()
        self._everything_until = sequence
        self._queue.append(_Pending(sequence, (), self._holds()))
        self.stable_sequence = min(self.stable_sequence, sequence - 1)
        self.advance(now)

    def advance(self, now: float) -> bool:
        """Make stable what the rule allows at this time; return whether anything became stable."""
        moved = False
        while self._queue and self._released(self._queue[0], now):
            done = self._queue.popleft()
            self.stable_sequence = max(self.stable_sequence, done.sequence)
            for name in done.names:
                if self._pending.get(name) == done.sequence:
                    del self._pending[name]
            moved = True
        return moved

    def next_release(self) -> float | None:
        """Return when the oldest pending transaction becomes stable by time alone, if it is pending."""
        if not self._queue:
            return None
        return max((hold.until for hold in self._queue[0].holds if self._holds_on(hold)), default=0.0)

    def pending_sequence(self, name: RecordName) -> int:
        """Return the sequence whose stability an operation on this record must await; 0 for none."""
        if self.stable_sequence < self._everything_until:
            return self._pending.get(name, self._everything_until)
        return self._pending.get(name, 0)

    def serving(self, now: float) -> frozenset[int]:
        """Return the other partitions that do hold a lease now, by their own word (G5)."""
        return frozenset(index for index in self.lease_holders(now) if now < self._peers[index].lease_until)

    def lease_holders(self, now: float) -> frozenset[int]:
        """Return the other partitions that may hold a lease now, whether they do or not."""
        return frozenset(
            index
            for index, peer in self._peers.items()
            if not peer.surrendered
            and peer.incarnation > self._exited.get(index, 0)
            and now < peer.observed_at + limits.LEASE_SECONDS
        )

    def _holds(self) -> tuple[_Hold, ...]:
        return tuple(
            _Hold(index, peer.incarnation, peer.observed_at + WAIT_SECONDS)
            for index, peer in self._peers.items()
            if not peer.surrendered and peer.incarnation > self._exited.get(index, 0)
        )

    def _holds_on(self, hold: _Hold) -> bool:
        return hold.incarnation > self._exited.get(hold.index, 0)

    def _released(self, pending: _Pending, now: float) -> bool:
        for hold in pending.holds:
            shown = self._peers[hold.index].applied_sequence >= pending.sequence
            if not shown and self._holds_on(hold) and now < hold.until:
                return False
        return True


def clock_skew_seconds(offsets: dict[int, float], own_index: int) -> float:
    """Return how far the own clock is from the median of all known clocks.

    Args:
        offsets: wall clock minus the observer's boot clock, in seconds, by partition.
        own_index: index of the observer.

    Returns:
        0.0 while fewer than three clocks are known: two cannot tell which one is wrong.
    """
    if len(offsets) < 3 or own_index not in offsets:
        return 0.0
    ordered = sorted(offsets.values())
    return abs(offsets[own_index] - ordered[len(ordered) // 2])


def agreed_clock_offset(offsets: Mapping[int, float], partitions: int) -> float | None:
    """Return a clock that no single partition can move ahead of the others, for what cannot be undone.

    Args:
        offsets: wall clock minus the observer's boot clock, in seconds, by partition, heard of lately.
        partitions: partitions of the pool.

    Returns:
        The lower median of the clocks, as an offset: of three the middle one, of two the one behind.
        None while fewer than a majority are known: one clock cannot tell that it is wrong.
    """
    if 2 * len(offsets) <= partitions:
        return None
    return sorted(offsets.values())[(len(offsets) - 1) // 2]
