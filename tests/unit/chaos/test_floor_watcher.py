"""The watcher of the floor of two sees a pool below it, and does not take two moments for one (G5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mhsm.enclave.v1 import enclave_pb2
from tests.fabric_access import FloorWatcher
from tests.running_pool import until


class Looked:
    """Partitions that answer as they are told, and how often they did."""

    def __init__(self, fresh: Callable[[int, int], bool], applied: Callable[[int], int]) -> None:
        self._fresh, self._applied = fresh, applied
        self.looks = 0

    def status(self, index: int) -> enclave_pb2.GetStatusResponse:
        self.looks += 1
        fresh = self._fresh(index, self.looks)
        # Each says that three serve, as partitions did that counted who only renews.
        return enclave_pb2.GetStatusResponse(
            fresh=fresh, applied_sequence=self._applied(self.looks), serving_count=3, incarnation=1
        )


def fewest(looked: Looked) -> int:
    fabric: Any = looked
    watcher = FloorWatcher(fabric)
    try:
        until(lambda: looked.looks > 30, 30, "it looks")
    finally:
        watcher.close()
    return watcher.fewest


@pytest.mark.parametrize("serving", [{0, 1, 2}, {0, 2}, {1}, set()])
def test_it_counts_who_holds_a_lease_whatever_they_say_of_each_other(serving: set[int]) -> None:
    assert fewest(Looked(lambda index, _: index in serving, lambda _: 7)) == len(serving)


def test_two_that_are_drained_one_after_the_other_are_not_one_moment() -> None:
    """Seen without a lease in one round; but something was applied between the answers of each."""
    assert fewest(Looked(lambda index, _: index == 1, lambda look: look)) == 3
