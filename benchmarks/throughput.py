"""Rates under client processes of their own, and the partitions' processor time an operation."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.bench_pool import PARTITIONS, BenchmarkPool
from benchmarks.operations import OPERATIONS, Mode, call_of, library_call, stream_counts
from benchmarks.summaries import summary
from hsm_pool.client.pool import Pool

_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a client process does next."""

    operation: str
    mode: Mode
    warm_up_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Rate:
    """One measurement."""

    operations: int
    seconds: float
    cpu_seconds: float
    """Processor time of the client process itself."""


class _Work:
    """A task, prepared: what takes time once (the library's own keys) is done here."""

    def __init__(self, task: Task, pool: Pool, number: int) -> None:
        self._operation = OPERATIONS[task.operation]
        self._mode = task.mode
        self._pool = pool
        self._partition = number % PARTITIONS
        self._call = (
            library_call(self._operation)
            if task.mode == "library"
            else call_of(self._operation, task.mode, pool)
        )

    def run(self, seconds: float) -> int:
        """Work for some seconds and return how many operations that were."""
        deadline = time.monotonic() + seconds
        return sum(self._counts(deadline))

    def _counts(self, deadline: float) -> Iterator[int]:
        if self._mode == "stream":
            yield from stream_counts(
                self._operation, self._pool, self._partition, lambda: time.monotonic() < deadline
            )
            return
        while time.monotonic() < deadline:
            yield self._call()


def _client_process(pipe: Pipe, directory: Path, number: int) -> None:
    """Serve tasks until None comes: warm up, say so, wait for the word, measure, answer."""
    with Pool.connect(directory) as pool:
        while (task := pipe.recv()) is not None:
            work = _Work(task, pool, number)
            work.run(task.warm_up_seconds)
            pipe.send("ready")
            pipe.recv()
            began, cpu_began = time.monotonic(), time.process_time()
            operations = work.run(task.seconds)
            pipe.send(Rate(operations, time.monotonic() - began, time.process_time() - cpu_began))


class ClientProcesses:
    """A fixed number of client processes. Use as a context manager."""

    def __init__(self, pool: BenchmarkPool, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._pool = pool
        self._pipes: list[Pipe] = []
        self._processes: list[BaseProcess] = []
        for number in range(count):
            own, other = context.Pipe()
            process = context.Process(
                target=_client_process, args=(other, pool.directory, number), daemon=True
            )
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if error is None and process.is_alive():
                pipe.send(None)
            else:
                process.terminate()
        for process in self._processes:
            process.join()

    def measure(self, task: Task, processes: int | None = None) -> tuple[float, float]:
        """Run a task in client processes at once.

        Args:
            task: What to do.
            processes: How many of them; None for all.

        Returns:
            (operations a second, processor microseconds an operation: those of the partitions,
            of the client itself for the library).
        """
        pipes = self._pipes[:processes]
        for pipe in pipes:
            pipe.send(task)
        for pipe in pipes:
            self._answer(pipe)
        cpu_before = self._pool.partition_cpu_seconds()
        for pipe in pipes:
            pipe.send("go")
        rates: list[Rate] = [self._answer(pipe) for pipe in pipes]
        cpu = self._pool.partition_cpu_seconds() - cpu_before
        if task.mode == "library":
            cpu = sum(rate.cpu_seconds for rate in rates)
        operations = sum(rate.operations for rate in rates)
        per_second = sum(rate.operations / rate.seconds for rate in rates)
        return per_second, cpu * 1e6 / max(1, operations)

    def _answer(self, pipe: Pipe) -> Any:
        if not pipe.poll(_ANSWER_SECONDS):
            raise RuntimeError(f"a client process did not answer within {_ANSWER_SECONDS:.0f} s")
        return pipe.recv()

    def repeat(self, task: Task, repeats: int, processes: int | None = None) -> dict[str, Any]:
        """Measure several times, each time after a warm-up."""
        measured = [self.measure(task, processes) for _ in range(repeats)]
        return {
            "mode": task.mode,
            "client_processes": processes or self.count,
            "operations_per_second": summary([rate for rate, _ in measured]),
            "cpu_us_per_operation": summary([cpu for _, cpu in measured], 2),
        }
