"""What the controller works on, what holds it up and what to do next, in words and for JSON: pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fabric_controller.forecast import in_words
from fabric_controller.observe import PartitionView, Picture, State
from fabric_controller.planner import (
    SERVING_MIN,
    Act,
    Halt,
    Wait,
    admitted,
    firmware_name,
    floor_obstacle,
    plan,
    reached,
)
from fabric_controller.work import Goal, Replacement, RollOut, Work


def partitions_of(goal: Goal | None) -> tuple[int, ...]:
    """Return the partitions that a goal is about, in the order of their turns."""
    match goal:
        case RollOut():
            return goal.partitions
        case Replacement():
            return (goal.partition,)
    return ()


def goal_name(goal: Goal | None) -> str | None:
    """Return the command that sets a goal."""
    match goal:
        case Replacement():
            return "replace"
        case RollOut():
            return "patch" if goal.version else "restart"
    return None


def goal_in_words(goal: Goal) -> str:
    """Return a goal as people call it."""
    if isinstance(goal, Replacement):
        return f"replacement of partition {goal.partition}"
    if goal.version:
        return f"patch to version {goal.version}"
    return f"restart of {', '.join(map(str, goal.partitions))}"


def work_document(picture: Picture, work: Work, now_ms: int) -> dict[str, Any]:
    """Return the work as the JSON-ready object of status.json and ``status --json``.

    ``state`` is idle, running or halted; ``goal`` is patch, restart or replace (null: none), with
    ``version`` of a patch, ``partitions`` and those of them that are ``done``; ``step`` is the next
    command, and ``reason`` says what is waited for or why it has halted. ``half_replaced`` names
    partitions in whose place a new one was admitted, or may have been, that has not shown itself.
    """
    decision = plan(picture, work, now_ms)
    return {
        "state": "idle" if work.goal is None else "running" if work.running else "halted",
        "goal": goal_name(work.goal),
        "version": (work.goal.version or None) if isinstance(work.goal, RollOut) else None,
        "partitions": list(partitions_of(work.goal)),
        "done": _done(picture, work),
        "step": in_words(decision.verb, decision.partition, decision.argument)
        if isinstance(decision, Act)
        else None,
        "reason": decision.reason if isinstance(decision, Wait | Halt) else work.halted or "",
        # The note of a drain that was never obeyed is no news of a partition that serves.
        "drained_by_operator": sorted(i for i in work.drained if not picture.view(i).serving),
        "half_replaced": [view.index for view in picture.partitions if half_replaced(view, work)],
    }


def damaged_document(damage: str) -> dict[str, Any]:
    """Return the work where the journal cannot be read."""
    return {"state": "unknown", "reason": damage}


def work_line(picture: Picture, work: Work, now_ms: int) -> str:
    """Return the work in one line, "" when there is none."""
    if work.goal is None:
        return ""
    document = work_document(picture, work, now_ms)
    done = f"{len(document['done'])} of {len(document['partitions'])} done"
    last = document["reason"] or document["step"]
    what = f"work: {goal_in_words(work.goal)}, {document['state']}, {done}"
    return f"{what}: {last}" if last else what


def _done(picture: Picture, work: Work) -> list[int]:
    goal = work.goal
    if goal is None:
        return []
    return [index for index in partitions_of(goal) if reached(picture.view(index), goal, work)]


def half_replaced(view: PartitionView, work: Work) -> bool:
    """Return whether a new partition may be admitted in place of this one, and it is not there yet.

    Nobody can resume the old one then: its replacement has to be gone on with.
    """
    begun_here = any(begun.partition == view.index and not admitted(view, begun) for begun in work.begun)
    # The journal may be gone: an old partition that still answers says it itself.
    return not view.serving and (begun_here or view.state_name == State.REPLACED)


def state_cell(view: PartitionView, picture: Picture, work: Work) -> str:
    """Return the state of a partition, and of a drained one who drained it, as far as the journal says."""
    if view.state_name not in {State.DRAINED, State.REPLACED}:
        return view.condition
    if half_replaced(view, work):
        return "DRAINED (half replaced)"
    if view.index in work.drained:
        return "DRAINED (operator)"
    return "DRAINED (controller)" if view.index == _current(picture, work) else "DRAINED"


def _current(picture: Picture, work: Work) -> int | None:
    """Return the partition whose turn it is."""
    done = _done(picture, work)
    return next((index for index in partitions_of(work.goal) if index not in done), None)


def mixed_firmware(picture: Picture) -> str:
    """Return in words which partition runs which firmware, "" when all that answer run the same."""
    by_version: dict[int, list[str]] = {}
    for view in picture.partitions:
        if view.answering and view.status:
            by_version.setdefault(view.status.firmware_version, []).append(str(view.index))
    if len(by_version) < 2:
        return ""
    told = (f"{', '.join(by_version[version])}: {firmware_name(version)}" for version in sorted(by_version))
    return f"the partitions run different firmware ({'; '.join(told)})"


def drain_refusal(picture: Picture, index: int) -> str:
    """Return why a partition cannot be drained, "" when it can."""
    view = picture.view(index)
    if view.state_name == State.DRAINED:
        return ""
    if view.state_name != State.SERVING:
        return f"partition {index} is {view.state_name}: only one that serves is drained"
    obstacle = floor_obstacle(picture, index)
    return f"partition {index} cannot be drained while {obstacle}" if obstacle else ""


def resume_refusal(view: PartitionView, work: Work) -> str:
    """Return why a partition cannot be resumed, "" when it can."""
    if half_replaced(view, work):
        return f"partition {view.index} cannot be resumed: its replacement was begun and has not ended"
    if view.state_name not in {State.DRAINED, State.SERVING}:
        return f"partition {view.index} is {view.state_name}: only a drained one is resumed"
    return ""


def way_out(picture: Picture, work: Work, besides: int | None) -> Iterator[str]:
    """Give what brings back the partitions that do not serve, besides one, a line each."""
    for view in picture.partitions:
        if view.index == besides or view.serving:
            continue
        log = f"nodes/{view.index}/logs/partition.log"
        others_suffice = not floor_obstacle(picture, view.index)
        if half_replaced(view, work):
            yield f"the replacement of partition {view.index} was begun and has not ended"
            yield f"mhsm-fabric replace {view.index}"
        elif view.state_name == State.DRAINED:
            yield f"mhsm-fabric resume {view.index}"
        elif view.state_name == State.QUARANTINED:
            yield f"{log} says why partition {view.index} is quarantined"
            if others_suffice:
                yield f"mhsm-fabric replace {view.index}"
        elif view.state_name == State.LOCKED and others_suffice:
            yield f"partition {view.index} gets no keys although others serve; {log} says why"
            yield f"mhsm-fabric replace {view.index}"
        elif not view.answering:
            logs = f"{log} and node-agent-{view.index}.log beside it"
            yield f"partition {view.index} does not answer: {logs} say why; if its disk was lost, replace it"


def after_a_halt(picture: Picture, work: Work) -> list[str]:
    """Return what to do about work that has halted, a line each."""
    current = _current(picture, work)
    if current is None:
        return ["nothing is left to do of it", "mhsm-fabric resume"]
    # The work itself resumes one that it drained; one that broke meanwhile waits for an operator.
    own = isinstance(work.goal, Replacement) or picture.view(current).state_name == State.DRAINED
    lines = list(way_out(picture, work, current if own else None))
    if isinstance(work.goal, RollOut) and work.goal.version:
        lines.append(mixed_firmware(picture))
        lines.append(
            f"if version {work.goal.version} is bad, publish a higher one and patch to it: "
            "that drops this patch, and no partition takes older firmware"
        )
    lines += [
        "remove the cause and resume, or drop the work",
        "mhsm-fabric resume",
        "mhsm-fabric halt --abandon",
    ]
    return list(filter(None, lines))


def suggestions(picture: Picture, work: Work) -> list[str]:
    """Return what to do next after a look at the pool, a line each; nothing where all is well."""
    if work.halted is not None:
        return after_a_halt(picture, work)
    if work.running:
        return ["mhsm-fabric status --watch"]
    states = {view.state_name for view in picture.partitions}
    if not picture.serving_count and State.LOCKED in states:
        return [
            "a quorum of officers must unlock the pool",
            "mhsm security-domain init-recovery --output attempt.json",
        ]
    if not picture.serving_count and State.PROVISIONED in states:
        return ["the pool is not activated", "mhsm status"]
    lines = list(way_out(picture, work, None))
    mixture = mixed_firmware(picture)
    if mixture and picture.serving_count >= SERVING_MIN:
        newest = max(view.status.firmware_version for view in picture.partitions if view.status)
        lines += [f"{mixture}: patch to the newest, or to a higher one", f"mhsm-fabric patch {newest}"]
    if not lines and picture.serving_count < len(picture.partitions):
        return ["mhsm-fabric status --watch"]
    return lines
