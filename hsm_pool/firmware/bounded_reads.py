"""Reads of a firmware repository, which may lie on somebody else's disk and never answer.

Whoever asks waits no longer than it says; what hangs holds up nothing but further reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from hsm_pool.errors import FirmwareRefused

T = TypeVar("T")
_CLOSE_SECONDS = 1.0
_NO_ANSWER = "the firmware repository does not answer"


class BoundedReads:
    """One read at a time, in a thread of its own. Thread-safe."""

    def __init__(self) -> None:
        self._free = threading.Semaphore()
        self._thread: threading.Thread | None = None

    def run(self, read: Callable[[], T], timeout_seconds: float, wait_seconds: float) -> T:
        """Return what a read returns, or raise what it raises.

        Args:
            read: Reads; when it has not returned in time it goes on, and its result is dropped.
            timeout_seconds: How long it is waited for.
            wait_seconds: How long to wait for a read that is under way already.

        Raises:
            FirmwareRefused: The repository does not answer in time.
        """
        result: Future[T] = Future()

        def work() -> None:
            try:
                result.set_result(read())
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                result.set_exception(error)
            finally:
                self._free.release()

        if not self._free.acquire(timeout=wait_seconds):
            raise FirmwareRefused(_NO_ANSWER)
        self._thread = threading.Thread(target=work, name="firmware repository", daemon=True)
        self._thread.start()
        try:
            return result.result(timeout_seconds)
        except TimeoutError:
            if result.done():
                raise
            raise FirmwareRefused(_NO_ANSWER) from None

    def close(self) -> None:
        """Wait a moment for a read under way; one that hangs ends with the process."""
        if self._thread:
            self._thread.join(_CLOSE_SECONDS)
