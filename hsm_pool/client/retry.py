"""When a call is tried again, and where: pure, shared by both clients.

Every call is idempotent: reads and cryptographic operations by nature, mutations because
they carry a request_id that stays the same over all tries. So a call is tried again after
every availability error, on the next partition, until its deadline; what the request or
the state of the pool refuses is raised at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hsm_pool.client.errors import CallIndefinite, PoolUnreachable
from hsm_pool.errors import AvailabilityError, InternalError, MHSMError, NotActivated, Overloaded, PoolLocked

_FIRST_BACKOFF_SECONDS = 0.01
_LAST_BACKOFF_SECONDS = 0.5
_ATTEMPTS_MAX = 200
_RETRY_ROUNDS_MAX = 4
"""RetryInfo is stretched up to this factor."""
UNHEALTHY_SECONDS = 1.0
"""How long a partition that did not answer is asked last."""


def retriable(error: MHSMError) -> bool:
    """Return whether another try may help."""
    return isinstance(error, AvailabilityError | CallIndefinite | PoolUnreachable | InternalError)


@dataclass(slots=True)
class Rotation:
    """Round-robin over the partitions, those that did not answer last. Not thread-safe."""

    count: int
    _next: int = 0
    _unhealthy_until: dict[int, float] = field(default_factory=dict)

    def choose(self, tried: set[int], now: float) -> tuple[int, bool]:
        """Return (partition, whether to ask for its health first).

        Args:
            tried: Partitions that this round of tries has used.
            now: Monotonic seconds.
        """
        order = [(self._next + offset) % self.count for offset in range(self.count)]
        fresh = [index for index in order if index not in tried] or order
        healthy = [index for index in fresh if self._unhealthy_until.get(index, 0.0) <= now]
        index = (healthy or fresh)[0]
        self._next = (index + 1) % self.count
        return index, index in self._unhealthy_until and index in healthy

    def unhealthy(self, index: int, now: float) -> None:
        """Note that a partition did not answer."""
        self._unhealthy_until[index] = now + UNHEALTHY_SECONDS

    def healthy(self, index: int) -> None:
        """Note that a partition answered."""
        self._unhealthy_until.pop(index, None)


@dataclass(slots=True)
class RetryCounts:
    """What a client met so far."""

    overloaded: int = 0
    """Answers of partitions that had too many calls."""
    overload_pauses: int = 0
    """Pauses that were as long as such answers asked for, or longer."""


@dataclass(slots=True)
class Attempts:
    """The tries of one call."""

    deadline: float
    mutation: bool
    counts: RetryCounts = field(default_factory=RetryCounts)
    tried: set[int] = field(default_factory=set)
    count: int = 0
    indefinite: MHSMError | None = None
    """The first error that left the outcome open: a later definite one does not close it."""
    _retry_seconds: float = 0.0
    """The longest delay that partitions asked for in this round."""

    def backoff(self, error: MHSMError, index: int, partitions: int, now: float) -> float:
        """Return the pause before the next try.

        Raises:
            MHSMError: There is no next try: the error to show.
        """
        self.count += 1
        if not error.definite and self.indefinite is None:
            self.indefinite = error
        self.tried.add(index)
        if isinstance(error, Overloaded):
            self.counts.overloaded += 1
            self._retry_seconds = max(self._retry_seconds, error.retry_seconds)
        # What one partition says of the whole pool counts when all of them say it.
        of_pool = isinstance(error, NotActivated | PoolLocked)
        if not retriable(error) and not (of_pool and len(self.tried) < partitions):
            # A mutation sent before may still take effect after this refusal was decided.
            raise self.indefinite if self.mutation and self.indefinite else error
        pause = 0.0
        if len(self.tried) >= partitions:
            self.tried.clear()
            rounds = self.count // max(1, partitions)
            limit = min(_LAST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2 ** min(rounds, 10))
            pause = limit * (0.5 + random.random() / 2)  # noqa: S311 - jitter
            if self._retry_seconds:
                # Later rounds wait longer: whoever is refused again and again must not add to the load.
                asked = self._retry_seconds * min(rounds, _RETRY_ROUNDS_MAX)
                pause = max(pause, asked * (1 + random.random() / 2))  # noqa: S311
                self.counts.overload_pauses += 1
                self._retry_seconds = 0.0
        if now + pause >= self.deadline or self.count >= _ATTEMPTS_MAX:
            raise self.indefinite or error
        return pause
