"""G5, G6: a dead partition is replaced by a new one on an empty data directory, which heals by evidence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.client.pool import Pool
from mhsm.keys.v1 import keys_pb2
from tests.fabric_access import Fabric, history, mhsm_fabric
from tests.running_pool import RunningPool, mhsm, until

pytestmark = [pytest.mark.pool, pytest.mark.slow]

DEAD = 2


@pytest.fixture
def fabric(pool: RunningPool) -> Iterator[Fabric]:
    pool.await_states(["SERVING"] * 3)
    made = Fabric(pool)
    yield made
    made.close()


def lose_the_disk(pool: RunningPool, index: int) -> None:
    """Take away what partition and store member of a node have on disk, and kill both."""
    node = Path(pool.connection.partitions[index].data_directory)
    (node / "partition" / "head").unlink()
    shutil.rmtree(node / "store" / "member")
    pool.signal(index, "store_member", signal.SIGKILL)
    pool.signal(index, "partition", signal.SIGKILL)


def signs_everywhere(pool: RunningPool, name: str) -> None:
    for index in range(3):
        with pool.client(partition=index) as client:
            client.sign(name, "ES256", bytes(32))


def writes(client: Pool, name: str) -> None:
    client.create_key(name, key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)


def test_a_partition_that_lost_its_disk_is_replaced(pool: RunningPool, fabric: Fabric) -> None:
    """It refuses to serve by itself; admitted anew it heals, also when the controller is killed meanwhile."""
    with pool.client() as client:
        writes(client, "before")
    refused = mhsm_fabric(pool, "replace", str(DEAD))
    assert refused.returncode == 1, "a partition that serves is not replaced"
    assert fabric.send("Heal", 0, **fabric.stamp(), index=DEAD) == "FAILED_PRECONDITION"
    assert fabric.send("Heal", 0, **fabric.stamp(), index=0) == "INVALID_ARGUMENT"
    incarnation = pool.status(DEAD).incarnation

    lose_the_disk(pool, DEAD)
    pool.await_states(["SERVING", "SERVING", "QUARANTINED"])
    assert "state file of this partition is gone" in pool.status(DEAD).state_reason
    with pool.client() as client:
        writes(client, "meanwhile")
    assert mhsm_fabric(pool, "replace", str(DEAD), "--dry-run").returncode == 0
    begun = mhsm_fabric(pool, "replace", str(DEAD), "--no-wait")
    assert begun.returncode == 0, begun.stderr
    os.kill(pool.connection.fabric_controller["process_id"], signal.SIGKILL)
    pool.await_states(["SERVING"] * 3, seconds=120)
    until(lambda: mhsm_fabric_state(pool) == "idle", 60, "the controller is done")

    assert pool.status(DEAD).incarnation > incarnation
    assert pool.status(DEAD).recovery_path == "peer", "healed by evidence"
    signs_everywhere(pool, "keys/before")
    signs_everywhere(pool, "keys/meanwhile")
    node = Path(pool.connection.partitions[DEAD].data_directory)
    assert (node / "partition.replaced-1" / "incarnation").exists(), "put aside, not destroyed"
    assert (node / "store.replaced-1").is_dir()
    assert [entry for entry in history(pool) if entry.get("verb") == "HEAL"]
    # The new store member counts: with another one gone, writes go on.
    pool.signal(0, "store_member", signal.SIGSTOP)
    try:
        with pool.client(partition=1) as client:
            writes(client, "afterwards")
    finally:
        pool.signal(0, "store_member", signal.SIGCONT)
    pool.await_states(["SERVING"] * 3)


def test_a_new_partition_is_an_ordinary_one(pool: RunningPool, fabric: Fabric) -> None:
    """It restarts, is drained, and without a state file it is refused again, and replaced again."""
    pool.signal(DEAD, "node_agent", signal.SIGKILL)
    pool.await_states(["SERVING"] * 3)
    assert fabric.drain(DEAD) == "drained"
    fabric.resume(DEAD)
    pool.await_states(["SERVING"] * 3)
    lose_the_disk(pool, DEAD)
    pool.await_states(["SERVING", "SERVING", "QUARANTINED"])
    replaced = mhsm_fabric(pool, "replace", str(DEAD))
    assert replaced.returncode == 0, replaced.stderr
    pool.await_states(["SERVING"] * 3)
    signs_everywhere(pool, "keys/before")


def verify(pool: RunningPool, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Verify the audit logs; return the exit code and the report."""
    done = mhsm("audit", "verify", *arguments, "--data-dir", str(pool.directory), "--json", check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[0]) if done.stdout else {}


@pytest.mark.usefixtures("fabric")
def test_the_audit_log_of_a_lost_disk_is_named_until_its_loss_is_known(pool: RunningPool) -> None:
    """G7: the other two kept its last checkpoint; nothing but that one log is excused."""
    # The last checkpoint is cosigned before the disk is lost: else what came after it is lost unseen.
    until(lambda: verify(pool)[1]["logs"][DEAD]["records_covered"] > 0, 30, "a checkpoint")
    code, whole = verify(pool)
    assert (code, whole["lost_logs"]) == (0, [])
    audit = Path(pool.connection.partitions[DEAD].data_directory) / "audit"
    for path in audit.iterdir():
        path.unlink()
    lose_the_disk(pool, DEAD)
    pool.await_states(["SERVING", "SERVING", "QUARANTINED"])
    replaced = mhsm_fabric(pool, "replace", str(DEAD))
    assert replaced.returncode == 0, replaced.stderr
    pool.await_states(["SERVING"] * 3)

    code, report = verify(pool)
    assert code == 6
    (lost,) = report["lost_logs"]
    assert (lost["partition"], lost["known"]) == (DEAD, False)
    assert lost["records"] >= whole["logs"][DEAD]["records_covered"]
    assert {"partition 0", "partition 1"} <= set(lost["kept_by"])
    assert [finding["partition"] for finding in report["findings"]] == [DEAD]
    assert lost["log"] in report["findings"][0]["what"]

    code, report = verify(pool, "--known-lost", lost["log"])
    assert (code, report["findings"]) == (0, [])
    assert report["lost_logs"] == [{**lost, "known": True}]
    said = mhsm("audit", "verify", "--known-lost", lost["log"], "--data-dir", str(pool.directory))
    assert f"a gap that is known: log {lost['log']} is gone" in said.stdout
    assert verify(pool, "--known-lost", "0" * 32)[0] == 6, "another id excuses nothing"


def test_directories_that_are_gone_are_made_anew(pool: RunningPool, fabric: Fabric) -> None:
    """A partition that lost all but its audit log counts from 1 again; no log is taken for forged (G7)."""
    until(lambda: verify(pool)[1]["logs"][DEAD]["records_covered"] > 0, 30, "a checkpoint of the first start")
    pool.signal(DEAD, "partition", signal.SIGKILL)
    pool.await_states(["SERVING"] * 3)
    before = pool.status(DEAD).incarnation
    node = Path(pool.connection.partitions[DEAD].data_directory)
    agent = pool.connection.partitions[DEAD].process_ids["node_agent"]
    shutil.rmtree(node / "partition")
    shutil.rmtree(node / "store")
    os.kill(agent, signal.SIGKILL)
    # Its peers have seen a later start, so they give it no keys, not even to learn what it misses.
    pool.await_states(["SERVING", "SERVING", "LOCKED"])
    assert pool.status(DEAD).incarnation < before, "its keys have the names of earlier ones"
    replaced = mhsm_fabric(pool, "replace", str(DEAD), "--yes")
    assert replaced.returncode == 0, replaced.stderr
    pool.await_states(["SERVING"] * 3)
    code, report = verify(pool, *known_lost(pool))
    assert (code, report["findings"]) == (0, [])


def known_lost(pool: RunningPool) -> list[str]:
    """Sign off the logs that other tests have lost."""
    return [option for lost in verify(pool)[1]["lost_logs"] for option in ("--known-lost", lost["log"])]


def test_the_others_outlive_the_directory_of_a_node(pool: RunningPool, fabric: Fabric) -> None:
    """A whole node is gone: the supervisor, the other two and the command for their status go on."""
    node = Path(pool.connection.partitions[DEAD].data_directory)
    aside = node.with_name("aside")
    agent = pool.connection.partitions[DEAD].process_ids["node_agent"]
    node.rename(aside)
    try:
        os.kill(agent, signal.SIGKILL)
        until(
            lambda: pool.connection.partitions[DEAD].process_ids["node_agent"] is None,
            60,
            "the agent's death",
        )
        with pool.client(partition=0) as client:
            writes(client, "without-a-node")
        shown = mhsm("status", "--data-dir", str(pool.directory), "--json", check=False)
        states = [row["state"] for row in json.loads(shown.stdout)["partitions"]]
        assert (states[:2], states[DEAD]) == (["SERVING"] * 2, "UNREACHABLE")
    finally:
        aside.rename(node)
    pool.await_states(["SERVING"] * 3)
    signs_everywhere(pool, "keys/without-a-node")


def mhsm_fabric_state(pool: RunningPool) -> str:
    return str(json.loads(mhsm_fabric(pool, "status", "--json").stdout)["work"]["state"])
