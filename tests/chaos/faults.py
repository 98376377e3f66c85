"""Victims of chaos tests: who leads the store, when a pool is whole again, how to repeat a run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest

from hsm_pool.client.connection import NoConnection
from mhsm.etcd.v3 import rpc_pb2, rpc_pb2_grpc
from tests.conftest import pytest_report_header
from tests.running_pool import RunningPool, until

PARTS = ("partition", "store_member", "node_agent")

_STATUS_SECONDS = 1.0
_WHOLE_SECONDS = 90.0


def replay_command(request: pytest.FixtureRequest) -> str:
    """Return the command that repeats this test with the seed of this run."""
    seed = re.search(r"--seed \d+", pytest_report_header())
    full = "--full " if request.config.getoption("--full") else ""
    return f"python -m pytest '{request.node.nodeid}' {full}{seed.group() if seed else ''}"


def store_leader(pool: RunningPool) -> int | None:
    """Return the index of the partition whose store member leads.

    None while not all three members answer and name the same leader.
    """
    connection = pool.connection
    files = {
        name: Path(connection.store[f"{name}_file"]).read_bytes() for name in ("ca", "key", "certificate")
    }
    credentials = grpc.ssl_channel_credentials(files["ca"], files["key"], files["certificate"])
    members: list[int] = []
    leaders: set[int] = set()
    for entry in connection.partitions:
        with grpc.secure_channel(entry.store_endpoint, credentials) as channel:
            try:
                status = rpc_pb2_grpc.MaintenanceStub(channel).Status(
                    rpc_pb2.StatusRequest(), timeout=_STATUS_SECONDS
                )
            except grpc.RpcError:
                return None
        members.append(status.header.member_id)
        leaders.add(status.leader)
    leader = leaders.pop()
    return members.index(leader) if not leaders and leader in members else None


def _alive(process_id: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _all_processes_run(pool: RunningPool) -> bool:
    try:
        connection = pool.connection
    except NoConnection:
        return False
    return all(
        (process_id := entry.process_ids.get(part)) is not None and _alive(process_id)
        for entry in connection.partitions
        for part in PARTS
    )


def await_whole(pool: RunningPool) -> None:
    """Wait until all processes run, all members follow one leader and all partitions serve."""
    until(
        lambda: _all_processes_run(pool) and store_leader(pool) is not None,
        _WHOLE_SECONDS,
        "three nodes with their processes and a store with a leader",
    )
    pool.await_states(["SERVING"] * 3, _WHOLE_SECONDS)


def resume(process_ids: Iterable[int]) -> None:
    """Let stopped processes go on; one that is gone is no error."""
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGCONT)
