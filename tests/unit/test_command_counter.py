"""G5: a command of the controller is obeyed once at most, whatever crashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import limits
from hsm_pool.errors import CommandStale
from hsm_pool.partition import command_counter
from hsm_pool.partition.command_counter import CommandCounter

NOW = 1_000_000
SOON = NOW + 10_000


def refused(counter: CommandCounter, number: int, expires_ms: int = SOON, now_ms: int = NOW) -> bool:
    try:
        counter.accept(number, expires_ms, now_ms)
    except CommandStale:
        return True
    return False


def test_repeats_and_older_ones_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    counter = CommandCounter(tmp_path)
    counter.accept(5, SOON, NOW)
    for again in (counter, CommandCounter(tmp_path)):
        assert refused(again, 5)
        assert refused(again, 4)
    CommandCounter(tmp_path).accept(6, SOON, NOW)
    assert refused(CommandCounter(tmp_path), 6)


def test_a_crash_between_writing_and_acting_refuses_the_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter is on disk when accept returns; a write that fails is no acceptance."""
    written: list[bytes] = []
    original = command_counter.write_atomically

    def noted(path: Path, content: bytes) -> None:
        original(path, content)
        written.append(content)

    monkeypatch.setattr(command_counter, "write_atomically", noted)
    counter = CommandCounter(tmp_path)
    counter.accept(7, SOON, NOW)
    assert written == [b"7"]

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(command_counter, "write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        counter.accept(8, SOON, NOW)
    monkeypatch.setattr(command_counter, "write_atomically", original)
    counter.accept(8, SOON, NOW)


def test_a_command_is_valid_for_a_minute_at_most(tmp_path: Path) -> None:
    counter = CommandCounter(tmp_path)
    latest = NOW + limits.COMMAND_SECONDS_MAX * 1000
    assert refused(counter, 1, NOW)
    assert refused(counter, 1, NOW - 1)
    assert refused(counter, 1, latest + 1)
    counter.accept(1, latest, NOW)


def test_counters_cannot_be_used_up(tmp_path: Path) -> None:
    """A hostile counter of 2^53 - 1 would refuse every later command for ever."""
    counter = CommandCounter(tmp_path)
    assert refused(counter, 2**53 - 1)
    assert refused(counter, SOON + 1)
    counter.accept(SOON, SOON, NOW)
    assert refused(counter, SOON, SOON + 1_000)
    counter.accept(SOON + 1, SOON + 1_000, NOW + 1_000)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=40))
def test_each_counter_is_accepted_once(tmp_path_factory: pytest.TempPathFactory, calls: object) -> None:
    directory = tmp_path_factory.mktemp("counter")
    counter = CommandCounter(directory)
    accepted: list[int] = []
    for number, crash in calls:  # type: ignore[attr-defined]
        if crash:
            counter = CommandCounter(directory)
        if not refused(counter, number):
            accepted.append(number)
    assert accepted == sorted(set(accepted))
