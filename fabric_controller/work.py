"""What the controller is to do and has tried, folded from the entries of its journal: pure.

The journal holds goals, commands (written before they are sent) and their results. From
them alone follows everything that a new process must know after kill -9: the counter, the
goal, what was tried for it and how often, and which partitions an operator wants drained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

Entry = Mapping[str, Any]
"""One entry: "kind" and "time_ms", further keys by kind (see :func:`fold`)."""

OK = "OK"
"""Result of a command that was obeyed."""

OPEN_CODES = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "REPLY_REFUSED"}
)
"""Results after which the command may or may not have been obeyed; the last is a reply that is no reply."""

REFUSED = "PERMISSION_DENIED"
"""Result of a command about firmware that the partition does not take: repeating it cannot help."""


class Verb(StrEnum):
    """Commands of the enclave interface."""

    DRAIN = "DRAIN"
    RESUME = "RESUME"
    RELINQUISH = "RELINQUISH"
    RESTART = "RESTART"
    HEAL = "HEAL"
    """Sent to a living partition, for a dead one."""
    STAGE = "STAGE"
    ACTIVATE = "ACTIVATE"


class Issuer(StrEnum):
    """Who wanted a command."""

    OPERATOR = "operator"
    CONTROLLER = "controller"


@dataclass(frozen=True, slots=True)
class RollOut:
    """Goal: restart partitions one after the other, with another version of their firmware if one is named.

    ``incarnations`` are those when it began: a partition with a higher one has been restarted.
    """

    partitions: tuple[int, ...]
    incarnations: Mapping[int, int]
    version: int = 0
    """Version to patch to; 0: what runs now."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """Goal: a new partition in place of a dead one, whose incarnation was this one (0: not known)."""

    partition: int
    incarnation: int


Goal = RollOut | Replacement


@dataclass(frozen=True, slots=True)
class Attempt:
    """A command that was sent for the goal; ``code`` is None while its result is not known."""

    counter: int
    verb: Verb
    partition: int
    time_ms: int
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Everything the journal says. ``progress_ms`` is the time of the goal's newest entry."""

    counter: int = 0
    drained: frozenset[int] = frozenset()
    goal: Goal | None = None
    halted: str | None = None
    attempts: tuple[Attempt, ...] = ()
    progress_ms: int = 0
    operator_drain: Attempt | None = None
    """An operator's drain whose result is not known yet."""

    @property
    def running(self) -> bool:
        """Whether there is something to do."""
        return self.goal is not None and self.halted is None


class EntryRefused(ValueError):
    """An entry is not one that this version writes."""


def goal_entry(goal: Goal) -> dict[str, Any]:
    """Return the entry that sets a goal."""
    if isinstance(goal, Replacement):
        return {
            "kind": "goal",
            "goal": "replace",
            "partition": goal.partition,
            "incarnation": goal.incarnation,
        }
    return {
        "kind": "goal",
        "goal": "restart",
        "partitions": list(goal.partitions),
        "incarnations": [goal.incarnations[index] for index in goal.partitions],
        "version": goal.version,
    }


def _goal(entry: Entry) -> Goal:
    if entry["goal"] == "replace":
        return Replacement(entry["partition"], entry["incarnation"])
    if entry["goal"] != "restart":
        raise EntryRefused("an entry sets an unknown goal")
    partitions = tuple(entry["partitions"])
    incarnations = dict(zip(partitions, entry["incarnations"], strict=True))
    return RollOut(partitions, incarnations, entry["version"])


def fold(work: Work, entry: Entry) -> Work:
    """Return the work after one more entry.

    Kinds: ``goal``, ``command`` (counter, verb, partition, by), ``result`` (counter, code),
    ``halt`` (by, reason), ``continue``, ``done``, ``abandon`` (by; an operator drops the goal) and
    ``checkpoint`` (counter, drained), which stands for all entries before it.

    Raises:
        EntryRefused: The entry is not one that this version writes.
    """
    try:
        match entry["kind"]:
            case "goal":
                return replace(
                    work, goal=_goal(entry), halted=None, attempts=(), progress_ms=entry["time_ms"]
                )
            case "command":
                return _command(work, entry)
            case "result":
                return _result(work, entry)
            case "halt":
                return replace(work, halted=entry["reason"]) if work.goal else work
            case "continue":
                # What was tried before the halt is forgiven: somebody has looked at it.
                return replace(work, halted=None, attempts=(), progress_ms=entry["time_ms"])
            case "done" | "abandon":
                return replace(work, goal=None, halted=None, attempts=())
            case "checkpoint":
                return Work(counter=entry["counter"], drained=frozenset(entry["drained"]))
    except (KeyError, TypeError, ValueError):
        pass
    raise EntryRefused("an entry of the journal is not one that this version writes")


def _command(work: Work, entry: Entry) -> Work:
    attempt = Attempt(entry["counter"], Verb(entry["verb"]), entry["partition"], entry["time_ms"])
    work = replace(work, counter=max(work.counter, attempt.counter))
    if Issuer(entry["by"]) is Issuer.CONTROLLER:
        return replace(work, attempts=(*work.attempts, attempt), progress_ms=entry["time_ms"])
    if attempt.verb is Verb.DRAIN:
        return replace(work, drained=work.drained | {attempt.partition}, operator_drain=attempt)
    if attempt.verb is Verb.RESUME:
        return replace(work, drained=work.drained - {attempt.partition}, operator_drain=None)
    return work


def _result(work: Work, entry: Entry) -> Work:
    counter, code = entry["counter"], entry["code"]
    attempts = tuple(
        replace(attempt, code=code) if attempt.counter == counter else attempt for attempt in work.attempts
    )
    work = replace(work, attempts=attempts, progress_ms=entry["time_ms"])
    drain = work.operator_drain
    if drain is not None and drain.counter == counter:
        work = replace(work, operator_drain=None)
        if code != OK and code not in OPEN_CODES:
            # It was refused, so it has drained nobody.
            work = replace(work, drained=work.drained - {drain.partition})
    return work


def fold_all(entries: Iterable[Entry]) -> Work:
    """Return the work of a whole journal."""
    work = Work()
    for entry in entries:
        work = fold(work, entry)
    return work


def checkpoint_entry(work: Work) -> dict[str, Any]:
    """Return the entry that stands for a journal without an open goal."""
    return {"kind": "checkpoint", "counter": work.counter, "drained": sorted(work.drained)}
