"""Which calls of one kind run, wait or are refused: bounded, and fair between principals.

A fixed number runs at once and a fixed number waits. Whoever waits runs in the order of
start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each principal has a virtual time that
grows by the seconds that his calls really took, so a batch counts as the work it is, and the one
who used least is next. When the queue is full, the newest call of whoever has most calls in it is
refused, never that of a principal who has fewer: a greedy principal displaces only himself. One
principal alone never holds all that may run, so another finds a free place however long those calls
take. Times are seconds on any one monotonic clock. Not thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

_SERVICE_SECONDS_FIRST = 0.01
"""What a call is taken to need until one was measured."""
_SMOOTHING = 0.1
"""Weight of the newest measurement in the moving average."""
_PRINCIPALS_MAX = 1_024
"""Principals without a call whose use is remembered."""


class Standing(Enum):
    """Where a call stands."""

    WAITING = auto()
    RUNNING = auto()
    REFUSED = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Ticket:
    """One call."""

    principal: str
    standing: Standing = Standing.WAITING
    patient: bool = False
    """Waits outside the bounded queue: a message of a stream, of which there are few."""
    paused: bool = False
    """Only waits for something at the moment, and another one runs in its place."""
    began: float = 0.0
    seconds: float = 0.0
    """How long it ran before it paused last."""
    charged: float = 0.0
    """Seconds that its principal was charged with when it began."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of one kind of call there may be."""

    running: int
    running_of_principal: int
    """Less than ``running``, so that no principal holds everything."""
    waiting: int
    paused: int = 0
    """How many of those that only wait for something give their place to others."""


class Admission:
    """Decides about the calls of one kind."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.service_seconds = _SERVICE_SECONDS_FIRST
        """Moving average of how long a call runs."""
        self.refused = 0
        self.running = 0
        self.paused = 0
        self._running_of: dict[str, int] = {}
        self._queue: list[Ticket] = []
        self._virtual_time = 0.0
        self._used: dict[str, float] = {}

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._queue)

    def retry_seconds(self) -> float:
        """Return in how many seconds what runs and waits now will be done, as far as can be told."""
        return (self.running + self.waiting) * self.service_seconds / self.bounds.running

    def refuses(self, principal: str) -> bool:
        """Return whether a call that arrived now would be refused at once."""
        waiting = [entry for entry in self._queue if not entry.patient]
        if len(waiting) < self.bounds.waiting or self._may_run(principal):
            return False
        newest = Ticket(principal)
        return self._newest_of_greediest([*waiting, newest]) is newest

    def arrive(self, principal: str, now: float, *, patient: bool = False) -> tuple[Ticket, list[Ticket]]:
        """Take a call in.

        Returns:
            Its ticket, and the tickets of other calls whose standing changed because of it.
        """
        ticket = Ticket(principal, patient=patient)
        self._used[principal] = max(self._used.get(principal, 0.0), self._virtual_time)
        self._queue.append(ticket)
        changed = self._start(now)
        waiting = [entry for entry in self._queue if not entry.patient]
        if len(waiting) > self.bounds.waiting:
            displaced = self._newest_of_greediest(waiting)
            self._queue.remove(displaced)
            self._refuse(displaced)
            changed.append(displaced)
        self._forget()
        return ticket, [entry for entry in changed if entry is not ticket]

    def leave(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Take a call out that ended or gave up; return the tickets of those that begin for it."""
        if ticket.standing is Standing.WAITING:
            self._queue.remove(ticket)
            self._refuse(ticket)
            return []
        if ticket.standing is not Standing.RUNNING:
            return []
        ticket.standing = Standing.ENDED
        if ticket.paused:
            self.paused -= 1
        else:
            self._stop(ticket, now)
        self.service_seconds += _SMOOTHING * (ticket.seconds - self.service_seconds)
        return self._start(now)

    def pause(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Let another call run while this one only waits; return the tickets of those that begin."""
        if ticket.standing is not Standing.RUNNING or ticket.paused or self.paused >= self.bounds.paused:
            return []
        ticket.paused = True
        self.paused += 1
        self._stop(ticket, now)
        return self._start(now)

    def resume(self, ticket: Ticket, now: float) -> None:
        """Let a paused call run again, at once: one too many runs until the next one ends."""
        if not ticket.paused:
            return
        ticket.paused = False
        self.paused -= 1
        self._run(ticket, now, charged=0.0)

    def _run(self, ticket: Ticket, now: float, charged: float) -> None:
        ticket.standing, ticket.began, ticket.charged = Standing.RUNNING, now, charged
        self._used[ticket.principal] = self._used.get(ticket.principal, self._virtual_time) + charged
        self.running += 1
        self._running_of[ticket.principal] = self._running_of.get(ticket.principal, 0) + 1

    def _stop(self, ticket: Ticket, now: float) -> None:
        """End, or interrupt, the running of a call; its principal is charged with what it really took."""
        seconds = max(0.0, now - ticket.began)
        ticket.seconds += seconds
        self._used[ticket.principal] += seconds - ticket.charged
        self.running -= 1
        self._running_of[ticket.principal] -= 1
        if not self._running_of[ticket.principal]:
            del self._running_of[ticket.principal]

    def _start(self, now: float) -> list[Ticket]:
        """Let calls begin while there is room."""
        started: list[Ticket] = []
        while self.running < self.bounds.running:
            allowed = [entry for entry in self._queue if self._may_run(entry.principal)]
            if not allowed:
                break
            # min takes the first of equals, so calls of one principal keep their order.
            ticket = min(allowed, key=lambda entry: self._used[entry.principal])
            self._queue.remove(ticket)
            self._virtual_time = max(self._virtual_time, self._used[ticket.principal])
            self._run(ticket, now, charged=self.service_seconds)
            started.append(ticket)
        return started

    def _may_run(self, principal: str) -> bool:
        return (
            self.running < self.bounds.running
            and self._running_of.get(principal, 0) < self.bounds.running_of_principal
        )

    def _newest_of_greediest(self, waiting: list[Ticket]) -> Ticket:
        counts: dict[str, int] = {}
        for entry in waiting:
            counts[entry.principal] = counts.get(entry.principal, 0) + 1
        most = max(counts.values())
        return next(entry for entry in reversed(waiting) if counts[entry.principal] == most)

    def _refuse(self, ticket: Ticket) -> None:
        ticket.standing = Standing.REFUSED
        self.refused += 1

    def _forget(self) -> None:
        """Forget who has no call and whose use no longer counts; bounded, whoever calls."""
        if len(self._used) <= _PRINCIPALS_MAX:
            return
        active = {entry.principal for entry in self._queue} | self._running_of.keys()
        idle = sorted((used, name) for name, used in self._used.items() if name not in active)
        for used, name in idle:
            if used > self._virtual_time and len(self._used) <= _PRINCIPALS_MAX:
                break
            del self._used[name]
