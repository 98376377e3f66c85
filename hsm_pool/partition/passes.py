"""What a partition does by itself, pass by pass, in a thread that it owns."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

import structlog

from hsm_pool.errors import MHSMError
from hsm_pool.store.replica import Stopped

_log = structlog.get_logger()


class Passes(ABC):
    """Looks at intervals for something to do, until it is closed or the replica stops.

    Args:
        name: Of the thread, and in logs.
        pause_seconds: Between two passes.
    """

    def __init__(self, name: str, pause_seconds: float) -> None:
        self._pause_seconds = pause_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()

    @abstractmethod
    def _pass(self) -> None:
        """Do what can be done now; what fails is somebody else's, or the next pass's."""

    def _run(self) -> None:
        while not self._stopping.wait(self._pause_seconds):
            try:
                self._pass()
            except Stopped:
                return
            except MHSMError as error:
                _log.debug("put off", work=self._thread.name, reason=error.reason)
