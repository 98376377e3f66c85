"""G4: what dies is restarted, with bounded pauses; what loses its parent dies with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_pool.node_agent.processes import Child, is_running, next_wait_seconds
from hsm_pool.provisioning.layout import NewPool, provision
from tests.unit.node_agent.running_agent import SECONDS_MAX, Lines, Process, RunningAgent

BACKOFF_SECONDS = (0.05, 3.0)
SLEEPING = [sys.executable, "-c", "import time; time.sleep(120)"]
"""Python, because an agent starts little else: Landlock."""
_IGNORING = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
signal.pause()
"""
IGNORING_SIGNALS = [sys.executable, "-c", _IGNORING]
LOOKING_AROUND = """
import os, sys
print(sorted(os.environ), os.getcwd(), sys.stdin.read() == "", os.listdir("/proc/self/fd"))
"""

MakeChild = Callable[..., Child]


@pytest.fixture
def make_child(tmp_path: Path) -> Iterator[MakeChild]:
    """Make children that do not outlive the test."""
    made: list[Child] = []

    def make(command: list[str], **options: object) -> Child:
        child = Child("child", command, tmp_path, BACKOFF_SECONDS, **options)  # type: ignore[arg-type]
        made.append(child)
        return child

    yield make
    for child in made:
        if child.process:
            child.process.kill()
            child.process.wait()
            if child.process.stdout:
                child.process.stdout.close()


def run_to_its_end(child: Child) -> float:
    """Start a child, let it exit, reap it, and return the pause until its restart, seen from just before."""
    child.start()
    assert child.process
    child.process.wait(SECONDS_MAX)
    before = time.monotonic()
    assert child.reap()
    after = time.monotonic()
    assert child.start_at is not None
    assert child.start_at - after <= BACKOFF_SECONDS[1]
    return child.start_at - before


# -- restarts and pauses -----------------------------------------------------------------


def test_a_child_is_due_at_once_and_not_while_it_runs(make_child: MakeChild) -> None:
    child = make_child(SLEEPING)
    assert child.process_id is None
    assert child.due()
    child.start()
    assert not child.due()
    assert not child.reap()
    assert child.process_id
    assert is_running(child.process_id)


def test_a_killed_child_is_reaped_once_and_planned_anew(make_child: MakeChild) -> None:
    child = make_child(SLEEPING)
    child.start()
    assert child.process
    child.process.kill()
    assert os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
    killed = child.process.pid
    assert child.reap()
    assert child.process_id is None
    assert child.failures == 1
    assert not child.reap()
    child.start()
    assert child.process_id not in {None, killed}


def test_pauses_double_from_the_first_to_the_last(make_child: MakeChild) -> None:
    child = make_child(["false"])
    first, last = BACKOFF_SECONDS
    for expected in (first, 2 * first, 4 * first, 8 * first, 16 * first, 32 * first, last, last):
        began = time.monotonic()
        pause = run_to_its_end(child)
        assert child.start_at is not None
        assert expected <= pause <= expected + time.monotonic() - began


@pytest.mark.parametrize("failures", [1_100, 1_000_000])
def test_a_child_that_never_starts_is_tried_for_ever(make_child: MakeChild, failures: int) -> None:
    """The agent outlives a thousand failures of its partition: less than an hour of them."""
    child = make_child(["false"], failures=failures)
    assert run_to_its_end(child) >= BACKOFF_SECONDS[1]


def test_a_child_that_ran_for_long_is_restarted_soon(make_child: MakeChild) -> None:
    child = make_child(["false"], failures=8)
    for ran_seconds, failures in ((9.0, 9), (11.0, 0)):
        child.start()
        child.started_at -= ran_seconds
        assert child.process
        child.process.wait(SECONDS_MAX)
        assert child.reap()
        assert child.failures == failures
    assert child.start_at is not None
    assert child.start_at - time.monotonic() <= BACKOFF_SECONDS[0]


def test_failures_are_forgotten_once_when_a_child_stays_up(make_child: MakeChild) -> None:
    """Else the status would call it unstable for as long as it runs."""
    child = make_child(SLEEPING, failures=3)
    child.start()
    assert not child.settle()
    child.started_at -= 11.0
    assert child.settle()
    assert child.failures == 0
    assert not child.settle()


def test_a_command_that_does_not_exist_fails_like_any_other(make_child: MakeChild, tmp_path: Path) -> None:
    child = make_child([str(tmp_path / "absent")])
    assert run_to_its_end(child) >= BACKOFF_SECONDS[0]
    assert child.failures == 1
    assert "absent" in (tmp_path / "child.log").read_text()


def test_a_child_whose_log_cannot_be_written_is_tried_again(make_child: MakeChild, tmp_path: Path) -> None:
    """The disk of a node is lost: whoever starts its agent outlives that, and starts it when it is back."""
    child = make_child(SLEEPING)
    child.log_directory = tmp_path / "lost"
    for failures in (1, 2):
        child.start()
        assert child.process_id is None
        assert child.failures == failures
        assert child.start_at is not None
        assert child.start_at > time.monotonic() - 1
    child.log_directory.mkdir()
    child.start()
    assert child.process_id


def test_a_loop_waits_for_the_child_that_is_due_next(make_child: MakeChild) -> None:
    running, soon, late = (make_child(SLEEPING, start_at=start_at) for start_at in (None, 0.0, 0.0))
    assert next_wait_seconds([running], 5.0) == 5.0
    assert next_wait_seconds([], 5.0) == 5.0
    now = time.monotonic()
    soon.start_at, late.start_at = now + 100, now + 200
    assert 100 - (time.monotonic() - now) - 1 <= next_wait_seconds([running, late, soon], 500.0) <= 100
    assert next_wait_seconds([running, late, soon], 5.0) == 5.0
    soon.start_at = now - 1
    assert next_wait_seconds([running, late, soon], 5.0) == 0.0


# -- ends --------------------------------------------------------------------------------


def test_a_child_that_is_stopped_politely_ends_by_the_signal(make_child: MakeChild) -> None:
    child = make_child(["sh", "-c", 'trap "exit 0" TERM; echo ready; while :; do :; done'], pipe_output=True)
    child.start()
    process = child.process
    assert process
    assert process.stdout
    assert Lines(process.stdout.fileno()).next() == "ready"
    child.stop(SECONDS_MAX)
    process.stdout.close()
    assert process.returncode == 0
    assert (child.process, child.start_at) == (None, None)
    child.stop(SECONDS_MAX)  # nothing is left to stop


def test_a_child_that_does_not_heed_is_killed(make_child: MakeChild) -> None:
    child = make_child(IGNORING_SIGNALS, pipe_output=True)
    child.start()
    process = child.process
    assert process
    assert process.stdout
    assert Lines(process.stdout.fileno()).next() == "ready"
    child.stop(0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_paused_child_is_killed(make_child: MakeChild) -> None:
    child = make_child(SLEEPING)
    child.start()
    process = child.process
    assert process
    process.send_signal(signal.SIGSTOP)
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    child.stop(0.2)
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_awaits_its_parent_does_not_run() -> None:
    process = subprocess.Popen(["true"])
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{process.pid}").exists()
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)
    assert is_running(os.getpid())


def test_a_process_whose_name_looks_like_a_state_runs(tmp_path: Path) -> None:
    """The kernel puts the name, unescaped, before the state."""
    script = tmp_path / "a) Z (b"
    script.write_text("#!/bin/sh\necho ready\nread -r line\n")
    script.chmod(0o700)
    with subprocess.Popen([str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert Lines(process.stdout.fileno()).next() == "ready"
        assert ") Z (" in Path(f"/proc/{process.pid}/stat").read_text()
        assert is_running(process.pid)
        process.kill()


_PARENT = """
import subprocess, sys
from hsm_pool.node_agent.processes import dying_with_parent
child = subprocess.Popen(dying_with_parent(sys.argv[1:]), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent(number: signal.Signals) -> None:
    """Even one that ignores signals: the kernel kills it."""
    command = [sys.executable, "-c", _PARENT, *IGNORING_SIGNALS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = Process(int(Lines(parent.stdout.fileno()).next()))
        try:
            assert not child.exits(0)
            parent.send_signal(number)
            assert child.exits()
        finally:
            child.close()
            parent.kill()


# -- what a child gets -------------------------------------------------------------------


def test_a_child_gets_no_secret_of_the_environment_no_input_and_no_open_files(
    make_child: MakeChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSTOMER_PASSWORD", "hunter2")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    child = make_child([sys.executable, "-c", LOOKING_AROUND], pipe_output=True)
    try:
        child.start()
        assert child.process
        assert child.process.stdout
        line = Lines(child.process.stdout.fileno()).next()
    finally:
        os.close(reader)
        os.close(writer)
    assert "CUSTOMER_PASSWORD" not in line
    assert "'PATH'" in line
    # Standard input, output, error and the listing itself.
    assert line.endswith(" / True ['0', '1', '2', '3']")


def test_five_logs_are_kept_each_of_one_start_readable_by_the_owner(
    make_child: MakeChild, tmp_path: Path
) -> None:
    for number in range(8):
        run_to_its_end(make_child(["sh", "-c", f"echo out {number}; echo err {number} >&2"]))
    names = ["child.log", *(f"child.{older}.log" for older in range(1, 5))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for age, name in enumerate(names):
        assert (tmp_path / name).read_text() == f"out {7 - age}\nerr {7 - age}\n"
        assert (tmp_path / name).stat().st_mode & 0o7777 == 0o600


# -- a whole agent -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the settings of a node whose store member is a script that only lives."""
    directory = tmp_path_factory.mktemp("agent")
    member = directory / "member"
    member.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(120)\n")
    member.chmod(0o700)
    provision(directory / "data", NewPool(attended=True, recoverable_days=90, etcd_binary=str(member)))
    return directory / "data" / "nodes" / "0" / "node.json"


def test_children_that_are_killed_are_restarted_and_the_other_one_is_left_alone(node_settings: Path) -> None:
    with RunningAgent(node_settings, SLEEPING) as agent:
        before = agent.report()
        for part, other in (("partition", "store_member"), ("store_member", "partition")):
            agent.child(before[part]).signal(signal.SIGKILL)
            gone = {None, before[part]}
            after = agent.reported(lambda ids, part=part, gone=gone: ids[part] not in gone)  # type: ignore[misc]
            assert after[other] == before[other]
            assert not agent.child(after[part]).exits(0)
            before = after
        assert agent.stop() == 0


def test_both_children_die_with_an_agent_that_is_killed(node_settings: Path) -> None:
    with RunningAgent(node_settings, SLEEPING) as agent:
        ids = agent.report()
        children = [agent.child(ids[part]) for part in ("partition", "store_member")]
        agent.process.kill()
        assert all(child.exits() for child in children)


def test_an_agent_that_is_stopped_leaves_no_child(node_settings: Path) -> None:
    with RunningAgent(node_settings, SLEEPING) as agent:
        ids = agent.report()
        children = [agent.child(ids[part]) for part in ("partition", "store_member")]
        assert agent.stop() == 0
        assert all(child.exits(0) for child in children)


def test_a_partition_that_never_starts_is_tried_with_growing_pauses(node_settings: Path) -> None:
    """The time between two starts is at least the pause before the second, whatever the machine's load."""
    with RunningAgent(node_settings, ["false"]) as agent:
        began = time.monotonic()
        started: set[int] = set()
        while len(started) < 4:
            started.add(agent.reported(lambda ids: ids["partition"])["partition"] or 0)
        assert time.monotonic() - began >= 0.05 + 0.1 + 0.2
        assert agent.stop() == 0
