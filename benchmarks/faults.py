"""What clients notice of kills: the longest time without success, and how long healing takes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.summaries import summary
from hsm_pool.client.pool import Pool
from hsm_pool.errors import MHSMError

LOAD_SECONDS = 0.5
"""How long there is load before a fault, and after it."""

_SIGNERS = 2


class _Gap:
    """The longest time between two successes since :meth:`mark`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._longest = 0.0

    def mark(self) -> None:
        with self._lock:
            self._longest, self._last = 0.0, time.monotonic()

    def success(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._longest = max(self._longest, now - self._last)
            self._last = now

    def longest_ms(self) -> float:
        with self._lock:
            return max(self._longest, time.monotonic() - self._last) * 1000


class Load:
    """Two signers and one writer that use the pool without pause; their errors are the gaps."""

    def __init__(self, pool: BenchmarkPool) -> None:
        self.signatures, self.writes = _Gap(), _Gap()
        self._stop = threading.Event()
        self._digest = hashlib.sha256(b"to be signed").digest()
        self._pool = pool
        self._threads = [
            threading.Thread(target=self._run, args=(self._sign, self.signatures)) for _ in range(_SIGNERS)
        ]
        self._threads.append(threading.Thread(target=self._run, args=(self._write, self.writes)))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> None:
        """Let the load go on for some seconds."""
        self._stop.wait(seconds)

    def _run(self, attempt: Callable[[Pool, int], None], gap: _Gap) -> None:
        with self._pool.client() as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                try:
                    attempt(client, number)
                except MHSMError:
                    continue
                gap.success()

    def _sign(self, client: Pool, _number: int) -> None:
        client.sign("keys/benchmark-p256", "ES256", self._digest)

    def _write(self, client: Pool, number: int) -> None:
        client.update_key("keys/benchmark-aes-256", tags={"number": str(number)})


def _heal_seconds(pool: BenchmarkPool, index: int, kill: Callable[[], None]) -> float:
    """Kill and return the seconds until the partition is back: a new incarnation that holds a lease."""
    status = pool.status(index)
    incarnation = status.incarnation if status else 0
    began = time.monotonic()
    kill()

    def healed() -> bool:
        now = pool.status(index)
        return bool(now and now.incarnation > incarnation and now.fresh)

    pool.wait_for(healed, f"healed partition {index}")
    return time.monotonic() - began


def kill_follower_node(pool: BenchmarkPool, repeats: int) -> dict[str, Any]:
    """Kill a partition together with its store member, one that does not lead."""
    writes: list[float] = []
    signatures: list[float] = []
    heals: list[float] = []
    for repeat in range(repeats):
        followers = [index for index in range(PARTITIONS) if index != pool.await_leader()]
        victim = followers[repeat % len(followers)]
        with Load(pool) as load:
            load.wait(LOAD_SECONDS)
            load.writes.mark()
            load.signatures.mark()
            heals.append(
                _heal_seconds(pool, victim, lambda v=victim: pool.kill(v, "store_member", "partition"))  # type: ignore[misc]
            )
            load.wait(LOAD_SECONDS)
            writes.append(load.writes.longest_ms())
            signatures.append(load.signatures.longest_ms())
        pool.await_whole()
    return {
        "fault": "kill -9 of a partition and its store member (a follower)",
        "write_gap_ms": summary(writes),
        "crypto_gap_ms": summary(signatures),
        "heal_ms": summary([seconds * 1000 for seconds in heals]),
    }


def kill_store_leader(pool: BenchmarkPool, repeats: int) -> dict[str, Any]:
    """Kill the store member that leads; its partition goes on."""
    writes: list[float] = []
    signatures: list[float] = []
    for _ in range(repeats):
        leader = pool.await_leader()
        with Load(pool) as load:
            load.wait(LOAD_SECONDS)
            load.writes.mark()
            load.signatures.mark()
            pool.kill(leader, "store_member")
            pool.await_whole()
            load.wait(LOAD_SECONDS)
            writes.append(load.writes.longest_ms())
            signatures.append(load.signatures.longest_ms())
    return {
        "fault": "kill -9 of the store member that leads",
        "write_gap_ms": summary(writes),
        "crypto_gap_ms": summary(signatures),
    }


def kill_partition(pool: BenchmarkPool, repeats: int) -> dict[str, Any]:
    """Kill one partition process without load; its store member goes on."""
    heals: list[float] = []
    for repeat in range(repeats):
        index = repeat % PARTITIONS
        heals.append(_heal_seconds(pool, index, lambda i=index: pool.kill(i, "partition")))  # type: ignore[misc]
        pool.await_whole()
    return {
        "fault": "kill -9 of a partition, without load",
        "heal_ms": summary([seconds * 1000 for seconds in heals]),
    }


def unlock(pool: BenchmarkPool, repeats: int) -> dict[str, Any]:
    """Kill all partitions, then unlock the pool by two officers."""
    firsts: list[float] = []
    alls: list[float] = []
    for _ in range(repeats):
        pool.lock()
        first, everything = pool.unlock()
        firsts.append(first * 1000)
        alls.append(everything * 1000)
        pool.await_whole()
    return {
        "fault": "kill -9 of all partitions, then a quorum unlocks",
        "first_partition_serves_ms": summary(firsts),
        "all_partitions_serve_ms": summary(alls),
    }
