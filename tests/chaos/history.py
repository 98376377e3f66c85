"""Recording of histories while a pool is under test, and their replay from a file.

``python -m tests.chaos.history FILE`` judges a recorded history again: exit 0 valid, 1 invalid,
2 unknown or not readable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from tests.chaos.linearizability import Operation, Verdict, check
from tests.chaos.model import KEY_LIFE_CYCLE

FORMAT_VERSION: Final = 1

OPERATIONS_MAX: Final = 200_000
"""Operations of one history; recording and loading more is refused."""


@dataclass(frozen=True, slots=True)
class _Invocation:
    process: int
    key: str
    invoked_at: int
    operation: Hashable


class History:
    """Operations of one run with the seed that drives it; safe to use from many threads.

    A client thread calls :meth:`invoke` right before its call and then exactly one of :meth:`complete`,
    :meth:`discard` and :meth:`unknown`. What was never ended has an unknown outcome.
    """

    def __init__(self, seed: int, replay_command: str) -> None:
        """Start a history.

        Args:
            seed: What the workload and the faults are drawn from.
            replay_command: The command line that repeats the run with this seed.
        """
        self.seed = seed
        self.replay_command = replay_command
        self._lock = threading.Lock()
        self._invocations: dict[int, _Invocation] = {}
        self._returns: dict[int, tuple[int, Hashable]] = {}
        self._ended: set[int] = set()
        self._tokens = 0

    def invoke(self, process: int, key: str, operation: Hashable) -> int:
        """Record that a call starts now and return its token."""
        with self._lock:
            if len(self._invocations) >= OPERATIONS_MAX:
                raise ValueError(f"a history holds at most {OPERATIONS_MAX} operations")
            token = self._tokens
            self._tokens += 1
            # The interval may only be too wide: a start that is recorded late could hide or invent an order.
            self._invocations[token] = _Invocation(process, key, time.monotonic_ns(), operation)
        return token

    def complete(self, token: int, result: Hashable) -> None:
        """Record that a call returned with a result, not later than now."""
        returned_at = time.monotonic_ns()
        if result is None:
            raise ValueError("a result is needed; unknown() is for calls without one")
        with self._lock:
            self._end(token)
            self._returns[token] = (returned_at, result)

    def discard(self, token: int) -> None:
        """Forget a call that is sure to have changed nothing and to have told nothing (a definite error)."""
        with self._lock:
            self._end(token)
            del self._invocations[token]

    def unknown(self, token: int) -> None:
        """Record that the outcome of a call will never be known; it may still take effect."""
        with self._lock:
            self._end(token)

    def _end(self, token: int) -> None:
        if token not in self._invocations or token in self._ended:
            raise ValueError(f"no call under way with token {token}")
        self._ended.add(token)

    def operations(self) -> list[Operation]:
        """Return what was recorded, in order of invocation."""
        with self._lock:
            operations = []
            for token, call in self._invocations.items():
                returned_at, result = self._returns.get(token, (None, None))
                operations.append(
                    Operation(call.process, call.key, call.invoked_at, returned_at, call.operation, result)
                )
        return operations

    def announce(self, stream: TextIO | None = None) -> None:
        """Print the seed and the command that repeats the run (standard error by default)."""
        print(f"seed: {self.seed}\nreplay: {self.replay_command}", file=stream or sys.stderr)

    def dump(self, path: Path) -> None:
        """Write the history as JSON lines, the seed and the replay command first."""
        header = {"format_version": FORMAT_VERSION, "seed": self.seed, "replay_command": self.replay_command}
        with path.open("w", encoding="utf-8") as file:
            for line in (header, *map(_as_document, self.operations())):
                file.write(json.dumps(line) + "\n")


@dataclass(frozen=True, slots=True)
class RecordedHistory:
    """A history read from a file."""

    seed: int
    replay_command: str
    operations: tuple[Operation, ...]


def _as_document(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in Operation.__slots__}


def _tuples(value: Any) -> Any:
    # JSON has no tuples; operations and results have no lists.
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def load(path: Path) -> RecordedHistory:
    """Read a history that :meth:`History.dump` wrote.

    Raises:
        ValueError: The file is not such a history.
        OSError: The file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in itertools.islice(file, OPERATIONS_MAX + 2)]
        header = lines[0]
        operations = tuple(
            Operation(**{name: _tuples(value) for name, value in line.items()}) for line in lines[1:]
        )
        recorded = RecordedHistory(header["seed"], header["replay_command"], operations)
        version = header["format_version"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: not a history: {error}") from None
    if version != FORMAT_VERSION or len(operations) > OPERATIONS_MAX:
        raise ValueError(f"{path.name}: another format version, or more than {OPERATIONS_MAX} operations")
    return recorded


def main() -> int:
    """Judge a recorded history of keys; print the verdict, the witness and how to repeat the run."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.history", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit-seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    try:
        recorded = load(arguments.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report = check(recorded.operations, KEY_LIFE_CYCLE, arguments.limit_seconds)
    print(f"verdict: {report.verdict.value} ({len(recorded.operations)} operations)")
    if report.witness is not None:
        print(f"key: {report.witness.key}")
        for title, operations in (("order", report.witness.linearised), ("stuck", report.witness.stuck)):
            for operation in operations:
                print(f"  {title}: process {operation.process} {operation.operation} -> {operation.result}")
        print(f"  state: {report.witness.state}")
    print(f"seed: {recorded.seed}\nreplay: {recorded.replay_command}")
    return {Verdict.VALID: 0, Verdict.INVALID: 1, Verdict.UNKNOWN: 2}[report.verdict]


if __name__ == "__main__":
    raise SystemExit(main())
