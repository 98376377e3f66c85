"""Ten times the load that a pool can sustain: what is still done, for whom, and in how much memory.

First the maximum is measured: a few callers that each wait for their answers. Then calls are offered at
a fixed rate whatever comes of them (open loop, one try each), most by a greedy principal, a few
by a modest one. A third client writes keys, both times. A call is a batch of RSA-4096 signatures, so
that offering ten times the load costs the clients, who share the machine, little beside serving it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from prometheus_client import CollectorRegistry

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.offered_load import ITEMS, KEY, Load, Outcome, offered
from benchmarks.summaries import percentile
from hsm_pool.core.roles import CRYPTO_USER
from hsm_pool.errors import MHSMError
from hsm_pool.net.admission import CallAdmission, CallKind
from hsm_pool.observability.metrics import CallMetrics
from hsm_pool.store.replica import boot_time
from mhsm.keys.v1 import keys_pb2

FACTOR = 10
"""Offered load over the maximum."""
MODEST_SHARE = 0.1
"""Of the maximum, offered by the modest principal."""
_CONCURRENCY = (4, 8)
"""Callers a partition with which the maximum is looked for."""
_SAMPLE_SECONDS = 0.5
_WRITE_PAUSE_SECONDS = 0.5
"""Between writes: they are there to be counted, not to be a load."""
_COST_CALLS = 20_000
_MEBIBYTE = 1024 * 1024


class _Beside(threading.Thread):
    """Writes keys, one after the other, and looks at the partitions' memory, until it is ended."""

    def __init__(self, pool: BenchmarkPool, names: str) -> None:
        super().__init__()
        self._pool, self._names, self._ended = pool, names, threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self.acknowledged: list[str] = []
        self.not_acknowledged = 0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Write until the end."""
        self._sampler.start()
        with self._pool.client() as client:
            number = 0
            while not self._ended.wait(_WRITE_PAUSE_SECONDS):
                number += 1
                try:
                    key = client.create_key(
                        f"{self._names}-{number}", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256
                    )
                except MHSMError:
                    self.not_acknowledged += 1
                else:
                    self.acknowledged.append(key.name)
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, *resident_bytes(self._pool))


def resident_bytes(pool: BenchmarkPool) -> list[int]:
    """Return the resident memory of each partition process."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = []
    for entry in pool.connection.partitions:
        statm = Path(f"/proc/{entry.process_ids['partition']}/statm").read_text()
        found.append(int(statm.split()[1]) * page)
    return found


def _maximum(pool: BenchmarkPool, seconds: float, say: Callable[[str], None]) -> tuple[float, float]:
    """Return the most calls a second that are done when each caller waits for his answers.

    Also the partitions' processor milliseconds a call then.
    """
    found: list[tuple[float, float]] = []
    for callers in _CONCURRENCY:
        cpu_before = pool.partition_cpu_seconds()
        with _Beside(pool, f"maximum-{callers}"):
            (outcome,) = offered(pool.directory, [Load("application", seconds, callers=callers)])
        cpu_seconds = pool.partition_cpu_seconds() - cpu_before
        rate = outcome.done / outcome.seconds
        say(f"{callers} callers a partition: {rate:,.1f} batches a second")
        found.append((rate, cpu_seconds * 1000 / max(1, outcome.done)))
    return max(found)


def _principal(outcome: Outcome) -> dict[str, Any]:
    latencies = outcome.latencies_ms
    return {
        "offered": outcome.offered,
        "not_offered": outcome.not_offered,
        "done": outcome.done,
        "refused": outcome.refused,
        "failed": outcome.failed,
        "late": outcome.late,
        "done_share": round((outcome.done + outcome.late) / max(1, outcome.offered), 4),
        "p50_ms": round(percentile(latencies, 0.5), 1) if latencies else None,
        "p99_ms": round(percentile(latencies, 0.99), 1) if latencies else None,
    }


def overload(pool: BenchmarkPool, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the maximum, then offer ten times as much for some seconds."""
    with pool.client() as client:
        client.create_key(KEY, key_type=keys_pb2.KEY_TYPE_RSA, size_bits=4096)
    with pool.client("administrator") as client:
        # He is the modest principal: another one than the application, with the same right.
        client.create_role_assignment("client/administrator", CRYPTO_USER.role_definition_id)
    maximum, cpu_ms_at_maximum = _maximum(pool, max(3.0, seconds / 6), say)
    before = resident_bytes(pool)
    incarnations = [pool.connection.partitions[index].process_ids for index in range(PARTITIONS)]
    say(f"{FACTOR} times {maximum:,.1f} batches a second for {seconds:.0f} s")
    greedy = Load("application", seconds, calls_per_second=(FACTOR - MODEST_SHARE) * maximum)
    modest = Load("administrator", seconds, calls_per_second=MODEST_SHARE * maximum)
    cpu_before = pool.partition_cpu_seconds()
    with _Beside(pool, "overload") as beside:
        outcomes = offered(pool.directory, [greedy, modest])
    cpu_seconds = pool.partition_cpu_seconds() - cpu_before
    done = sum(outcome.done + outcome.late for outcome in outcomes)
    cpu_ms_overloaded = cpu_seconds * 1000 / max(1, done)
    goodput = sum(outcome.done / outcome.seconds for outcome in outcomes)
    pool.await_whole()
    lost = _lost(pool, beside.acknowledged)
    retry = [value for outcome in outcomes for value in outcome.retry_ms]
    return {
        "seconds": seconds,
        "items_per_call": ITEMS,
        "maximum_calls_per_second": round(maximum, 1),
        "offered_calls_per_second": round(sum(outcome.offered / outcome.seconds for outcome in outcomes), 1),
        "goodput_calls_per_second": round(goodput, 1),
        "goodput_ratio": round(goodput / maximum, 3),
        # As far as the pool itself goes: its clients share the machine, and take more of it then.
        "goodput_ratio_for_the_same_processor_time": round(cpu_ms_at_maximum / cpu_ms_overloaded, 3),
        "cpu_ms_per_done_call": {
            "at_maximum": round(cpu_ms_at_maximum, 1),
            "overloaded": round(cpu_ms_overloaded, 1),
        },
        "clients_cpu_us_per_offered_call": round(
            sum(outcome.cpu_seconds for outcome in outcomes)
            * 1e6
            / max(1, sum(outcome.offered for outcome in outcomes))
        ),
        "greedy": _principal(outcomes[0]),
        "modest": _principal(outcomes[1]),
        "retry_delay_ms": {"p50": round(percentile(retry, 0.5)), "maximum": round(max(retry))}
        if retry
        else None,
        "writes": {
            "acknowledged": len(beside.acknowledged),
            "not_acknowledged": beside.not_acknowledged,
            "lost": lost,
        },
        "resident_mebibytes": {
            "before": round(max(before) / _MEBIBYTE, 1),
            "peak": round(beside.peak_bytes / _MEBIBYTE, 1),
            "after": round(max(resident_bytes(pool)) / _MEBIBYTE, 1),
        },
        "cost_us_per_call": _cost_us(),
        "processes_replaced": sum(
            pool.connection.partitions[index].process_ids != incarnations[index]
            for index in range(PARTITIONS)
        ),
    }


def _cost_us() -> dict[str, float]:
    """Return the processor microseconds that admission and metrics add to a call, on a free place."""
    admission, metrics = CallAdmission(), CallMetrics(CollectorRegistry())

    def admit() -> None:
        with admission.call("client/application", CallKind.OPERATION, boot_time() + 1):
            pass

    def measure() -> None:
        metrics.observe("/mhsm.crypto.v1.CryptoService/Sign", "OK", 0.001)

    found = {}
    for name, work in (("admission", admit), ("metrics", measure)):
        began = time.thread_time()
        for _ in range(_COST_CALLS):
            work()
        found[name] = round((time.thread_time() - began) / _COST_CALLS * 1e6, 2)
    return found


def _lost(pool: BenchmarkPool, names: list[str]) -> int:
    """Return how many acknowledged keys some partition does not have."""
    lost: set[str] = set()
    for index in range(PARTITIONS):
        with pool.client(partition=index, timeout_seconds=30.0) as client:
            for name in names:
                try:
                    client.get_key(name)
                except MHSMError:
                    lost.add(name)
    return len(lost)
