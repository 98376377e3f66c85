"""A repository that does not answer holds up nobody (G5)."""

from __future__ import annotations

import threading

import pytest

from hsm_pool.errors import FirmwareRefused
from hsm_pool.firmware.bounded_reads import BoundedReads


def test_a_read_gives_its_result_or_its_error() -> None:
    reads = BoundedReads()
    assert reads.run(lambda: 1, 20, 0) == 1
    for error in (FirmwareRefused("refused"), TimeoutError("of the read itself")):

        def fails(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            reads.run(fails, 20, 20)
    assert reads.run(lambda: 2, 20, 20) == 2
    reads.close()


def test_a_read_that_hangs_is_not_waited_for_and_the_next_ones_are_refused_until_it_ends() -> None:
    reads, put_right, ended = BoundedReads(), threading.Event(), threading.Event()

    def hangs() -> None:
        put_right.wait(10)
        ended.set()

    with pytest.raises(FirmwareRefused, match="does not answer"):
        reads.run(hangs, 0.05, 0)
    for wait_seconds in (0.0, 0.05):
        with pytest.raises(FirmwareRefused, match="does not answer"):
            reads.run(lambda: 1, 20, wait_seconds)
    assert not ended.is_set(), "nothing waited for it"
    put_right.set()
    assert reads.run(lambda: 2, 20, 20) == 2
    reads.close()
