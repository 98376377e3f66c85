"""What a goal would lead to if every command were obeyed: the planner, on a model of the pool. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fabric_controller.observe import PartitionView, Picture, State, Status
from fabric_controller.planner import INCARNATIONS_PER_ADMISSION, Act, Decision, plan
from fabric_controller.work import OK, Attempt, Goal, RollOut, Verb, Work

STEPS_MAX: Final = 100
"""More than any goal takes: five commands to each partition."""


def forecast(picture: Picture, goal: Goal, drained: frozenset[int]) -> tuple[tuple[Act, ...], Decision]:
    """Return the commands that would be sent, and how it would end: Done, or what it would wait or halt for.

    Args:
        picture: The pool as it is.
        goal: What is wanted.
        drained: Partitions that an operator has drained.
    """
    work = Work(goal=goal, drained=drained)
    steps: tuple[Act, ...] = ()
    decision = plan(picture, work, 0)
    while isinstance(decision, Act) and len(steps) < STEPS_MAX:
        steps = (*steps, decision)
        picture = _obeyed(picture, decision, goal)
        attempt = Attempt(len(steps), decision.verb, decision.partition, 0, OK)
        work = replace(work, attempts=(*work.attempts, attempt))
        decision = plan(picture, work, 0)
    return steps, decision


def in_words(verb: str, partition: int, argument: int | None = None) -> str:
    """Return a command as people read it; of HEAL the partition it is for."""
    return f"heal {argument} by way of {partition}" if verb == Verb.HEAL else f"{verb.lower()} {partition}"


def _obeyed(picture: Picture, act: Act, goal: Goal) -> Picture:
    """Return the picture after a command to a partition that does what it is told."""
    changed = act.argument if act.verb is Verb.HEAL and act.argument is not None else act.partition
    views = (
        PartitionView(view.index, _status(view, act, goal)) if view.index == changed else view
        for view in picture.partitions
    )
    return Picture(tuple(views))


def _status(view: PartitionView, act: Act, goal: Goal) -> Status:
    status = view.status or Status(State.STARTING, False, 0, 0)
    match act.verb:
        case Verb.DRAIN:
            return replace(status, state=State.DRAINED, fresh=False)
        case Verb.RESUME:
            return replace(status, state=State.SERVING, fresh=True, healthy=True)
        case Verb.RESTART:
            version = goal.version if isinstance(goal, RollOut) else 0
            return replace(
                status,
                incarnation=status.incarnation + 1,
                firmware_version=version or status.firmware_version,
            )
        case Verb.HEAL:
            incarnation = 0 if isinstance(goal, RollOut) else goal.incarnation
            admission = incarnation // INCARNATIONS_PER_ADMISSION + 1
            return replace(status, state=State.DRAINED, incarnation=admission * INCARNATIONS_PER_ADMISSION)
    return status
