"""A call that only waits lets another one run: between admission and the store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Place(Protocol):
    """The place of a call among those that run. Neither method ever blocks."""

    def pause(self) -> None:
        """Give the place to another call for now."""

    def resume(self) -> None:
        """Take it back at once, even if one call too many runs then."""


_thread = threading.local()


@contextmanager
def holding(place: Place) -> Iterator[None]:
    """Let this thread hold a place."""
    before: Place | None = getattr(_thread, "place", None)
    _thread.place = place
    try:
        yield
    finally:
        _thread.place = before


@contextmanager
def idle() -> Iterator[None]:
    """Give this thread's place to another call for as long as this one only waits."""
    place: Place | None = getattr(_thread, "place", None)
    if place is None:
        yield
        return
    place.pause()
    try:
        yield
    finally:
        place.resume()
