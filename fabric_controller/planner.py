"""The planner: observed and desired to the next action. Pure: no clock, no network, no files.

It looks at the pool as it is, never at what it believes to have done, so a new process
goes on where a killed one stopped. Two rules keep G5 on this side, too (the partitions
keep it whatever is planned here):

* a partition is taken out only while two *others* serve;
* a partition that was taken out is put back when the others are fewer than two.

Every command has a budget and a back-off; every wait has an end, after which the work
halts and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fabric_controller.observe import PartitionView, Picture, State
from fabric_controller.work import OK, REFUSED, Goal, Issuer, Replacement, RollOut, Verb, Work

SERVING_MIN: Final = 2
"""Partitions that go on serving while another one is out."""

ATTEMPTS_MAX: Final = 4
"""How often one command is sent to one partition for one goal."""

BACKOFF_MS: Final = {
    Verb.DRAIN: 1_000,
    Verb.RESUME: 1_000,
    Verb.RESTART: 3_000,
    Verb.RELINQUISH: 1_000,
    Verb.HEAL: 5_000,
    Verb.STAGE: 2_000,
    Verb.ACTIVATE: 2_000,
}
"""Pause before the second attempt; doubled with each further one."""

PATIENCE_MS: Final = 90_000
"""How long nothing may move before the work halts."""

INCARNATIONS_PER_ADMISSION: Final = 2**20
"""A new partition's incarnations begin at a multiple of this, above those of the one it replaces."""


@dataclass(frozen=True, slots=True)
class Act:
    """Send this command to this partition; the argument is a dead one for HEAL, a version for firmware."""

    verb: Verb
    partition: int
    argument: int | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done now; the reason is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    """Nothing more is done until an operator says so."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """The goal is reached."""


@dataclass(frozen=True, slots=True)
class Idle:
    """There is no goal, or the work is halted."""


Decision = Act | Wait | Halt | Done | Idle


def plan(picture: Picture, work: Work, now_ms: int) -> Decision:
    """Return the next step towards the goal.

    Args:
        picture: The pool as observed just now.
        work: What the journal says.
        now_ms: Unix milliseconds, as in the journal.
    """
    if work.goal is None:
        return Idle()
    if work.halted is not None:
        return _put_back(work.goal, picture, work, now_ms)
    if isinstance(work.goal, Replacement):
        return _plan_replacement(work.goal, picture, work, now_ms)
    return _plan_roll_out(work.goal, picture, work, now_ms)


def _plan_roll_out(goal: RollOut, picture: Picture, work: Work, now_ms: int) -> Decision:
    views = {view.index: view for view in picture.partitions}
    for index in goal.partitions:
        view = views[index]
        if reached(view, goal, work):
            continue
        state = view.status.state if view.answering and view.status else None
        others_suffice = others_serving(picture, index) >= SERVING_MIN
        if state is State.DRAINED:
            failed = None if arrived(view, goal) else _given_up(view, goal, work, now_ms)
            if failed and index in work.drained:
                return failed
            if arrived(view, goal) or failed or (not others_suffice and index not in work.drained):
                # Also before it halts: what cannot be changed goes on serving as it is.
                return _attempt(Verb.RESUME, view, work, now_ms)
            if others_suffice:
                return _next_while_out(goal, view, work, now_ms)
        if view.serving and (failed := _given_up(view, goal, work, now_ms)):
            return failed
        if state is not State.DRAINED and view.serving and others_suffice:
            if goal.version and not _obeyed(Verb.STAGE, index, work):
                # Before it is taken out: firmware that is refused costs no service.
                return _attempt(Verb.STAGE, view, work, now_ms, goal.version)
            return _attempt(Verb.DRAIN, view, work, now_ms)
        return _stopped_by(picture, view, work, now_ms)
    return Done()


def _put_back(goal: Goal, picture: Picture, work: Work, now_ms: int) -> Decision:
    """Return what is done for halted work: capacity still comes first, unless an operator halted it."""
    if isinstance(goal, RollOut) and work.halted_by is not Issuer.OPERATOR:
        for view in picture.partitions:
            out = view.index in goal.partitions and view.state_name == State.DRAINED
            few = others_serving(picture, view.index) < SERVING_MIN
            if out and few and view.index not in work.drained:
                decision = _attempt(Verb.RESUME, view, work, now_ms)
                return decision if isinstance(decision, Act) else Idle()
    return Idle()


def _given_up(view: PartitionView, goal: RollOut, work: Work, now_ms: int) -> Halt | None:
    """Return why nothing more is tried with a partition that has not arrived, None while something is."""
    if _gone_back(view, goal, work):
        return Halt(_does_not_start(view, goal))
    for verb in (Verb.STAGE, Verb.ACTIVATE, Verb.RESTART):
        decision = _attempt(verb, view, work, now_ms, goal.version)
        if isinstance(decision, Halt) and (verb is Verb.RESTART or not _obeyed(verb, view.index, work)):
            return decision
    return None


def _next_while_out(goal: RollOut, view: PartitionView, work: Work, now_ms: int) -> Decision:
    """Return the next command to a drained partition that has not arrived yet."""
    for verb in (Verb.STAGE, Verb.ACTIVATE) if goal.version else ():
        if not _obeyed(verb, view.index, work):
            return _attempt(verb, view, work, now_ms, goal.version)
    return _attempt(Verb.RESTART, view, work, now_ms)


def _plan_replacement(goal: Replacement, picture: Picture, work: Work, now_ms: int) -> Decision:
    dead = picture.view(goal.partition)
    if reached(dead, goal, work):
        return Done()
    if admitted(dead, goal):
        if dead.state_name == State.DRAINED:
            # The new one counts as drained until it is resumed.
            return _attempt(Verb.RESUME, dead, work, now_ms)
    elif dead.serving:
        return Halt(f"partition {dead.index} serves: there is nothing to replace")
    sent = [attempt for attempt in work.attempts if attempt.verb is Verb.HEAL]
    if admitted(dead, goal) or (sent and sent[-1].code == OK):
        reason = f"a new partition {dead.index} was admitted and does not serve yet: {dead.condition}"
        return _wait(reason, work, now_ms)
    helpers = [view.index for view in picture.partitions if view.serving and view.index != dead.index]
    if len(helpers) < SERVING_MIN:
        return _wait(
            f"partition {dead.index} cannot be replaced while {floor_obstacle(picture, dead.index)}",
            work,
            now_ms,
        )
    # The one that was asked may be the reason why it failed: another one each time.
    helper = helpers[len(sent) % len(helpers)]
    if sent and abs(now_ms - sent[-1].time_ms) < BACKOFF_MS[Verb.HEAL] * 2 ** (len(sent) - 1):
        return Wait(f"waiting for a new partition {dead.index}, asked for a moment ago")
    if len(sent) >= ATTEMPTS_MAX:
        return Halt(f"partition {dead.index} was not replaced ({sent[-1].code or 'no answer'})")
    return Act(Verb.HEAL, helper, dead.index)


def admitted(view: PartitionView, goal: Replacement) -> bool:
    """Return whether a partition is the new one, as far as it has ever answered.

    Decided by what it shows and not by what was sent: the controller may have been killed before it
    learned that it was obeyed, and whoever replaced the new one again would throw it away.
    """
    return (
        view.status is not None
        and view.status.incarnation // INCARNATIONS_PER_ADMISSION
        > goal.incarnation // INCARNATIONS_PER_ADMISSION
    )


def restarted(view: PartitionView, goal: RollOut) -> bool:
    """Return whether a partition was restarted since the roll-out began."""
    return view.status is not None and view.status.incarnation > goal.incarnations[view.index]


def arrived(view: PartitionView, goal: RollOut) -> bool:
    """Return whether a partition is where the roll-out wants it: on the version, or restarted."""
    if goal.version:
        return view.status is not None and view.status.firmware_version == goal.version
    return restarted(view, goal)


def reached(view: PartitionView, goal: Goal, work: Work) -> bool:
    """Return whether nothing is left to do for a partition: it serves, or an operator drained it."""
    there = admitted(view, goal) if isinstance(goal, Replacement) else arrived(view, goal)
    stays_out = view.state_name == State.DRAINED and view.index in work.drained
    return there and (view.serving or stays_out)


def _gone_back(view: PartitionView, goal: RollOut, work: Work) -> bool:
    """Return whether a partition was restarted for its new version and runs another one."""
    return (
        bool(goal.version)
        and _sent(Verb.RESTART, view, work)
        and restarted(view, goal)
        and not arrived(view, goal)
    )


def _does_not_start(view: PartitionView, goal: RollOut) -> str:
    runs = view.status.firmware_version if view.status else 0
    return (
        f"partition {view.index} does not start version {goal.version} and went back to "
        f"{firmware_name(runs)}: nodes/{view.index}/logs/partition.1.log, or an older one there, says why"
    )


def firmware_name(version: int) -> str:
    """Return a version in words; 0 is what was installed."""
    return f"version {version}" if version else "what is installed"


def _sent(verb: Verb, view: PartitionView, work: Work) -> bool:
    return any((attempt.verb, attempt.partition) == (verb, view.index) for attempt in work.attempts)


def _obeyed(verb: Verb, partition: int, work: Work) -> bool:
    return any(
        (attempt.verb, attempt.partition, attempt.code) == (verb, partition, OK) for attempt in work.attempts
    )


def others_serving(picture: Picture, index: int) -> int:
    """Return how many partitions but this one serve."""
    return sum(view.serving for view in picture.partitions if view.index != index)


def floor_obstacle(picture: Picture, index: int) -> str:
    """Return in words why a partition cannot go out: "" when two others serve."""
    if others_serving(picture, index) >= SERVING_MIN:
        return ""
    away = ", ".join(
        f"partition {view.index} is {view.condition}"
        for view in picture.partitions
        if view.index != index and not view.serving
    )
    return f"fewer than two others serve: {away}"


def _stopped_by(picture: Picture, target: PartitionView, work: Work, now_ms: int) -> Decision:
    """Wait for what stands in the way of this partition's turn, and halt in the end."""
    if target.serving or target.state_name == State.DRAINED:
        reason = f"partition {target.index} cannot be out while {floor_obstacle(picture, target.index)}"
        return _wait(reason, work, now_ms)
    halted = f"partition {target.index} does not serve: {target.condition}"
    if _sent(Verb.RESTART, target, work):
        # On purpose, so it is no alarm while there is patience.
        waits = f"waiting for partition {target.index} to serve again after its restart"
        return _wait(halted, work, now_ms, waits)
    return _wait(halted, work, now_ms)


def _attempt(
    verb: Verb, view: PartitionView, work: Work, now_ms: int, argument: int | None = None
) -> Decision:
    """Send a command, unless it was sent a moment ago, or too often."""
    partition = view.index
    earlier = [attempt for attempt in work.attempts if (attempt.verb, attempt.partition) == (verb, partition)]
    if not earlier:
        return Act(verb, partition, argument)
    if earlier[-1].code == REFUSED:
        return Halt(_firmware_refused(verb, view, argument))
    # A clock that was set back must not stop the work for long.
    elapsed_ms = abs(now_ms - earlier[-1].time_ms)
    if elapsed_ms < BACKOFF_MS[verb] * 2 ** (len(earlier) - 1):
        return Wait(f"waiting for partition {partition} to show that it obeyed {verb.value}")
    if len(earlier) < ATTEMPTS_MAX:
        return Act(verb, partition, argument)
    code = earlier[-1].code or "no answer"
    return Halt(f"{verb.value} was sent {len(earlier)} times to partition {partition} in vain ({code})")


def _firmware_refused(verb: Verb, view: PartitionView, version: int | None) -> str:
    text = (
        f"partition {view.index} refuses to {verb.value} version {version}: "
        f"nodes/{view.index}/logs/partition.log says why"
    )
    if view.status and not view.status.firmware_version:
        # One that runs a published version was made with a repository.
        text += "; a pool that was made without --firmware-repository cannot be patched"
    return text


def _wait(reason: str, work: Work, now_ms: int, waits: str = "") -> Decision:
    """Wait while there is patience, with its own words if there are any; then halt with the reason."""
    if abs(now_ms - work.progress_ms) > PATIENCE_MS:
        return Halt(reason)
    return Wait(waits or reason)
