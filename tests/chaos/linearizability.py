"""Judge whether a history of concurrent operations is linearizable (G2).

Search of Wing and Gong (Testing and Verifying Concurrent Objects, 1993) with Lowe's memory of
configurations seen (Testing for Linearizability, 2017), run key by key: a history is linearizable
exactly when each key's part is (Herlihy and Wing, 1990). Time is bounded; running out of it is the
verdict UNKNOWN, never a pass.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

CONFIGURATIONS_MAX: Final = 2_000_000
"""Configurations remembered for one key, about 0.5 GiB; more is UNKNOWN."""


class Verdict(Enum):
    """What is known about a history."""

    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. Times are nanoseconds of one monotonic clock, taken outside the call.

    ``returned_at`` and ``result`` are None when the outcome is not known: the operation may take
    effect at any time after its invocation, or never.
    """

    process: int
    key: str
    invoked_at: int
    returned_at: int | None
    operation: Hashable
    result: Hashable

    def __post_init__(self) -> None:
        if (self.returned_at is None) != (self.result is None):
            raise ValueError("an operation has both a return and a result, or neither")
        if self.returned_at is not None and self.returned_at < self.invoked_at:
            raise ValueError("an operation returned before it was invoked")


class Model(NamedTuple):
    """A sequential object: its state at first, and what an operation may do to a state.

    ``step(state, operation, result)`` returns all next states in which the operation gives the result;
    none if it cannot. With the result None (unknown) it returns the next states of every result.
    States are hashable.
    """

    initial: Any
    step: Callable[[Any, Any, Any], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Witness:
    """Why one key's history is invalid: the longest order found, and what could not follow it.

    The history was first cut at the earliest return that makes it invalid; operations that had not
    returned by then count as unknown.
    """

    key: str
    linearised: tuple[Operation, ...]
    state: Any
    stuck: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Verdict of a history; INVALID comes with a witness, VALID with an order for each key as its proof."""

    verdict: Verdict
    witness: Witness | None = None
    orders: tuple[tuple[Operation, ...], ...] = ()


def check(history: Iterable[Operation], model: Model, limit_seconds: float = 10.0) -> Report:
    """Judge a history: INVALID if any key's part is, else UNKNOWN if any is, else VALID."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    ends_at = time.monotonic() + limit_seconds
    orders: list[tuple[Operation, ...]] = []
    for done, operations in enumerate(by_key.values()):
        # Each key gets an equal part of what is left, so a hard one cannot hide a broken one.
        deadline = time.monotonic() + (ends_at - time.monotonic()) / (len(by_key) - done)
        report = _search(operations, model, deadline)
        if report.verdict is Verdict.INVALID:
            return _shortest(operations, model, ends_at, report)
        orders.extend(report.orders)
    if len(orders) < len(by_key):
        return Report(Verdict.UNKNOWN)
    return Report(Verdict.VALID, orders=tuple(orders))


def _search(history: Sequence[Operation], model: Model, deadline: float) -> Report:
    operations = sorted(history, key=lambda operation: operation.invoked_at)
    completed = sum(1 << i for i, operation in enumerate(operations) if operation.returned_at is not None)
    twins = _twins(operations)
    # A configuration: which operations took effect (bits), and the state. The path leads back to the start.
    stack: list[tuple[int, Any, Any]] = [(0, model.initial, None)]
    seen = {(0, model.initial)}
    best: tuple[int, int, Any, Any] = (-1, 0, model.initial, None)
    while stack:
        if time.monotonic() > deadline or len(seen) > CONFIGURATIONS_MAX:
            return Report(Verdict.UNKNOWN)
        done, state, path = stack.pop()
        if done & completed == completed:
            return Report(Verdict.VALID, orders=(_order(path),))
        if (done & completed).bit_count() > best[0]:
            best = ((done & completed).bit_count(), done, state, path)
        for i in _candidates(operations, done, twins):
            operation = operations[i]
            for after in model.step(state, operation.operation, operation.result):
                # An unknown operation without effect proves nothing: it may as well never happen.
                if operation.result is None and after == state:
                    continue
                configuration = (done | 1 << i, after)
                if configuration not in seen:
                    seen.add(configuration)
                    stack.append((*configuration, (operation, path)))
    _, done, state, path = best
    stuck = tuple(operations[i] for i in reversed(_candidates(operations, done, twins)))
    return Report(Verdict.INVALID, Witness(operations[0].key, _order(path), state, stuck))


def _order(path: Any) -> tuple[Operation, ...]:
    order: list[Operation] = []
    while path is not None:
        operation, path = path
        order.append(operation)
    return tuple(reversed(order))


def _candidates(operations: Sequence[Operation], done: int, twins: Sequence[int]) -> list[int]:
    """Return what may take effect next, the earliest to return last (it is tried first)."""
    earliest_return = math.inf
    found = []
    # Start at the first operation that did not take effect: the lowest bit that is not set.
    for i in range((done ^ (done + 1)).bit_length() - 1, len(operations)):
        operation = operations[i]
        if operation.invoked_at > earliest_return:
            break
        if done >> i & 1:
            continue
        if operation.returned_at is not None:
            earliest_return = min(earliest_return, operation.returned_at)
        elif twins[i] >= 0 and not done >> twins[i] & 1:
            continue
        found.append(i)
    # Nobody found is too late: whoever returns later in this list was also invoked later.
    returns = {i: operations[i].returned_at for i in found}
    return sorted(found, key=lambda i: (returns[i] is None, returns[i]), reverse=True)


def _twins(operations: Sequence[Operation]) -> list[int]:
    """Return for each unknown operation the one before it that does the same, else -1.

    Of equal unknown operations the earlier one can stand for the later one, so only one order is tried.
    """
    last: dict[Hashable, int] = {}
    twins = [-1] * len(operations)
    for i, operation in enumerate(operations):
        if operation.returned_at is None:
            twins[i] = last.get(operation.operation, -1)
            last[operation.operation] = i
    return twins


def _shortest(operations: Sequence[Operation], model: Model, deadline: float, report: Report) -> Report:
    """Cut the history at the earliest return that makes it invalid; keep the report if time runs out."""
    returns = sorted({operation.returned_at for operation in operations if operation.returned_at is not None})
    low, high = 0, len(returns) - 1
    while low < high:
        middle = (low + high) // 2
        shorter = _search(_cut(operations, returns[middle]), model, deadline)
        if shorter.verdict is Verdict.UNKNOWN:
            return report
        if shorter.verdict is Verdict.INVALID:
            high, report = middle, shorter
        else:
            low = middle + 1
    return report


def _cut(operations: Sequence[Operation], at: int) -> list[Operation]:
    return [
        operation
        if operation.returned_at is not None and operation.returned_at <= at
        else replace(operation, returned_at=None, result=None)
        for operation in operations
        if operation.invoked_at <= at
    ]
