"""G1: what comes due is done exactly once, however often the housekeeping role fails over in the middle.

Each round makes keys that are to be rotated and deleted keys that are to be purged, moves the clocks of
the whole pool on by 29 days, and takes the role from its holder: by kill -9 of the partition or of
its whole node, by the controller's command, or by stopping it until another one holds the role and letting
it go on. Meanwhile somebody recovers one of the deleted keys. Dates come due because the clocks are
moved; shipped code has no switch for it.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import grpc
import pytest

from hsm_pool.audit import query
from hsm_pool.client.pool import Pool
from hsm_pool.errors import DeletedKeyNotFound, KeyNotFound, MHSMError
from mhsm.keys.v1 import keys_pb2
from tests.chaos.faults import await_whole, replay_command
from tests.fabric_access import Fabric
from tests.moved_clock import MovedClock, moved_clock
from tests.running_pool import RunningPool, TestOfficer, until

pytestmark = [pytest.mark.chaos, pytest.mark.pool, pytest.mark.timeout(3600)]

Kind = Literal["partition", "node_agent", "relinquish", "pause"]
KINDS: Final[tuple[Kind, ...]] = ("partition", "node_agent", "relinquish", "pause")

FAILOVERS: Final = 10
FAILOVERS_FULL: Final = 200
KEYS: Final = 5
DAY_MS: Final = 24 * 3600 * 1000
EC: Final[dict[str, Any]] = {"key_type": keys_pb2.KEY_TYPE_EC, "curve": keys_pb2.CURVE_P256}
OCT: Final[dict[str, Any]] = {"key_type": keys_pb2.KEY_TYPE_OCT, "size_bits": 256}


@dataclass(slots=True)
class Told:
    """What the rounds add up to."""

    rotated: list[str] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    in_the_middle: int = 0
    """Failovers that came when a part of the work was done and another was not."""


@pytest.fixture
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MovedClock]:
    with moved_clock(tmp_path_factory.mktemp("clock") / "moved") as moved:
        yield moved


def holder(fabric: Fabric) -> int | None:
    """Return the partition that says it holds the housekeeping role, None while not exactly one does."""
    found = []
    for index in range(3):
        try:
            found += [index] if fabric.status(index).housekeeper else []
        except grpc.RpcError:
            continue
    return found[0] if len(found) == 1 else None


class Round:
    """One failover with due work."""

    def __init__(self, pool: RunningPool, fabric: Fabric, client: Pool, told: Told, number: int) -> None:
        self._pool, self._fabric, self._client, self._told = pool, fabric, client, told
        self._turning = [f"turning-{number}-{key}" for key in range(KEYS)]
        self._ending = [f"ending-{number}-{key}" for key in range(KEYS)]
        self._rescued = f"rescued-{number}"

    def make(self) -> None:
        """Make the keys of this round; nothing of them is due."""
        for key, key_id in enumerate(self._turning):
            self._client.create_key(key_id, **(OCT if key % 2 else EC))
            self._client.update_key_rotation_policy(f"keys/{key_id}", time_after_create="P28D")
        for key_id in (*self._ending, self._rescued):
            self._client.create_key(key_id, **OCT)
            self._client.delete_key(f"keys/{key_id}")

    def left(self) -> int:
        """Return how much of the work is not done."""
        deleted = {entry.key.name.split("/")[1] for entry in self._client.list_deleted_keys(25)}
        newest = {key_id: self._count(key_id) for key_id in self._turning}
        return len(deleted & set(self._ending)) + sum(count < 2 for count in newest.values())

    def fail_over(self, kind: Kind, draw: random.Random) -> None:
        """Take the role from its holder, at once or when the work has begun."""
        until(lambda: holder(self._fabric) is not None, 30, "a holder")
        victim = holder(self._fabric) or 0
        if draw.random() < 0.7:
            until(lambda: self.left() < 2 * KEYS, 60, "the work has begun")
        else:
            threading.Event().wait(draw.random())  # any moment will do: nothing is waited for
        self._told.in_the_middle += 0 < self.left() < 2 * KEYS
        self._told.kinds[kind] += 1
        match kind:
            case "relinquish":
                until(lambda: self._relinquished(victim), 30, "the role is given up")
            case "pause":
                with self._pool.paused(victim, "partition"):
                    self._recover()
                    until(lambda: holder(self._fabric) not in {None, victim}, 30, "another holder")
            case _:
                self._pool.signal(victim, kind, signal.SIGKILL)
        if kind != "pause":
            self._recover()

    def _relinquished(self, victim: int) -> bool:
        """Tell the holder to give the role up; until a majority's clocks are moved, it is of the future."""
        answer = self._fabric.send("Relinquish", victim)
        assert answer in {"OK", "ABORTED"}
        return answer == "OK"

    def _recover(self) -> None:
        """Recover a deleted key; it is purged, or it stays for ever."""
        request_id = str(uuid.uuid4())

        def answered() -> list[str] | None:
            try:
                self._client.recover_deleted_key(f"keys/{self._rescued}", request_id)
            except DeletedKeyNotFound:
                return self._told.purged
            except MHSMError as error:
                if error.definite:
                    raise
                return None  # sent to the partition that was killed: repeated until it is known
            return self._told.recovered

        def appended() -> bool:
            told = answered()
            if told is not None:
                told.append(self._rescued)
            return told is not None

        until(appended, 60, "the outcome of a recovery")

    def finish(self) -> None:
        """Wait until all is done, and take the policies away: what was rotated is not due again."""
        until(lambda: self.left() == 0, 120, lambda: f"{self.left()} left to be done")
        for key_id in self._turning:
            self._client.update_key_rotation_policy(f"keys/{key_id}")
        self._told.rotated += self._turning
        self._told.purged += self._ending

    def _count(self, key_id: str) -> int:
        return len(list(self._client.list_key_versions(f"keys/{key_id}", 25)))


def wrong(pool: RunningPool, told: Told) -> list[str]:
    """Ask every partition by itself, and its audit log, what happened to each key."""
    found = []
    for index in range(3):
        done: Counter[tuple[str, str]] = Counter()
        for _, line in query.records_from(pool.directory / f"nodes/{index}/audit", 0):
            record = json.loads(line)
            if record["resultType"] == "Success":
                done[record["operationName"], record["properties"].get("keyName", "")] += 1
        with pool.client(partition=index, timeout_seconds=20) as one:
            for key_id in (*told.rotated, *told.recovered):
                wanted = 2 if key_id in told.rotated else 1
                count = len(list(one.list_key_versions(f"keys/{key_id}", 25)))
                found += [f"partition {index}: {key_id} has {count} versions"] * (count != wanted)
            for key_id in told.purged:
                try:
                    one.get_key(f"keys/{key_id}")
                    found.append(f"partition {index}: {key_id} exists")
                except KeyNotFound:
                    pass
        wanted_records = Counter({("KeyRotateIfDue", key_id): 1 for key_id in told.rotated})
        wanted_records.update({("KeyPurge", key_id): 1 for key_id in told.purged})
        own = {entry: count for entry, count in done.items() if entry[0] in {"KeyRotateIfDue", "KeyPurge"}}
        found += [
            f"partition {index}: {name} of {key_id} is on record {own.get((name, key_id), 0)} times"
            for name, key_id in own.keys() | wanted_records.keys()
            if own.get((name, key_id), 0) != wanted_records[name, key_id]
        ]
    return found


def test_what_is_due_is_done_exactly_once_over_failovers(
    make_pool: Callable[..., RunningPool],
    officers: list[TestOfficer],
    clock: MovedClock,
    full: bool,
    seed: int,
    request: pytest.FixtureRequest,
) -> None:
    """10 failovers of the housekeeping role (200 with --full), most in the middle of its work."""
    draw = random.Random(seed)
    pool = make_pool(attended=True, options=("--recoverable-days", "7"))
    pool.activate(officers, 2)
    fabric, told = Fabric(pool), Told()
    count = FAILOVERS_FULL if full else FAILOVERS
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    try:
        with pool.client(timeout_seconds=60) as client:
            for number, kind in enumerate(kinds):
                entry = Round(pool, fabric, client, told, number)
                entry.make()
                fabric.ahead_ms += 29 * DAY_MS
                clock.move(fabric.ahead_ms)
                entry.fail_over(kind, draw)
                entry.finish()
                await_whole(pool)
                pool.await_states(["SERVING"] * 3)
        assert not (differences := wrong(pool, told)), "\n".join([*differences[:20], replay_command(request)])
    finally:
        fabric.close()
        pool.down()
    print(f"failovers: {dict(told.kinds)}, {told.in_the_middle} in the middle of the work")
    print(f"rotated {len(told.rotated)}, purged {len(told.purged)}, recovered {len(told.recovered)}")
    assert told.in_the_middle, "no failover came in the middle: the test would say little"
