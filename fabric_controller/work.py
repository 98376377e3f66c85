"""What the controller is to do and has tried, folded from the entries of its journal: pure.

The journal holds goals, commands (written before they are sent) and their results. From
them alone follows everything that a new process must know after kill -9: the counter, the
goal, what was tried for it and how often, and which partitions an operator wants drained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

Entry = Mapping[str, Any]
"""One entry: "kind" and "time_ms", further keys by kind (see :func:`fold`)."""

OK = "OK"
"""Result of a command that was obeyed."""

OPEN_CODES = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "REPLY_REFUSED"}
)
"""Results after which the command may or may not have been obeyed; the last is a reply that is no reply."""

COUNTER_MAX: Final = 2**53 - 1
"""Of a command's counter: what the enclave interface takes."""

TIME_MAX_MS: Final = 253_402_300_799_999
"""End of the year 9999, Unix milliseconds."""

INCARNATION_MAX: Final = 2**32 - 1
"""Of a partition, as the enclave interface tells it."""

FIRMWARE_VERSION_MAX: Final = 1_000_000
"""Of an image."""

TEXT_LENGTH_MAX: Final = 4096
"""Characters of a reason or a code in an entry."""

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
    halted_by: Issuer | None = None
    attempts: tuple[Attempt, ...] = ()
    progress_ms: int = 0
    operator_drain: Attempt | None = None
    """An operator's drain whose result is not known yet."""
    begun: tuple[Replacement, ...] = ()
    """Replacements that were asked for and not seen to end, also those that were dropped since."""

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
        "goal": "patch" if goal.version else "restart",
        "partitions": list(goal.partitions),
        "incarnations": [goal.incarnations[index] for index in goal.partitions],
        "version": goal.version,
    }


def _whole(value: Any, maximum: int) -> int:
    # bool is a kind of int in Python, not in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise ValueError("not a whole number within its bounds")
    return value


def _text(value: Any) -> str:
    # Operators' terminals show it: what steers a terminal is no text.
    if not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX or not value.isprintable():
        raise ValueError("not a text")
    return value


def _partition(value: Any, pool: Collection[int]) -> int:
    if _whole(value, max(pool)) not in pool:
        raise ValueError("not a partition of the pool")
    return int(value)


def _partitions(value: Any, pool: Collection[int]) -> tuple[int, ...]:
    if not isinstance(value, list) or len(set(value)) != len(value):
        raise ValueError("not a list of partitions")
    return tuple(_partition(index, pool) for index in value)


def _replacement(entry: Entry, pool: Collection[int]) -> Replacement:
    partition = _partition(entry["partition"], pool)
    return Replacement(partition, _whole(entry["incarnation"], INCARNATION_MAX))


def _goal(entry: Entry, pool: Collection[int]) -> Goal:
    if entry["goal"] == "replace":
        return _replacement(entry, pool)
    if entry["goal"] not in {"patch", "restart"}:
        raise ValueError("an unknown goal")
    partitions = _partitions(entry["partitions"], pool)
    incarnations = [_whole(number, INCARNATION_MAX) for number in entry["incarnations"]]
    version = _whole(entry["version"], FIRMWARE_VERSION_MAX)
    return RollOut(partitions, dict(zip(partitions, incarnations, strict=True)), version)


def fold(work: Work, entry: Entry, pool: Collection[int]) -> Work:
    """Return the work after one more entry, none of whose values is believed: a file can be edited.

    Kinds: ``goal``, ``command`` (counter, verb, partition, by), ``result`` (counter, code),
    ``halt`` (by, reason), ``continue``, ``done``, ``abandon`` (by; an operator drops the goal) and
    ``checkpoint`` (counter, drained, begun), which stands for all entries before it.

    Args:
        work: What the entries before say.
        entry: The entry.
        pool: The partitions that there are.

    Raises:
        EntryRefused: The entry is not one that this version writes.
    """
    try:
        now_ms = _whole(entry["time_ms"], TIME_MAX_MS)
        match entry["kind"]:
            case "goal":
                return _begun(work, _goal(entry, pool), now_ms)
            case "command":
                return _command(work, entry, pool)
            case "result":
                return _result(work, entry)
            case "halt":
                reason, issuer = _text(entry["reason"]), Issuer(entry["by"])
                return replace(work, halted=reason, halted_by=issuer) if work.goal else work
            case "continue":
                # What was tried before the halt is forgiven: somebody has looked at it.
                return replace(work, halted=None, halted_by=None, attempts=(), progress_ms=now_ms)
            case "done":
                begun = tuple(each for each in work.begun if each != work.goal)
                return replace(_without_goal(work), begun=begun)
            case "abandon":
                return _without_goal(work)
            case "checkpoint":
                return Work(
                    counter=_whole(entry["counter"], COUNTER_MAX),
                    drained=frozenset(_partitions(entry["drained"], pool)),
                    begun=tuple(_replacement(each, pool) for each in entry["begun"]),
                )
    except (KeyError, TypeError, ValueError):
        pass
    raise EntryRefused("an entry of the journal is not one that this version writes")


def _begun(work: Work, goal: Goal, now_ms: int) -> Work:
    # What an operator drained was the old partition; he asks for a new one in its place.
    replaced = {goal.partition} if isinstance(goal, Replacement) else set()
    return replace(_without_goal(work), goal=goal, progress_ms=now_ms, drained=work.drained - replaced)


def _without_goal(work: Work) -> Work:
    return replace(work, goal=None, halted=None, halted_by=None, attempts=())


def _command(work: Work, entry: Entry, pool: Collection[int]) -> Work:
    attempt = Attempt(
        _whole(entry["counter"], COUNTER_MAX),
        Verb(entry["verb"]),
        _partition(entry["partition"], pool),
        entry["time_ms"],
    )
    work = replace(work, counter=max(work.counter, attempt.counter))
    if Issuer(entry["by"]) is Issuer.CONTROLLER:
        goal = work.goal
        if attempt.verb is Verb.HEAL and isinstance(goal, Replacement):
            others = (each for each in work.begun if each.partition != goal.partition)
            work = replace(work, begun=(*others, goal))
        if attempt.verb is Verb.DRAIN:
            # The controller drains what serves: an operator's drain of it was never obeyed, or is over.
            work = replace(work, drained=work.drained - {attempt.partition})
        return replace(work, attempts=(*work.attempts, attempt), progress_ms=entry["time_ms"])
    if attempt.verb is Verb.DRAIN:
        return replace(work, drained=work.drained | {attempt.partition}, operator_drain=attempt)
    if attempt.verb is Verb.RESUME:
        return replace(work, drained=work.drained - {attempt.partition}, operator_drain=None)
    return work


def _result(work: Work, entry: Entry) -> Work:
    counter, code = _whole(entry["counter"], COUNTER_MAX), _text(entry["code"])
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


def fold_all(entries: Iterable[Entry], pool: Collection[int]) -> Work:
    """Return the work of a whole journal."""
    work = Work()
    for entry in entries:
        work = fold(work, entry, pool)
    return work


def checkpoint_entry(work: Work) -> dict[str, Any]:
    """Return the entry that stands for a journal without an open goal."""
    begun = [{"partition": each.partition, "incarnation": each.incarnation} for each in work.begun]
    return {
        "kind": "checkpoint",
        "counter": work.counter,
        "drained": sorted(work.drained),
        "begun": begun,
    }
