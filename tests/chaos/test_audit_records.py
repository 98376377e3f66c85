"""G7: kill -9 of partitions at any point loses no record of an operation that was answered.

Every call has a key name of its own, so its record can be told from all others: creates,
which ride the chain, and refused reads, which are on record at the partition that refused.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
from collections import defaultdict
from typing import Any, Final

import pytest

from hsm_pool.audit import query
from hsm_pool.errors import KeyNotFound, MHSMError
from mhsm.keys.v1 import keys_pb2
from tests.chaos.faults import await_whole
from tests.running_pool import RunningPool, mhsm

pytestmark = [pytest.mark.chaos, pytest.mark.pool, pytest.mark.timeout(1200)]

KILLS: Final = 6
KILLS_FULL: Final = 40
WRITERS: Final = 3
CALL_SECONDS: Final = 4.0


class Load:
    """Calls pinned to partitions, each tried once. Owns and joins its threads."""

    def __init__(self, pool: RunningPool, seed: int) -> None:
        self.created: set[str] = set()
        self.refused: dict[int, set[str]] = defaultdict(set)
        self._pool, self._seed = pool, seed
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self, round_number: int) -> Any:
        """Let it run."""
        self._stop.clear()
        threads = [
            threading.Thread(target=self._run, args=(round_number, number)) for number in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def wait(self, seconds: float) -> None:
        """Let it run for a while."""
        self._stop.wait(seconds)

    def _run(self, round_number: int, number: int) -> None:
        draw = random.Random(self._seed * 1000 + round_number * 10 + number)
        clients = [self._pool.client(partition=index, timeout_seconds=CALL_SECONDS) for index in range(3)]
        count = 0
        while not self._stop.is_set():
            count += 1
            name, index = f"call-{round_number}-{number}-{count}", draw.randrange(3)
            try:
                if draw.random() < 0.3:
                    clients[index].create_key(name, key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256)
                    with self._lock:
                        self.created.add(name)
                else:
                    clients[index].get_key(f"keys/{name}")
            except KeyNotFound:
                with self._lock:
                    self.refused[index].add(name)
            except MHSMError:
                self._stop.wait(0.02)
        for client in clients:
            client.close()


def test_kill_9_loses_no_record_of_an_answered_operation(pool: RunningPool, seed: int, full: bool) -> None:
    load, draw = Load(pool, seed), random.Random(seed)
    for round_number in range(KILLS_FULL if full else KILLS):
        with load.running(round_number):
            load.wait(0.5 + draw.random())
            victim = draw.randrange(3)
            pool.signal(victim, draw.choice(["partition", "partition", "node_agent"]), signal.SIGKILL)
            load.wait(0.5 + draw.random())
        await_whole(pool)
    assert len(load.created) > 10
    assert sum(len(names) for names in load.refused.values()) > 50
    for index in range(3):
        directory = pool.directory / f"nodes/{index}/audit"
        found = [json.loads(record) for _, record in query.records_from(directory, 0)]
        names = {(record["operationName"], record["properties"].get("keyName")) for record in found}
        assert not {name for name in load.created if ("KeyCreate", name) not in names}
        assert not {name for name in load.refused[index] if ("KeyGet", name) not in names}
    assert mhsm("audit", "verify", "--data-dir", str(pool.directory), "--json").returncode == 0
