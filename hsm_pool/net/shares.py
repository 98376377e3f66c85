"""How much of something callers hold at once: bounded in all, and for each."""

from __future__ import annotations

import threading
from collections import Counter


class Shares:
    """What principals hold of a stock. Thread-safe.

    Args:
        most: Of all together.
        most_of_principal: Of one: less than of all, so that one alone never holds everything.
    """

    def __init__(self, most: int, most_of_principal: int) -> None:
        self._most, self._most_of_principal = most, most_of_principal
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._total = 0

    def take(self, principal: str, amount: int) -> bool:
        """Take some, if that much is left for him; return whether it was."""
        with self._lock:
            if self._total + amount > self._most or self._held[principal] + amount > self._most_of_principal:
                return False
            self._add(principal, amount)
            return True

    def has_room(self, principal: str) -> bool:
        """Return whether anything is left for him."""
        with self._lock:
            return self._total < self._most and self._held[principal] < self._most_of_principal

    def add(self, principal: str, amount: int) -> None:
        """Note what he holds, be it too much: nothing is left for him then."""
        with self._lock:
            self._add(principal, amount)

    def give_back(self, principal: str, amount: int) -> None:
        """Take note that he holds so much less."""
        with self._lock:
            self._add(principal, -amount)

    def _add(self, principal: str, amount: int) -> None:
        self._total += amount
        self._held[principal] += amount
        if not self._held[principal]:
            del self._held[principal]
