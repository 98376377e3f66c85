"""mhsm kill and mhsm status after the supervisor was killed: its file names ids that are others' now."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.ceremony_runner.rehearsal import make_administrator

_WAITS = "import signal; print('ready', flush=True); signal.pause()"


@contextmanager
def waiting_process(*, grandchild: bool) -> Iterator[int]:
    """Run a process that waits: a grandchild, as a partition is of its supervisor, or a stranger."""
    parent = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
    parent += "print(child.pid, flush=True)" + ("; child.wait()" if grandchild else "")
    with subprocess.Popen(
        [sys.executable, "-c", parent, _WAITS], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        lines = [starter.stdout.readline().strip() for _ in range(2)]
        (process_id,) = (int(line) for line in lines if line != "ready")
        if not grandchild:
            starter.wait()
        try:
            yield process_id
        finally:
            try:
                os.kill(process_id, signal.SIGKILL)
            except ProcessLookupError:
                assert grandchild, "the stranger was killed"


@contextmanager
def left_behind(directory: Path, process_id: int, *, supervised: bool) -> Iterator[Path]:
    """Give a data directory whose connection file names a process; this process may be its supervisor."""
    made = make_administrator(directory).directory
    connection = json.loads((made / "connection.json").read_text())
    plane = "127.0.0.1:1"
    names = ("endpoint", "peer_endpoint", "enclave_endpoint", "node_endpoint", "store_endpoint")
    connection["partitions"] = [
        {
            "index": index,
            **dict.fromkeys(names, plane),
            "data_directory": str(made),
            "log_directory": str(made),
            "process_ids": {"partition": process_id, "store_member": None, "node_agent": process_id},
        }
        for index in range(3)
    ]
    connection["fabric_controller"] = {"process_id": None}
    (made / "connection.json").write_text(json.dumps(connection))
    lock = os.open(made / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.write(lock, str(os.getpid()).encode())
        if supervised:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield made
    finally:
        os.close(lock)


def mhsm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    command = [sys.executable, "-m", "hsm_pool.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def is_alive(process_id: int) -> bool:
    """Return whether a process runs: neither gone nor waiting to be reaped."""
    status = Path(f"/proc/{process_id}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("supervised", [True, False])
def test_a_stranger_that_has_a_recorded_id_gets_no_signal(tmp_path: Path, supervised: bool) -> None:
    """The kernel gives ids anew: a process is ours when the supervisor or its node agents started it."""
    with (
        waiting_process(grandchild=False) as stranger,
        left_behind(tmp_path / "pool", stranger, supervised=supervised) as directory,
    ):
        completed = mhsm("kill", "1", "--data-dir", str(directory))
        assert is_alive(stranger)
        said = "nothing of partition 1 is running" if supervised else "its supervisor has ended"
        assert said in completed.stderr
        assert completed.returncode == (1 if supervised else 5)


def test_a_process_of_the_pool_gets_its_signal(tmp_path: Path) -> None:
    with (
        waiting_process(grandchild=True) as partition,
        left_behind(tmp_path / "pool", partition, supervised=True) as directory,
    ):
        completed = mhsm("kill", "1", "--data-dir", str(directory))
        assert completed.returncode == 0, completed.stderr
        assert not is_alive(partition)


def test_status_says_that_the_pool_does_not_run_when_its_supervisor_was_killed(tmp_path: Path) -> None:
    """Not three unreachable partitions with ids of processes that are gone."""
    with left_behind(tmp_path / "pool", os.getpid(), supervised=False) as directory:
        completed = mhsm("status", "--data-dir", str(directory))
        assert completed.returncode == 5
        assert "mhsm: the pool does not run: its supervisor has ended\n" in completed.stderr
        assert f"next: mhsm up --data-dir {directory}\n" in completed.stderr
