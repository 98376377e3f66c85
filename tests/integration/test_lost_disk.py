"""A disk that was lost as a whole: what the status says of the partition, and what brings it back."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.errors import DISK_IS_EMPTY
from mhsm.keys.v1 import keys_pb2
from tests.fabric_access import mhsm_fabric
from tests.running_pool import RunningPool, mhsm, until

pytestmark = [pytest.mark.pool, pytest.mark.slow]

LOST = 2


def empty(directory: Path) -> None:
    """Delete what lies in a directory."""
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def row_of(pool: RunningPool, index: int) -> dict[str, Any]:
    """Return what `mhsm status` says of a partition."""
    output = mhsm("status", "--json", "--data-dir", str(pool.directory), check=False).stdout
    found: dict[str, Any] = json.loads(output)["partitions"][index]
    return found


def test_the_status_of_a_lost_disk_suggests_a_replacement_and_shows_it_while_it_is_half_done(
    pool: RunningPool,
) -> None:
    """G5: two others serve, so no officer is called in; what was begun is visible until it has ended."""
    next_line = f"next: mhsm-fabric replace {LOST} --data-dir {pool.directory}\n"
    pool.signal(LOST, "partition", signal.SIGKILL)
    pool.await_states(["SERVING"] * 3)  # at its second start: the first of an empty disk is an earlier one
    node = Path(pool.connection.partitions[LOST].data_directory)
    empty(node / "partition")
    empty(node / "store")
    mhsm("kill", str(LOST), "--what", "node", "--data-dir", str(pool.directory))
    pool.await_states(["SERVING", "SERVING", "LOCKED"])
    until(lambda: row_of(pool, LOST)["reason"] == DISK_IS_EMPTY, 30, "the reason is known")
    shown = mhsm("status", "--data-dir", str(pool.directory))
    assert next_line in shown.stderr
    assert f"partition {LOST}: the disk of its store member is lost" in shown.stdout
    assert "quorum" not in shown.stdout + shown.stderr

    # Its agent does not start the new one yet: the replacement is half done.
    pool.signal(LOST, "node_agent", signal.SIGSTOP)
    try:
        begun = mhsm_fabric(pool, "replace", str(LOST), "--yes", "--no-wait")
        assert begun.returncode == 0, begun.stderr
        until(lambda: row_of(pool, LOST)["half_replaced"], 30, "the others know of the admission")
        shown = mhsm("status", "--data-dir", str(pool.directory))
        assert f"partition {LOST}: its replacement was begun and has not ended\n" in shown.stdout
        assert next_line in shown.stderr
    finally:
        pool.signal(LOST, "node_agent", signal.SIGCONT)
    pool.await_states(["SERVING"] * 3, seconds=120)
    assert not row_of(pool, LOST)["half_replaced"]


def test_a_member_that_lost_its_disk_votes_for_nobody(pool: RunningPool) -> None:
    """G1: it has forgotten what it acknowledged, and with one that lags behind it would take that back.

    It was replaced before, so it once joined running members. One disk of three is lost, no more.
    """
    lagging, other = sorted({0, 1, 2} - {LOST})
    pool.await_states(["SERVING"] * 3)
    drained = mhsm_fabric(pool, "drain", str(LOST))
    assert drained.returncode == 0, drained.stderr
    replaced = mhsm_fabric(pool, "replace", str(LOST), "--yes")
    assert replaced.returncode == 0, replaced.stderr
    pool.await_states(["SERVING"] * 3, seconds=120)
    with pool.client() as client:
        with pool.paused(lagging, "store_member"):
            names = [
                client.create_key(f"kept-{n}", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256).name
                for n in range(3)
            ]
            with pool.paused(other, "store_member"):
                shutil.rmtree(Path(pool.connection.partitions[LOST].data_directory) / "store")
                mhsm("kill", str(LOST), "--what", "store", "--data-dir", str(pool.directory))
                until(lambda: row_of(pool, LOST)["store_disk_lost"], 30, "the agent says it")
                pool.signal(lagging, "store_member", signal.SIGCONT)
                # The two would be a majority. The next agent keeps it out, too.
                pool.signal(LOST, "node_agent", signal.SIGKILL)
                until(lambda: times_kept_out(pool) >= 2, 30, "a new agent says it")
                assert row_of(pool, LOST)["process_ids"]["store_member"] is None
        for name in names:
            assert until(lambda n=name: client.get_key(n.split("@")[0]), 60, "it is there")  # type: ignore[misc]
    shown = mhsm("status", "--data-dir", str(pool.directory))
    assert f"next: mhsm-fabric drain {LOST}" in shown.stderr
    assert f"next: mhsm-fabric replace {LOST}" in shown.stderr
    until(lambda: mhsm_fabric(pool, "drain", str(LOST)).returncode == 0, 60, "it is drained")
    assert mhsm_fabric(pool, "replace", str(LOST), "--yes").returncode == 0
    pool.await_states(["SERVING"] * 3, seconds=120)
    assert not row_of(pool, LOST)["store_disk_lost"]


def times_kept_out(pool: RunningPool) -> int:
    """Return how many agents have said that the member does not start."""
    logs = Path(pool.connection.partitions[LOST].log_directory).glob("node-agent-*.log")
    return sum(log.read_text().count("it does not start without its data") for log in logs)


def test_a_partition_whose_port_is_taken_says_so_in_one_line(pool: RunningPool) -> None:
    """Ports are drawn when the pool is made; while a partition is down another process may take one."""
    pool.await_states(["SERVING"] * 3)
    entry = pool.connection.partitions[LOST]
    host, _, port = entry.peer_endpoint.rpartition(":")
    pool.signal(LOST, "node_agent", signal.SIGSTOP)
    pool.signal(LOST, "partition", signal.SIGKILL)
    with socket.socket() as taker:
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        until(lambda: bound(taker, host, int(port)), 30, "the port is free")
        taker.listen()
        pool.signal(LOST, "node_agent", signal.SIGCONT)
        until(lambda: row_of(pool, LOST)["failures"]["partition"] >= 3, 60, "it does not stay up")
        shown = mhsm("status", "--data-dir", str(pool.directory)).stdout
        line = f"partition {LOST}: its process does not stay up: ended "
        assert f"{line}" in shown
        assert f"nodes/{LOST}/logs/partition.log" in shown
        logs = Path(entry.log_directory).glob("partition*.log")
        said = [log.read_text() for log in logs]
        assert [
            text for text in said if f'"endpoint": "{entry.peer_endpoint}"' in text and "is taken" in text
        ]
        assert not [text for text in said if "Traceback" in text]
    pool.await_states(["SERVING"] * 3, seconds=120)


def bound(taker: socket.socket, host: str, port: int) -> bool:
    """Return whether an address could be taken."""
    try:
        taker.bind((host, port))
    except OSError:
        return False
    return True
