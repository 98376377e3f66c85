"""The journal survives kill -9 and power loss at any byte; what it says is never guessed (G5)."""

from __future__ import annotations

import multiprocessing
import os
import stat
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_controller import journal as journal_module
from fabric_controller.journal import JOURNAL_FILE, OLD_JOURNAL_FILE, Journal, JournalDamaged, JournalHeld
from fabric_controller.work import (
    Attempt,
    EntryRefused,
    Replacement,
    RollOut,
    Verb,
    Work,
    checkpoint_entry,
    fold,
    fold_all,
    goal_entry,
)

POOL = range(3)
GOAL = RollOut((0, 1, 2), {0: 3, 1: 1, 2: 7})


def command(
    counter: int, verb: str = "DRAIN", partition: int = 0, by: str = "controller"
) -> dict[str, object]:
    return {"kind": "command", "counter": counter, "verb": verb, "partition": partition, "by": by}


def result(counter: int, code: str = "OK") -> dict[str, object]:
    return {"kind": "result", "counter": counter, "code": code}


def opened(directory: Path) -> Journal:
    return Journal(directory, POOL)


def append(directory: Path, *entries: dict[str, object]) -> Work:
    journal = opened(directory)
    with journal.exclusive():
        for entry in entries:
            journal.append(entry)
    journal.close()
    return journal.work


def test_a_new_process_knows_what_the_old_one_knew(tmp_path: Path) -> None:
    work = append(tmp_path, goal_entry(GOAL), command(5), result(5), command(6, "RESTART"))
    assert work.goal == GOAL
    assert [(a.counter, a.verb, a.code) for a in work.attempts] == [
        (5, Verb.DRAIN, "OK"),
        (6, Verb.RESTART, None),
    ]
    assert work.counter == 6
    assert opened(tmp_path).work == work
    assert stat.S_IMODE((tmp_path / JOURNAL_FILE).stat().st_mode) == 0o600


def test_a_torn_tail_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    """What was torn was never sent: the entry is synced before the command leaves."""
    append(tmp_path, goal_entry(GOAL), command(5), result(5))
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    before_last = append_length(whole)
    expected = fold_all(opened(tmp_path).history()[:-1], POOL)
    for length in range(before_last, len(whole)):
        path.write_bytes(whole[:length])
        journal = opened(tmp_path)
        assert journal.work == expected
        with journal.exclusive():
            journal.append(command(9))
        assert [entry["kind"] for entry in journal.history()] == ["goal", "command", "command"]
        journal.close()


def test_what_is_longer_than_the_next_entry_is_cut_off_too(tmp_path: Path) -> None:
    """Nothing of it stays behind that entry, to be read as a part of a later one."""
    append(tmp_path, command(5))
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(path.read_bytes() + b"x" * 1000)
    append(tmp_path, {"kind": "done"})
    assert [entry["kind"] for entry in opened(tmp_path).history()] == ["command", "done"]
    assert b"x" not in path.read_bytes()


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "directory", "FIFO"])
def test_root_follows_no_link_that_the_controllers_user_has_laid(tmp_path: Path, kind: str) -> None:
    """G5: an operator's command would truncate and give away what it leads to."""
    directory, secret = tmp_path / "fabric", tmp_path / "administrator.key"
    directory.mkdir()
    secret.write_bytes(b"a key")
    before = secret.stat()
    path = directory / JOURNAL_FILE
    match kind:
        case "link":
            path.symlink_to(secret)
        case "dangling link":
            path.symlink_to(tmp_path / "made")
        case "second name":
            path.hardlink_to(secret)
        case "directory":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
    with pytest.raises((JournalDamaged, OSError)):
        append(directory, command(5))
    assert secret.read_bytes() == b"a key"
    after = secret.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert not (tmp_path / "made").exists()


def test_an_entry_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    sync = os.fdatasync

    def watched(descriptor: int) -> None:
        sync(descriptor)
        synced.append((tmp_path / JOURNAL_FILE).read_bytes())

    monkeypatch.setattr(os, "fdatasync", watched)
    append(tmp_path, command(5))
    assert [b'"counter":5' in content for content in synced] == [True]


def append_length(whole: bytes) -> int:
    return len(whole) - len(whole.splitlines(keepends=True)[-1])


def test_a_last_line_of_zeros_or_rubbish_is_torn_too(tmp_path: Path) -> None:
    append(tmp_path, command(5))
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    for rubbish in (bytes(100), b"x" * 50 + b"\n", b"00000000 {}\n"):
        path.write_bytes(whole + rubbish)
        assert append(tmp_path, command(6)).counter == 6
        assert len(opened(tmp_path).history()) == 2
        path.write_bytes(whole)


def test_damage_in_the_middle_is_said_and_nothing_is_cut_off(tmp_path: Path) -> None:
    append(tmp_path, command(5), command(6))
    path = tmp_path / JOURNAL_FILE
    damaged = path.read_bytes().replace(b'"counter":5', b'"counter":1')
    path.write_bytes(damaged)
    with pytest.raises(JournalDamaged, match="byte 0"):
        opened(tmp_path)
    assert path.read_bytes() == damaged


def test_an_entry_of_another_kind_stops_the_controller(tmp_path: Path) -> None:
    with pytest.raises(JournalDamaged):
        append(tmp_path, {"kind": "surprise"})
    with pytest.raises(JournalDamaged):
        opened(tmp_path)


CHECKPOINT = {"kind": "checkpoint", "counter": 5, "drained": [], "begun": []}
ROLL_OUT = goal_entry(GOAL)
REPLACEMENT = goal_entry(Replacement(2, 9))


@pytest.mark.parametrize(
    "entry",
    [
        *({**ROLL_OUT, "partitions": value} for value in ([0, 1, 7], [0, 1, 1], "012", None, [0, 1, True])),
        *({**ROLL_OUT, "incarnations": value} for value in ([1, 1], [1, 1, "1"], [1, 1, 2**32], None)),
        *({**ROLL_OUT, "version": value} for value in (-1, "1", 1_000_001)),
        *({**REPLACEMENT, "partition": value} for value in (3, -1, "2", None, 2.0, [2])),
        *({**REPLACEMENT, "incarnation": value} for value in ("x", -1, None)),
        *({**command(6), "counter": value} for value in ("9", 2**60, -1, None)),
        *({**command(6), name: 7} for name in ("partition", "verb", "by")),
        *({**result(6), name: None} for name in ("counter", "code")),
        *({**CHECKPOINT, "drained": value} for value in ([3], "1", None)),
        {**CHECKPOINT, "begun": [{"partition": 7, "incarnation": 1}]},
        *({"kind": "continue", "time_ms": value} for value in (None, "1", -1, 10**18)),
        {"kind": "halt", "by": "operator", "reason": 1},
    ],
)
def test_an_entry_with_a_value_that_cannot_be_is_refused(entry: dict[str, object]) -> None:
    """Whatever folds can be planned and told: somebody may have edited the file with its checksums (G8)."""
    before = [{"time_ms": 1, **each} for each in (CHECKPOINT, ROLL_OUT)]
    assert fold_all(before, POOL).goal == GOAL
    with pytest.raises(EntryRefused):
        fold_all([*before, {"time_ms": 1, **entry}], POOL)


def test_a_begun_replacement_is_remembered_until_it_is_done(tmp_path: Path) -> None:
    """Also when its goal is dropped and the journal begun anew: the partition cannot be resumed meanwhile."""
    work = append(tmp_path, REPLACEMENT, command(7, "HEAL", 0), {"kind": "abandon", "by": "operator"})
    assert (work.goal, work.begun) == (None, (Replacement(2, 9),))
    anew = {**checkpoint_entry(work), "time_ms": 1}
    assert fold_all([anew], POOL) == Work(counter=7, begun=work.begun)
    assert append(tmp_path, REPLACEMENT, command(8, "HEAL", 0), {"kind": "done"}).begun == ()


def test_what_another_process_appended_is_seen(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    append(tmp_path, goal_entry(GOAL))
    assert reader.refresh().goal == GOAL
    append(tmp_path, {"kind": "halt", "by": "operator", "reason": "lunch"})
    assert reader.refresh().halted == "lunch"
    assert not reader.work.running
    append(tmp_path, {"kind": "continue"})
    assert reader.refresh().running


def test_halted_work_can_be_abandoned(tmp_path: Path) -> None:
    """The goal and what was tried for it are dropped; counter and an operator's drains are not (G5)."""
    work = append(
        tmp_path,
        command(4, partition=2, by="operator"),
        result(4),
        goal_entry(GOAL),
        command(5, "STAGE"),
        result(5, "PERMISSION_DENIED"),
        {"kind": "halt", "by": "controller", "reason": "refused"},
        {"kind": "abandon", "by": "operator"},
    )
    assert (work.goal, work.halted, work.attempts, work.running) == (None, None, (), False)
    assert (work.counter, work.drained) == (5, frozenset({2}))
    assert opened(tmp_path).work == work


def _append_many(directory: Path, first: int) -> None:
    journal = opened(directory)
    for _ in range(50):
        with journal.exclusive() as work:
            journal.append(command(work.counter + 1, partition=first))


def test_two_processes_never_use_a_counter_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(tmp_path, first)) for first in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counters = [entry["counter"] for entry in opened(tmp_path).history()]
    assert counters == list(range(1, 101))


def test_a_long_journal_is_put_aside_and_nothing_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES_MAX", 200)
    append(tmp_path, command(5, partition=2, by="operator"), result(5), goal_entry(GOAL), command(6))
    other = opened(tmp_path)
    journal = opened(tmp_path)
    journal.begin_anew()
    assert journal.refresh().goal == GOAL, "not while there is work"
    append(tmp_path, {"kind": "done"})
    journal.begin_anew()
    assert journal.refresh() == other.refresh() == Work(counter=6, drained=frozenset({2}))
    assert (tmp_path / OLD_JOURNAL_FILE).exists()
    append(tmp_path, goal_entry(GOAL))
    with other.exclusive() as work:
        assert work.goal == GOAL


@pytest.mark.parametrize(
    ("code", "drained"),
    [
        *((code, {1}) for code in ("OK", "UNAVAILABLE", "INTERNAL", "REPLY_REFUSED")),
        *((code, set()) for code in ("FAILED_PRECONDITION", "ABORTED")),
    ],
)
def test_an_operators_drain_counts_unless_it_was_refused(code: str, drained: set[int]) -> None:
    """An open outcome counts: the controller must not put back what an operator has taken out."""
    entries = [{**entry, "time_ms": 1} for entry in (command(1, partition=1, by="operator"), result(1, code))]
    assert fold_all(entries, POOL).drained == drained
    resumed = {**command(2, "RESUME", 1, by="operator"), "time_ms": 1}
    assert fold_all([*entries, resumed], POOL).drained == set()


ENTRIES = st.lists(
    st.one_of(
        st.just(goal_entry(GOAL)),
        st.builds(
            command,
            st.integers(1, 9),
            st.sampled_from([verb.value for verb in Verb]),
            st.integers(0, 2),
            st.sampled_from(["controller", "operator"]),
        ),
        st.builds(result, st.integers(1, 9), st.sampled_from(["OK", "UNAVAILABLE", "ABORTED"])),
        st.just(goal_entry(Replacement(2, 9))),
        st.just({"kind": "done"}),
        st.just({"kind": "continue"}),
        st.just({"kind": "abandon", "by": "operator"}),
        st.just({"kind": "halt", "by": "operator", "reason": "x"}),
    ),
    max_size=15,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ENTRIES, st.integers(0, 200))
def test_any_history_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, object]], torn: int
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    written = append(directory, *entries)
    assert opened(directory).work == written
    path = directory / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[: -torn or None])
    history = opened(directory).history()
    assert opened(directory).work == fold_all(history, POOL)
    assert all(isinstance(attempt, Attempt) for attempt in written.attempts)


def test_directories_of_brackets_are_damage(tmp_path: Path) -> None:
    """G5: what the controller writes there ends no command otherwise than with the damage named."""
    text = b'{"kind":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "journal").write_bytes(f"{zlib.crc32(text):08x} ".encode() + text + b"\nx")
    with pytest.raises(JournalDamaged):
        Journal(tmp_path, {0, 1, 2})


def test_a_reason_that_steers_a_terminal_is_damage(tmp_path: Path) -> None:
    """G5: an operator, who may be root, has it shown."""
    entry = {"kind": "halt", "by": "controller", "reason": "\x1b[2Jall is well", "time_ms": 2}
    with pytest.raises(EntryRefused):
        fold(Work(), entry, {0, 1, 2})
    assert fold(Work(), {**entry, "reason": "all is well"}, {0, 1, 2}) == Work()


@pytest.mark.parametrize(("version", "name"), [(0, "restart"), (7, "patch")])
def test_the_history_calls_a_goal_as_its_command(version: int, name: str) -> None:
    goal = RollOut((0, 1), {0: 1, 1: 4}, version)
    entry = {**goal_entry(goal), "time_ms": 1}
    assert entry["goal"] == name
    assert fold(Work(), entry, {0, 1, 2}).goal == goal
    assert fold(Work(), {**entry, "goal": "restart"}, {0, 1, 2}).goal == goal, "as older journals have it"


def test_a_journal_that_is_not_given_back_is_not_waited_for_without_end(tmp_path: Path) -> None:
    """G8: a controller that was stopped within a command; `halt` has to end, too."""
    with (
        closing(Journal(tmp_path, POOL)) as held,
        held.exclusive(),
        closing(Journal(tmp_path, POOL)) as other,
        pytest.raises(JournalHeld),
        other.exclusive(wait_seconds=0.2),
    ):
        raise AssertionError
    with closing(Journal(tmp_path, POOL)) as other, other.exclusive(wait_seconds=0.2) as work:
        assert work == Work()
