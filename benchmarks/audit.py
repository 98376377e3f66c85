"""What the audit log costs: appending with group sync, at full speed and at a steady rate, and verifying.

It is measured with the log's own classes on the file system of the temporary directory. What an
operation costs with its record is in the rates of the pool: there is no pool without a log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.summaries import percentile, summary
from hsm_pool.audit import files
from hsm_pool.audit.log import AuditLog
from hsm_pool.audit.record import Operation
from hsm_pool.audit.tree import Tree, leaf_hash

STEADY_RATE = 5_000
"""Operations a second at which the log must not be the bottleneck."""
_THREADS = (1, 4)
_TICK_SECONDS = 0.01
_IDENTITY = "spiffe://0123456789abcdef0123456789abcdef/client/application"


def _record(log: AuditLog, latencies: list[float]) -> None:
    """Make and append one record as the interceptor does."""
    operation = Operation("KeySign", _IDENTITY, "127.0.0.1", "/mhsm.crypto.v1.CryptoService/Sign", 0)
    operation.key_name, operation.key_version = "benchmark-p256", "0" * 32
    operation.algorithm, operation.items = "ES256", 1
    began = time.perf_counter()
    log.append(operation.record())
    latencies.append((time.perf_counter() - began) * 1e6)


def _full_speed(directory: Path, threads: int, seconds: float) -> dict[str, float]:
    def run(log: AuditLog, latencies: list[float]) -> None:
        end = time.monotonic() + seconds / threads
        while time.monotonic() < end:
            _record(log, latencies)

    return _measure(directory, threads, run)


def _steady(directory: Path, seconds: float) -> dict[str, float]:
    def run(log: AuditLog, latencies: list[float]) -> None:
        pause, next_at = threading.Event(), time.monotonic()
        end = next_at + seconds
        while next_at < end:
            for _ in range(int(STEADY_RATE * _TICK_SECONDS)):
                _record(log, latencies)
            next_at += _TICK_SECONDS
            pause.wait(max(0.0, next_at - time.monotonic()))

    return _measure(directory, 1, run)


def _measure(directory: Path, threads: int, run: Callable[[AuditLog, list[float]], None]) -> dict[str, float]:
    log = AuditLog(directory, "spiffe://0123456789abcdef0123456789abcdef/partition/0", 0)
    latencies: list[float] = []
    workers = [threading.Thread(target=run, args=(log, latencies)) for _ in range(threads)]
    began, used = time.monotonic(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    log.wait_synced(log.size, 30.0)
    elapsed, used = time.monotonic() - began, time.process_time() - used
    log.close()
    return {
        "records_per_second": len(latencies) / elapsed,
        "cpu_us_per_record": used / len(latencies) * 1e6,
        "p50_us": percentile(latencies, 0.5),
        "p99_us": percentile(latencies, 0.99),
        "bytes_per_record": sum(p.stat().st_size for p in files.listed(directory, files.RECORDS)) / log.size,
    }


def _hashing(directory: Path) -> float:
    """Return how many records a second are read and hashed, as a verification does."""
    tree, began = Tree(), time.monotonic()
    for path in files.listed(directory, files.RECORDS):
        for record in files.read_lines(path, skip_header=True):
            tree.append(leaf_hash(record))
    return tree.size / (time.monotonic() - began)


def measure(directory: Path, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Return what was measured, one entry a way of writing."""
    results: list[dict[str, Any]] = []
    hashed: list[float] = []
    ways: list[tuple[str, Callable[[Path], dict[str, float]]]] = [
        (f"append, {threads} thread{'s' if threads > 1 else ''}", _with(threads, seconds))
        for threads in _THREADS
    ]
    ways.append((f"append at {STEADY_RATE:,}/s", lambda place: _steady(place, seconds)))
    for number, (name, way) in enumerate(ways):
        places = [directory / f"{number}-{repeat}" for repeat in range(repeats)]
        measured = [way(place) for place in places]
        hashed += [_hashing(place) for place in places]
        results.append(
            {"how": name} | {key: summary([entry[key] for entry in measured]) for key in measured[0]}
        )
    results.append({"how": "read and hash (verify)", "records_per_second": summary(hashed)})
    return results


def _with(threads: int, seconds: float) -> Callable[[Path], dict[str, float]]:
    return lambda place: _full_speed(place, threads, seconds)
