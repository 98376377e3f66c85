"""A real node agent as a process of its own: every wait is bounded, and no child outlives a test."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS_MAX = 20.0
"""Bound of every wait; generous, never asserted on."""

ProcessIds = dict[str, int | None]

AGENT = """
import sys
from hsm_pool.node_agent import __main__, agent
_, settings_file, *command = sys.argv
agent.partition_command = lambda settings: command
sys.argv = ["node_agent", "--settings", settings_file]
sys.exit(__main__.main())
"""
"""The agent's own program; only the partition's command is another."""


class Lines:
    """Lines of a pipe, each waited for with a bound."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending = b""

    def next(self) -> str:
        """Return the next line.

        Raises:
            AssertionError: It did not come in time, or the pipe has ended.
        """
        deadline = time.monotonic() + SECONDS_MAX
        while b"\n" not in self._pending:
            remaining = max(0.0, deadline - time.monotonic())
            assert select.select([self._descriptor], [], [], remaining)[0], "no line in time"
            octets = os.read(self._descriptor, 4096)
            assert octets, "the pipe has ended"
            self._pending += octets
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()


class Process:
    """Somebody else's child, held by a descriptor, so that its id cannot come to mean another."""

    def __init__(self, process_id: int) -> None:
        self._descriptor = os.pidfd_open(process_id)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def exits(self, seconds: float = SECONDS_MAX) -> bool:
        """Return whether it exits within a time; waits no longer than needed."""
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def close(self) -> None:
        """End it, if it still runs."""
        self.signal(signal.SIGKILL)
        os.close(self._descriptor)


class RunningAgent:
    """A node agent with any command in the place of the partition."""

    def __init__(self, node_settings: Path, command: Sequence[str], program: str = AGENT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(node_settings), *command], stdout=subprocess.PIPE
        )
        assert self.process.stdout
        self._lines = Lines(self.process.stdout.fileno())
        self._seen: dict[int, Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for process in self._seen.values():
            process.close()
        assert self.process.stdout
        self.process.stdout.close()

    def report(self) -> ProcessIds:
        """Return the process ids of the next report."""
        event = json.loads(self._lines.next())
        assert event["event"] == "processes"
        ids: ProcessIds = event["process_ids"]
        for process_id in ids.values():
            if process_id and process_id not in self._seen:
                with contextlib.suppress(ProcessLookupError):  # a child that has exited already
                    self._seen[process_id] = Process(process_id)
        return ids

    def reported(self, condition: Callable[[ProcessIds], object]) -> ProcessIds:
        """Return the next report that fulfils a condition."""
        deadline = time.monotonic() + SECONDS_MAX
        while time.monotonic() < deadline:
            ids = self.report()
            if condition(ids):
                return ids
        raise AssertionError("no such report in time")

    def child(self, process_id: int | None) -> Process:
        """Return a child that was reported."""
        assert process_id
        return self._seen[process_id]

    def stop(self) -> int:
        """End it politely and return its exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS_MAX)
