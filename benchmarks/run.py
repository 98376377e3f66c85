"""Measure a real pool: ``python -m benchmarks.run [PART] [--json] [--quick] [--seconds N] [--output FILE]``.

With ``audit`` only the audit log is measured, without a pool; with ``failover`` only lost
machines (``--full``: 50), with ``patch`` only rolling patches, with ``overload`` only ten times the
load that the pool can sustain, for a minute.

Every figure stands beside a peer of the same run on the same machine: the physical limit
(``openssl speed``), the library without a pool, and plain puts into the same etcd. Clients,
partitions and store share the machine, so the client's own work is part of every rate. Processor
time an operation is that of the partitions alone (with their renewals); it also holds on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cryptography
import grpc
from rich.console import Console

from benchmarks import audit, commit_latency, failover, faults, overload, patch
from benchmarks.bench_pool import BenchmarkPool
from benchmarks.openssl_limit import openssl_rate, openssl_version
from benchmarks.operations import MODES, OPERATIONS, Operation, create_keys
from benchmarks.report import audit_table, print_tables
from benchmarks.throughput import ClientProcesses, Task

FORMAT = 1
_CLIENT_PROCESSES_MAX = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    seconds: float
    repeats: int
    warm_up_seconds: float
    openssl_seconds: int
    commits: int
    commits_of_eight: int
    fault_repeats: int
    unlock_repeats: int
    failovers: int
    patches: int
    overload_seconds: float


_DEFAULT = Plan(2.0, 3, 0.3, 2, 60, 25, 3, 2, 5, 1, 60.0)
_QUICK = Plan(0.6, 2, 0.2, 1, 25, 8, 1, 1, 2, 1, 10.0)
_FULL_FAILOVERS = 50
_FULL_PATCHES = 5


def _machine(pool: BenchmarkPool) -> dict[str, Any]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    status = pool.status(0)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processors": os.cpu_count(),
        "processor_model": model[0] if model else platform.machine(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cryptography": cryptography.__version__,
        "grpcio": grpc.__version__,
        "openssl": openssl_version(),
        "etcd": status.store_version if status else "",
    }


def _say(text: str) -> None:
    print(f"benchmark: {text}", file=sys.stderr, flush=True)


def _throughput(pool: BenchmarkPool, plan: Plan) -> list[dict[str, Any]]:
    """Measure every operation in every mode, right beside the library alone and openssl."""
    count = min(_CLIENT_PROCESSES_MAX, max(2, os.cpu_count() or 1))
    with ClientProcesses(pool, count) as clients:
        return [_operation(clients, operation, plan) for operation in OPERATIONS.values()]


def _operation(clients: ClientProcesses, operation: Operation, plan: Plan) -> dict[str, Any]:
    _say(f"{operation.name}, {clients.count} client processes")
    one = openssl_rate(operation.openssl, 1, plan.openssl_seconds)
    many = openssl_rate(operation.openssl, clients.count, plan.openssl_seconds)
    task = Task(operation.name, "library", plan.warm_up_seconds, plan.seconds / 2)
    library = [clients.repeat(task, plan.repeats, 1), clients.repeat(task, plan.repeats)]
    modes = [
        clients.repeat(Task(operation.name, mode, plan.warm_up_seconds, plan.seconds), plan.repeats)
        for mode in MODES
    ]
    for mode in modes:
        rate = mode["operations_per_second"]["median"]
        mode["items_per_message"] = 1 if mode["mode"] == "unary" else operation.batch_items
        mode["ratio_to_openssl"] = round(rate / many, 4)
        mode["ratio_to_library"] = round(rate / library[1]["operations_per_second"]["median"], 4)
        mode["cpu_ratio_to_openssl"] = round(mode["cpu_us_per_operation"]["median"] * one / 1e6, 2)
    return {
        "operation": operation.name,
        "openssl": [
            {"processes": 1, "operations_per_second": one, "cpu_us_per_operation": round(1e6 / one, 2)},
            {"processes": clients.count, "operations_per_second": many},
        ],
        "library": library,
        "pool": modes,
    }


def _commits(pool: BenchmarkPool, plan: Plan) -> list[dict[str, Any]]:
    _say("commit latency, 1 and 8 writers")
    results = []
    for writers, writes in ((1, plan.commits), (8, plan.commits_of_eight)):
        results.append(
            {
                "writers": writers,
                "create_ec_key": commit_latency.create_key_latency(pool, writers, writes, plan.repeats),
                "etcd_put_1_kib": commit_latency.etcd_put_latency(pool, writers, writes, plan.repeats),
            }
        )
    return results


def machines_lost(pool: BenchmarkPool, plan: Plan) -> dict[str, Any]:
    """Lose machines under load."""
    _say(f"kill -9 of a whole machine under load, {plan.failovers} times")
    return failover.lose_machines(pool, plan.failovers, _say)


def rolled_out(directory: Path, plan: Plan) -> dict[str, Any]:
    """Patch a pool of its own under load."""
    _say("a rolling patch under load")
    beside = directory.with_name(f"{directory.name}-patch")
    beside.mkdir()
    return patch.roll_out(beside, plan.patches, 5 * plan.seconds, _say)


def measure_only(what: str, plan: Plan, directory: Path) -> dict[str, Any]:
    """Measure lost machines, patches or overload alone; the result lacks everything else."""
    began = time.monotonic()
    pool = BenchmarkPool(directory)
    try:
        pool.activate()
        result: dict[str, Any] = {"format": FORMAT, "machine": _machine(pool)}
        if what == "failover":
            with pool.client() as client:
                create_keys(client)
            result["failover"] = machines_lost(pool, plan)
        if what == "overload":
            result["overload"] = overload.overload(pool, plan.overload_seconds, _say)
    finally:
        pool.close()
    if what == "patch":
        result["patch"] = rolled_out(directory, plan)
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def measure(plan: Plan, directory: Path) -> dict[str, Any]:
    """Start a pool, measure everything, stop it; return the JSON-ready result."""
    began = time.monotonic()
    _say("starting a pool")
    pool = BenchmarkPool(directory)
    try:
        started = time.monotonic() - began
        pool.activate()
        activated = time.monotonic() - began - started
        machine = _machine(pool)
        with pool.client() as client:
            create_keys(client)
        throughput = _throughput(pool, plan)
        commits = _commits(pool, plan)
        _say("audit log")
        logged = audit.measure(directory.with_name("audit"), plan.seconds, plan.repeats)
        _say("kill -9 under load")
        broken = [
            faults.kill_follower_node(pool, plan.fault_repeats),
            faults.kill_store_leader(pool, plan.fault_repeats),
            faults.kill_partition(pool, plan.fault_repeats),
            faults.unlock(pool, plan.unlock_repeats),
        ]
        machines = machines_lost(pool, plan)
        _say("overload")
        overloaded = overload.overload(pool, plan.overload_seconds, _say)
    finally:
        pool.close()
    patched = rolled_out(directory, plan)
    return {
        "format": FORMAT,
        "machine": machine,
        "seconds": round(time.monotonic() - began, 1),
        "start_ms": round(started * 1000),
        "activate_ms": round(activated * 1000),
        "throughput": throughput,
        "commit": commits,
        "audit": logged,
        "faults": broken,
        "failover": machines,
        "overload": overloaded,
        "patch": patched,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark", description="Measure a real pool on this machine.")
    parser.add_argument(
        "part",
        nargs="?",
        choices=["all", "audit", "failover", "patch", "overload"],
        default="all",
        help="one part alone",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    parser.add_argument("--quick", action="store_true", help="rough figures in under a minute")
    parser.add_argument("--full", action="store_true", help="lose 50 machines and patch five times")
    parser.add_argument("--seconds", type=float, default=None, help="of one rate measurement, 0.1-60")
    parser.add_argument("--output", type=Path, default=None, help="also write the JSON object to a new file")
    arguments = parser.parse_args()
    if arguments.seconds is not None and not 0.1 <= arguments.seconds <= 60:
        parser.error("--seconds is 0.1-60")
    if arguments.output and arguments.output.exists():
        parser.error(f"{arguments.output} exists and is not overwritten")
    return arguments


def main() -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    arguments = _arguments()
    base = _QUICK if arguments.quick else _DEFAULT
    plan = Plan(
        arguments.seconds or base.seconds,
        base.repeats,
        base.warm_up_seconds,
        base.openssl_seconds,
        base.commits,
        base.commits_of_eight,
        base.fault_repeats,
        base.unlock_repeats,
        _FULL_FAILOVERS if arguments.full else base.failovers,
        _FULL_PATCHES if arguments.full else base.patches,
        base.overload_seconds,
    )
    with tempfile.TemporaryDirectory(prefix="mhsm-benchmark-") as temporary:
        try:
            place = Path(temporary) / "pool"
            if arguments.part == "audit":
                logged = audit.measure(Path(temporary) / "audit", plan.seconds, plan.repeats)
                result: dict[str, Any] = {"format": FORMAT, "processors": os.cpu_count(), "audit": logged}
            elif arguments.part == "all":
                result = measure(plan, place)
            else:
                result = measure_only(arguments.part, plan, place)
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except RuntimeError as error:
            _say(str(error))
            return 1
    if arguments.output:
        with arguments.output.open("x") as file:
            file.write(json.dumps(result, indent=2) + "\n")
    if not arguments.json and arguments.part == "audit":
        Console(width=130).print(audit_table(result["audit"]))
    elif not arguments.json:
        print_tables(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
