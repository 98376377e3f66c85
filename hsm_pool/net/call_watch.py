"""Ends calls whose client takes too long: to send its request, or to take its answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import grpc

from hsm_pool.store.replica import boot_time


@dataclass(slots=True, eq=False)
class Watched:
    """A call that is waited for."""

    context: grpc.ServicerContext
    until: float
    """On the boot clock."""
    late: bool = False


class CallWatch:
    """Cancels calls that are waited for too long. Thread-safe. :meth:`close` ends its thread.

    Args:
        seconds_max: How long each may take.
    """

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._lock = threading.Lock()
        # All wait equally long, so the first one that began is the first one that is late.
        self._watched: dict[Watched, None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="call-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and wait."""
        self._stopping.set()
        self._thread.join()

    def begin(self, context: grpc.ServicerContext) -> Watched:
        """Watch a call from now on, until :meth:`end`."""
        watched = Watched(context, boot_time() + self._seconds_max)
        with self._lock:
            self._watched[watched] = None
        return watched

    def end(self, watched: Watched) -> None:
        """Watch it no more."""
        with self._lock:
            self._watched.pop(watched, None)

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds_max / 4):
            for watched in self._late(boot_time()):
                watched.context.cancel()

    def _late(self, now: float) -> list[Watched]:
        found = []
        with self._lock:
            for watched in self._watched:
                if watched.until > now:
                    break
                watched.late = True
                found.append(watched)
        return found
