"""Admission of calls to one partition: three kinds with their own bounds, whatever listener they come by.

What computes, what waits for the store, and what operators need, are apart: a flood of one
kind takes nothing from another. The decisions are :mod:`hsm_pool.core.admission`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from hsm_pool import limits, waiting
from hsm_pool.core.admission import Admission, Bounds, Standing, Ticket
from hsm_pool.errors import Overloaded
from hsm_pool.net.authorization import CEREMONY_SERVICE, FREE_OF_DATA
from hsm_pool.store.replica import boot_time


class CallKind(Enum):
    """What a call needs most. The values are label values of metrics."""

    CONTROL = "control"
    """Health, status, evidence and ceremonies."""
    MUTATION = "mutation"
    """Waits for the store."""
    OPERATION = "operation"
    """Computes: cryptography, reads, pages."""
    RSA_KEY = "rsa_key"
    """Within a mutation: waits for an RSA key that is made."""


def _three_quarters(running: int, waiting: int, paused: int = 0) -> Bounds:
    return Bounds(running, running * 3 // 4, waiting, paused)


BOUNDS: dict[CallKind, Bounds] = {
    CallKind.CONTROL: _three_quarters(limits.CONTROL_RUNNING_MAX, limits.CONTROL_WAITING_MAX),
    CallKind.MUTATION: _three_quarters(limits.MUTATIONS_RUNNING_MAX, limits.MUTATIONS_WAITING_MAX),
    CallKind.OPERATION: _three_quarters(
        limits.OPERATIONS_RUNNING_MAX, limits.OPERATIONS_WAITING_MAX, limits.OPERATIONS_PAUSED_MAX
    ),
    # Whoever is alone may use both threads: the others wait a second or so.
    CallKind.RSA_KEY: Bounds(
        limits.RSA_KEYS_RUNNING_MAX, limits.RSA_KEYS_RUNNING_MAX, limits.RSA_KEYS_WAITING_MAX
    ),
}
_DECIDING_THREADS = 8
THREADS = (
    sum(
        bounds.running + bounds.waiting + bounds.paused
        for kind, bounds in BOUNDS.items()
        if kind is not CallKind.RSA_KEY
    )
    + limits.STREAMS_MAX
    + limits.CONTROL_STREAMS_MAX
    + limits.REQUESTS_READ_MAX
    + _DECIDING_THREADS
)
"""Threads of a listener of the client plane: for all that runs or waits, and some that decide and refuse."""

_CHANGES = (
    *("Create", "Import", "Update", "Delete", "Recover", "Purge", "Restore", "Rotate"),
    *("StageRestore", "Start", "Commit", "Cancel", "Finish"),
)


def kind_of(method: str) -> CallKind:
    """Return of which kind a gRPC method (/package.Service/Method) is."""
    if method in FREE_OF_DATA or method.startswith(CEREMONY_SERVICE):
        return CallKind.CONTROL
    if method.rpartition("/")[2].startswith(_CHANGES):
        return CallKind.MUTATION
    return CallKind.OPERATION


def _longest(kind: CallKind, patient: bool) -> float:
    if patient:
        return limits.STREAM_WAIT_SECONDS
    return limits.RSA_KEY_WAIT_SECONDS if kind is CallKind.RSA_KEY else limits.QUEUE_SECONDS_MAX


@dataclass(frozen=True, slots=True)
class _Held:
    """A call's place, for whoever waits on its behalf."""

    calls: CallAdmission
    admission: Admission
    ticket: Ticket

    def pause(self) -> None:
        """Give the place to another call."""
        self.calls.pause(self.admission, self.ticket)

    def resume(self) -> None:
        """Take it back."""
        self.calls.resume(self.admission, self.ticket)


class CallAdmission:
    """One partition's admission. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._admissions = {kind: Admission(bounds) for kind, bounds in BOUNDS.items()}
        # Those that need no role are apart: whoever has none displaces nobody who has one.
        self._streams = {
            CallKind.OPERATION: Admission(_three_quarters(limits.STREAMS_MAX, 0)),
            CallKind.CONTROL: Admission(_three_quarters(limits.CONTROL_STREAMS_MAX, 0)),
        }
        self._waiting: dict[Ticket, threading.Event] = {}

    def check(self, principal: str, kind: CallKind) -> None:
        """Let the request of a call be read.

        Args:
            principal: Who calls.
            kind: What the call will need.

        Raises:
            Overloaded: There is no place for the call.
        """
        admission = self._admissions[kind]
        with self._lock:
            if not admission.refuses(principal):
                return
            admission.refused += 1
        raise self._overloaded(admission)

    @contextmanager
    def call(
        self, principal: str, kind: CallKind, deadline: float, *, patient: bool = False
    ) -> Iterator[None]:
        """Hold a place for as long as a call runs.

        Args:
            principal: Who calls.
            kind: What the call needs.
            deadline: Until when it may wait, on the boot clock; never longer than the bound of the queue.
            patient: Wait outside the queue, as a message of a stream.

        Raises:
            Overloaded: There is no place; it says when there may be one.
        """
        admission = self._admissions[kind]
        with self._lock:
            ticket, changed = admission.arrive(principal, boot_time(), patient=patient)
            self._wake(changed)
            event = None
            if ticket.standing is Standing.WAITING:
                event = self._waiting[ticket] = threading.Event()
        try:
            if event is not None:
                # The refusal of a call that waited in vain still has to arrive in time.
                event.wait(max(0.0, min(_longest(kind, patient), (deadline - boot_time()) / 2)))
            # Nobody hears the answer of a call whose time is over: it would cost others theirs.
            if ticket.standing is not Standing.RUNNING or boot_time() >= deadline:
                raise self._overloaded(admission)
            with waiting.holding(_Held(self, admission, ticket)):
                yield
        finally:
            self._leave(admission, ticket)

    def pause(self, admission: Admission, ticket: Ticket) -> None:
        """Let another call run for now."""
        with self._lock:
            self._wake(admission.pause(ticket, boot_time()))

    def resume(self, admission: Admission, ticket: Ticket) -> None:
        """Let a paused call run again."""
        with self._lock:
            admission.resume(ticket, boot_time())

    @contextmanager
    def stream(self, principal: str, kind: CallKind = CallKind.OPERATION) -> Iterator[None]:
        """Hold a place for as long as a stream is open; it keeps a thread as long as its client likes.

        Args:
            principal: Who calls.
            kind: Of its method: an operation, or control.

        Raises:
            Overloaded: Too many are open.
        """
        with self._lock:
            streams = self._streams[kind]
            ticket, _ = streams.arrive(principal, boot_time())
        if ticket.standing is not Standing.RUNNING:
            raise Overloaded("too many streams are open at this partition").retry_after(
                limits.RETRY_SECONDS_MAX
            )
        try:
            yield
        finally:
            self._leave(streams, ticket)

    def counts(self, kind: CallKind) -> tuple[int, int, int]:
        """Return (running, waiting, refused since the start)."""
        admission = self._admissions[kind]
        with self._lock:
            return admission.running, admission.waiting, admission.refused

    def open_streams(self) -> int:
        """Return how many streams are open."""
        return sum(streams.running for streams in self._streams.values())

    def _leave(self, admission: Admission, ticket: Ticket) -> None:
        with self._lock:
            self._waiting.pop(ticket, None)
            self._wake(admission.leave(ticket, boot_time()))

    def _wake(self, changed: list[Ticket]) -> None:
        for ticket in changed:
            event = self._waiting.pop(ticket, None)
            if event:
                event.set()

    def _overloaded(self, admission: Admission) -> Overloaded:
        with self._lock:
            seconds = admission.retry_seconds()
        return Overloaded("too many calls are under way at this partition").retry_after(seconds)
