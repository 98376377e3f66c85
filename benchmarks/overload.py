"""Ten times the load that a pool can sustain: what is still done, for whom, and in how much memory.

First the maximum is measured: a few callers that each wait for their answers. Then calls are offered at
a fixed rate whatever comes of them (open loop, one try each), most by a greedy principal, a few
by a modest one, while a third client writes keys. A call is a batch of RSA-4096 signatures, so
that offering ten times the load costs the clients, who share the machine, little beside serving it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.summaries import percentile
from hsm_pool.client import calls
from hsm_pool.client.channels import open_channels
from hsm_pool.client.connection import load_connection
from hsm_pool.client.errors import from_rpc
from hsm_pool.core.roles import CRYPTO_USER
from hsm_pool.errors import MHSMError, Overloaded
from hsm_pool.net.admission import CallAdmission, CallKind
from hsm_pool.observability.metrics import CallMetrics
from hsm_pool.store.replica import boot_time
from mhsm.crypto.v1 import crypto_pb2
from mhsm.keys.v1 import keys_pb2

FACTOR = 10
"""Offered load over the maximum."""
MODEST_SHARE = 0.1
"""Of the maximum, offered by the modest principal."""
ITEMS = 32
_KEY = "benchmark-rsa-4096"
_CONCURRENCY = (4, 8)
"""Callers a partition with which the maximum is looked for."""
_GREEDY_PROCESSES = 1
_CALL_SECONDS = 5.0
_OUTSTANDING_MAX = 4_000
"""Calls of one process that wait for their answers; more are not offered, and counted."""
_REFUSALS_PER_LOOK = 50
"""Of the delays that refusals ask for, one in so many is read."""
_SAMPLE_SECONDS = 0.5
_WRITE_PAUSE_SECONDS = 0.5
"""Between writes: they are there to be counted, not to be a load."""
_COST_CALLS = 20_000
_MEBIBYTE = 1024 * 1024


@dataclass(slots=True)
class Outcome:
    """What one process offered and got."""

    offered: int = 0
    not_offered: int = 0
    done: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    """Done after the measured time."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    retry_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Load:
    """What one process does: callers that wait for their answers, or a fixed rate of calls."""

    client: str
    seconds: float
    callers: int = 0
    calls_per_second: float = 0.0


class _Signer:
    """Sends the same request again and again, with no more work than gRPC itself makes: it is only load."""

    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        call = calls.sign_batch(f"keys/{_KEY}", "RS256", [os.urandom(32) for _ in range(ITEMS)])
        self._octets = call.request.SerializeToString()
        service = crypto_pb2.DESCRIPTOR.services_by_name["CryptoService"].full_name
        self._methods: list[Any] = [channel.unary_unary(f"/{service}/{call.method}") for channel in channels]

    async def sign(self, number: int, outcome: Outcome) -> None:
        """Send it once, and note the outcome."""
        began = time.monotonic()
        outcome.offered += 1
        call = self._methods[number % PARTITIONS](self._octets, timeout=_CALL_SECONDS)
        code = await call.code()  # which makes no exception of a refusal
        if code is grpc.StatusCode.OK:
            outcome.done += 1
            outcome.latencies_ms.append((time.monotonic() - began) * 1000)
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            outcome.refused += 1
            if outcome.refused % _REFUSALS_PER_LOOK == 1:
                await self._look(call, outcome)
        else:
            outcome.failed += 1

    async def _look(self, call: Any, outcome: Outcome) -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            refused = from_rpc(error)
            assert isinstance(refused, Overloaded), refused
            outcome.retry_ms.append(refused.retry_seconds * 1000)


async def _closed(signer: _Signer, load: Load, outcome: Outcome) -> None:
    end = time.monotonic() + load.seconds

    async def caller(number: int) -> None:
        while time.monotonic() < end:
            await signer.sign(number, outcome)

    await asyncio.gather(*(caller(number) for number in range(load.callers * PARTITIONS)))


async def _open(signer: _Signer, load: Load, outcome: Outcome) -> None:
    began = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    number = 0
    while (now := time.monotonic()) < began + load.seconds:
        due = int((now - began) * load.calls_per_second)
        while number < due:
            number += 1
            if len(tasks) >= _OUTSTANDING_MAX:
                outcome.not_offered += 1
                continue
            task = asyncio.create_task(signer.sign(number, outcome))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(min(0.02, 1 / load.calls_per_second))
    done_in_time, outcome.seconds = outcome.done, time.monotonic() - began
    if tasks:
        await asyncio.wait(tasks)
    outcome.late, outcome.done = outcome.done - done_in_time, done_in_time


async def _offer(directory: Path, load: Load) -> Outcome:
    outcome = Outcome()
    channels = open_channels(load_connection(directory), load.client, None, grpc.aio.secure_channel)
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        began, cpu_began = time.monotonic(), time.process_time()
        await (_closed if load.callers else _open)(_Signer(channels), load, outcome)
        outcome.seconds = outcome.seconds or time.monotonic() - began
        outcome.cpu_seconds = time.process_time() - cpu_began
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    return outcome


def _process(pipe: Pipe, directory: Path, load: Load) -> None:
    pipe.send("ready")
    pipe.recv()
    pipe.send(asyncio.run(_offer(directory, load)))


def _offered(pool: BenchmarkPool, loads: list[Load]) -> list[Outcome]:
    """Let processes of their own offer loads at the same time."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Pipe] = []
    processes: list[BaseProcess] = []
    for load in loads:
        own, other = context.Pipe()
        process = context.Process(target=_process, args=(other, pool.directory, load), daemon=True)
        process.start()
        other.close()
        pipes.append(own)
        processes.append(process)
    try:
        for pipe in pipes:
            _received(pipe, 60.0)
        for pipe in pipes:
            pipe.send("go")
        return [_received(pipe, load.seconds + 60.0) for pipe, load in zip(pipes, loads, strict=True)]
    finally:
        for started in processes:
            started.join(10.0)
            if started.is_alive():
                started.terminate()


def _received(pipe: Pipe, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise RuntimeError("a client process did not answer")
    return pipe.recv()


class _Beside(threading.Thread):
    """Writes keys, one after the other, and looks at the partitions' memory, until it is ended."""

    def __init__(self, pool: BenchmarkPool) -> None:
        super().__init__()
        self._pool, self._ended = pool, threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self.acknowledged: list[str] = []
        self.not_acknowledged = 0
        self.peak_bytes = 0

    def run(self) -> None:
        """Write until :meth:`end`."""
        self._sampler.start()
        with self._pool.client() as client:
            number = 0
            while not self._ended.wait(_WRITE_PAUSE_SECONDS):
                number += 1
                try:
                    key = client.create_key(
                        f"overload-{number}", key_type=keys_pb2.KEY_TYPE_EC, curve=keys_pb2.CURVE_P256
                    )
                except MHSMError:
                    self.not_acknowledged += 1
                else:
                    self.acknowledged.append(key.name)
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, *resident_bytes(self._pool))

    def end(self) -> None:
        """Stop and wait."""
        self._ended.set()
        self.join()


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
        (outcome,) = _offered(pool, [Load("application", seconds, callers=callers)])
        cpu_seconds = pool.partition_cpu_seconds() - cpu_before
        rate = outcome.done / outcome.seconds
        say(f"{callers} callers a partition: {rate:,.1f} batches a second")
        found.append((rate, cpu_seconds * 1000 / max(1, outcome.done)))
    return max(found)


def _principal(outcomes: list[Outcome]) -> dict[str, Any]:
    latencies = [value for outcome in outcomes for value in outcome.latencies_ms]
    offered = sum(outcome.offered for outcome in outcomes)
    done = sum(outcome.done for outcome in outcomes)
    return {
        "offered": offered,
        "not_offered": sum(outcome.not_offered for outcome in outcomes),
        "done": done,
        "refused": sum(outcome.refused for outcome in outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "late": sum(outcome.late for outcome in outcomes),
        "done_share": round((done + sum(outcome.late for outcome in outcomes)) / max(1, offered), 4),
        "p50_ms": round(percentile(latencies, 0.5), 1) if latencies else None,
        "p99_ms": round(percentile(latencies, 0.99), 1) if latencies else None,
    }


def overload(pool: BenchmarkPool, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the maximum, then offer ten times as much for some seconds."""
    with pool.client() as client:
        client.create_key(_KEY, key_type=keys_pb2.KEY_TYPE_RSA, size_bits=4096)
    with pool.client("administrator") as client:
        # He is the modest principal: another one than the application, with the same right.
        client.create_role_assignment("client/administrator", CRYPTO_USER.role_definition_id)
    maximum, cpu_ms_at_maximum = _maximum(pool, max(3.0, seconds / 6), say)
    before = resident_bytes(pool)
    incarnations = [pool.connection.partitions[index].process_ids for index in range(PARTITIONS)]
    say(f"{FACTOR} times {maximum:,.1f} batches a second for {seconds:.0f} s")
    beside, cpu_before = _Beside(pool), pool.partition_cpu_seconds()
    beside.start()
    try:
        greedy = Load(
            "application", seconds, calls_per_second=(FACTOR - MODEST_SHARE) * maximum / _GREEDY_PROCESSES
        )
        modest = Load("administrator", seconds, calls_per_second=MODEST_SHARE * maximum)
        *greedy_outcomes, modest_outcome = _offered(pool, [*[greedy] * _GREEDY_PROCESSES, modest])
    finally:
        beside.end()
    outcomes = [*greedy_outcomes, modest_outcome]
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
        "greedy": _principal(greedy_outcomes),
        "modest": _principal([modest_outcome]),
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
