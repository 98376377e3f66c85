"""G5: the controller at work on a real pool, killed and disturbed at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm_pool.errors import MHSMError
from mhsm.keys.v1 import keys_pb2
from tests.fabric_access import DRAINED, Fabric, FloorWatcher, history, mhsm_fabric
from tests.running_pool import RunningPool, mhsm, until

pytestmark = pytest.mark.pool


@pytest.fixture
def fabric(pool: RunningPool) -> Iterator[Fabric]:
    pool.await_states(["SERVING"] * 3)
    made = Fabric(pool)
    yield made
    mhsm_fabric(pool, "halt")
    for index in range(3):
        if made.state(index) == DRAINED:
            made.resume(index)
    made.close()
    pool.await_states(["SERVING"] * 3)


def incarnations(pool: RunningPool) -> list[int]:
    return [pool.status(index).incarnation for index in range(3)]


def work_state(pool: RunningPool) -> str:
    looked = mhsm_fabric(pool, "status", "--json")
    return str(json.loads(looked.stdout)["work"]["state"])


def test_a_rolling_restart_under_load_restarts_each_once(pool: RunningPool, fabric: Fabric) -> None:
    """Clients notice nothing; drain, restart, resume, one partition after the other; the journal says so."""
    with pool.client() as client:
        client.create_key("rolling", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        with pool.client() as client:
            while not stop.is_set():
                try:
                    client.sign("keys/rolling", "ES256", bytes(32))
                except MHSMError as error:
                    failed.append(error)
                    return

    before, told = incarnations(pool), len(history(pool))
    worker, watcher = threading.Thread(target=work), FloorWatcher(fabric)
    worker.start()
    try:
        planned = mhsm_fabric(pool, "restart", "--all", "--dry-run", "--json")
        steps = [f"{verb} {index}" for index in range(3) for verb in ("drain", "restart", "resume")]
        assert json.loads(planned.stdout)["steps"] == steps
        assert incarnations(pool) == before, "a dry run does nothing"
        completed = mhsm_fabric(pool, "restart", "--all")
    finally:
        stop.set()
        worker.join()
        watcher.close()
    assert completed.returncode == 0, completed.stderr
    assert not failed
    assert incarnations(pool) == [number + 1 for number in before]
    assert watcher.fewest == 2
    assert watcher.looks > 10
    entries = history(pool)[told:]
    sent = [f"{e['verb'].lower()} {e['partition']}" for e in entries if e["kind"] == "command"]
    assert list(dict.fromkeys(sent)) == steps
    assert [entry["kind"] for entry in (entries[0], entries[-1])] == ["goal", "done"]


def test_g5_the_controller_is_killed_at_random_points_of_roll_outs(
    pool: RunningPool, fabric: Fabric, request: pytest.FixtureRequest, seed: int
) -> None:
    """It goes on where it was, never takes a second partition out and never uses a counter twice."""
    kills = 20 if request.config.getoption("--full") else 4
    generator = random.Random(seed)
    pause = threading.Event()
    watcher = FloorWatcher(fabric)
    before = incarnations(pool)
    try:
        killed = 0
        while killed < kills:
            begun = mhsm_fabric(pool, "restart", "--all", "--no-wait")
            assert begun.returncode == 0, begun.stderr
            while killed < kills and work_state(pool) == "running":
                pause.wait(generator.uniform(0, 2.0))
                process_id = pool.connection.fabric_controller["process_id"]
                if process_id:
                    os.kill(process_id, signal.SIGKILL)
                    killed += 1
                    until(
                        lambda old=process_id: (  # type: ignore[misc]
                            pool.connection.fabric_controller["process_id"] not in {None, old}
                        ),
                        30,
                        "the controller is started again",
                    )
            until(lambda: work_state(pool) != "running", 120, "the roll-out ends")
            assert work_state(pool) == "idle"
    finally:
        watcher.close()
    assert watcher.fewest == 2
    assert all(after > old for after, old in zip(incarnations(pool), before, strict=True))
    counters = [entry["counter"] for entry in history(pool) if entry["kind"] == "command"]
    assert counters == sorted(set(counters))
    pool.await_states(["SERVING"] * 3)


@pytest.mark.parametrize("moment", ["draining", "drained"])
def test_g5_a_partition_is_killed_while_another_one_goes_out(
    pool: RunningPool, fabric: Fabric, moment: str
) -> None:
    """The roll-out waits, puts back what it took out if needed, and ends; nothing is taken out meanwhile."""
    journal = pool.directory / "fabric" / "journal"
    written = journal.stat().st_size
    begun = mhsm_fabric(pool, "restart", "0", "1", "--no-wait")
    assert begun.returncode == 0, begun.stderr

    if moment == "drained":
        until(lambda: DRAINED in [fabric.state(index) for index in range(2)], 30, "one is out")
    else:
        deadline = time.monotonic() + 60
        # The command is written down before it is sent. Without a pause: a drain takes milliseconds.
        while b'"verb":"DRAIN"' not in journal.read_bytes()[written:]:
            assert time.monotonic() < deadline
    # Its store member, too, so that it stays away for longer than a moment.
    pool.signal(2, "store_member", signal.SIGKILL)
    pool.signal(2, "partition", signal.SIGKILL)
    until(lambda: work_state(pool) != "running", 120, "the roll-out ends")
    assert work_state(pool) == "idle"
    pool.await_states(["SERVING"] * 3)


def test_the_work_is_halted_and_goes_on(pool: RunningPool, fabric: Fabric) -> None:
    before = incarnations(pool)
    assert mhsm_fabric(pool, "halt").returncode == 1, "there is nothing to halt"
    assert mhsm_fabric(pool, "resume").returncode == 1
    with pool.paused(2, "partition"):
        # One of three is silent: nothing may be taken out, so this waits.
        assert mhsm_fabric(pool, "restart", "0", "--no-wait").returncode == 0
        for option in ("--no-wait", "--dry-run"):
            assert mhsm_fabric(pool, "restart", "1", option).returncode == 1, "one goal at a time"
        silent = [
            mhsm_fabric(pool, verb, "2", "--dry-run").returncode for verb in ("drain", "resume", "restart")
        ]
        assert silent == [5, 5, 5], "as the commands would end"
        until(lambda: "partition 2 is UNREACHABLE" in mhsm_fabric(pool, "status").stdout, 30, "it says why")
        assert mhsm_fabric(pool, "halt", "--dry-run").returncode == 0
        assert work_state(pool) == "running"
        assert mhsm_fabric(pool, "halt").returncode == 0
        assert work_state(pool) == "halted"
    pool.await_states(["SERVING"] * 3)
    assert incarnations(pool) == before
    assert mhsm_fabric(pool, "resume").returncode == 0
    until(lambda: work_state(pool) == "idle", 60, "it goes on to the end")
    assert incarnations(pool) == [before[0] + 1, *before[1:]]


def test_a_controller_that_hangs_is_seen_from_the_pool(pool: RunningPool) -> None:
    controller = pool.connection.fabric_controller
    os.kill(controller["process_id"], signal.SIGSTOP)
    try:
        long_ago = time.time() - 60
        os.utime(Path(controller["data_directory"]) / "status.json", (long_ago, long_ago))
        place = ("--data-dir", str(pool.directory))
        said = json.loads(mhsm("status", "--json", *place).stdout)["fabric_controller"]
        assert said["silent_seconds"] >= 60
        assert "it does not run, or hangs" in mhsm("status", *place).stdout
    finally:
        os.kill(controller["process_id"], signal.SIGCONT)


def test_failover_names_the_new_holder(pool: RunningPool, fabric: Fabric) -> None:
    planned = json.loads(mhsm_fabric(pool, "failover", "--dry-run", "--json").stdout)
    done = json.loads(mhsm_fabric(pool, "failover", "--json").stdout)
    assert done["from"] == planned["holder"]
    assert done["to"] != done["from"]
    assert fabric.status(done["to"]).housekeeper


def test_dry_runs_say_what_would_be_refused(pool: RunningPool, fabric: Fabric) -> None:
    assert mhsm_fabric(pool, "drain", "0", "--dry-run").returncode == 0
    assert fabric.state(0) != DRAINED
    drained = mhsm_fabric(pool, "drain", "1", "--json")
    assert json.loads(drained.stdout) == {"partition": 1, "state": "DRAINED"}
    refused = mhsm_fabric(pool, "drain", "0", "--dry-run")
    assert refused.returncode == 1
    assert "next: " in refused.stderr
    assert mhsm_fabric(pool, "resume", "1", "--dry-run").returncode == 0
    assert fabric.state(1) == DRAINED
    assert mhsm_fabric(pool, "resume", "1").returncode == 0
