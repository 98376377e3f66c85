"""The operator's commands: drain, resume, failover, restart, replace, halt.

A command for one partition is sent at once. A goal (``restart``, ``replace``) is written into the
journal; the running controller works on it, this command only watches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from fabric_controller.console import (
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    check_partition,
    dry_run_option,
    fail,
    json_option,
    look,
    open_client,
    open_journal,
    say,
    with_settings,
)

if TYPE_CHECKING:
    from fabric_controller.enclave_client import EnclaveClient
    from fabric_controller.observe import PartitionView, State
    from fabric_controller.settings import FabricSettings
    from fabric_controller.work import Goal, Verb, Work

FOLLOW_SECONDS: Final = 0.25
"""Pause between two looks at the journal while a goal is worked on."""

SILENCE_SECONDS: Final = 20.0
"""A controller that has not written its status for so long does not run; a round may take 13 s."""

HANDOVER_SECONDS: Final = 10.0
"""How long ``failover`` waits to see the new holder."""

AFTER_A_HALT: Final = (
    "remove the cause and resume, or drop the work\nmhsm-fabric resume\nmhsm-fabric halt --abandon"
)
"""What is suggested when work has halted."""


def _send(settings: FabricSettings, client: EnclaveClient, verb: Verb, partition: int) -> State:
    from fabric_controller.enclave_client import EnclaveError
    from fabric_controller.issuing import issue
    from fabric_controller.work import Issuer

    name = verb.value.lower()
    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive():
        try:
            return issue(journal, client, verb, partition, Issuer.OPERATOR)
        except EnclaveError as error:
            if error.outcome_open:
                fail(
                    f"no answer of partition {partition} ({error.code}); it may or may not have obeyed",
                    f"mhsm-fabric status\nrepeat the {name} if it was not obeyed",
                    EXIT_UNREACHABLE,
                    reason=error.code,
                    definite=False,
                )
            text = f"partition {partition} refused the {name} ({error.code})"
            fail(text, "mhsm-fabric status", reason=error.code)


@click.command()
@click.argument("partition", type=click.IntRange(min=0))
@dry_run_option
@json_option
@with_settings
def drain(settings: FabricSettings, *, partition: int, dry_run: bool, as_json: bool) -> None:
    """Take PARTITION out of service; refused if fewer than two would go on serving."""
    from fabric_controller.planner import SERVING_MIN, others_serving
    from fabric_controller.work import Verb

    check_partition(settings, partition)
    with open_client(settings) as client:
        if dry_run:
            picture = look(settings, client)
            _check_answering(picture.view(partition))
            others = others_serving(picture, partition)
            if others < SERVING_MIN:
                fail(
                    f"the drain would be refused: {others} other partitions serve, {SERVING_MIN} are needed",
                    "mhsm-fabric status",
                )
            text = f"partition {partition} would be drained; {others} others go on serving"
            return say(
                text, {"dry_run": True, "partition": partition, "others_serving": others}, as_json=as_json
            )
        state = _send(settings, client, Verb.DRAIN, partition)
    return say(
        f"partition {partition}: {state.value}",
        {"partition": partition, "state": state.value},
        as_json=as_json,
        suggestion=f"mhsm-fabric resume {partition}",
    )


@click.command()
@click.argument("partition", type=click.IntRange(min=0), required=False)
@dry_run_option
@json_option
@with_settings
def resume(settings: FabricSettings, *, partition: int | None, dry_run: bool, as_json: bool) -> None:
    """Put PARTITION back into service; without one, go on with the halted work."""
    from fabric_controller.work import Verb

    if partition is None:
        return _continue(settings, dry_run=dry_run, as_json=as_json)
    check_partition(settings, partition)
    with open_client(settings) as client:
        if dry_run:
            view = look(settings, client).view(partition)
            _check_answering(view)
            state_name = view.state_name
            text = f"partition {partition} is {state_name} and would be resumed"
            return say(text, {"dry_run": True, "partition": partition, "state": state_name}, as_json=as_json)
        state = _send(settings, client, Verb.RESUME, partition)
    return say(
        f"partition {partition}: {state.value}",
        {"partition": partition, "state": state.value},
        as_json=as_json,
        suggestion="mhsm-fabric status",
    )


def _continue(settings: FabricSettings, *, dry_run: bool, as_json: bool) -> None:
    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive() as work:
        if work.goal is None or work.halted is None:
            fail("no work is halted", "mhsm-fabric status")
        if not dry_run:
            journal.append({"kind": "continue"})
    say(
        "the work would go on" if dry_run else "the work goes on",
        {"dry_run": dry_run, "was_halted_because": work.halted},
        as_json=as_json,
        suggestion="mhsm-fabric status --watch",
    )


@click.command()
@click.option("--abandon", is_flag=True, help="Drop the goal for good, also of work that has halted.")
@dry_run_option
@json_option
@with_settings
def halt(settings: FabricSettings, *, abandon: bool, dry_run: bool, as_json: bool) -> None:
    """Let the controller take no further step; a partition that is out stays out."""
    from fabric_controller.work import Issuer

    if abandon:
        return _abandon(settings, dry_run=dry_run, as_json=as_json)
    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive() as work:
        if not work.running:
            suggestion = "mhsm-fabric halt --abandon" if work.goal else "mhsm-fabric status"
            fail("the work has halted already" if work.goal else "no work is under way", suggestion)
        if not dry_run:
            reason = "an operator has halted it"
            journal.append({"kind": "halt", "by": Issuer.OPERATOR.value, "reason": reason})
    return say(
        "the work would be halted" if dry_run else "the work is halted",
        {"dry_run": dry_run, "halted": not dry_run},
        as_json=as_json,
        suggestion="mhsm-fabric resume\nmhsm-fabric halt --abandon",
    )


def _abandon(settings: FabricSettings, *, dry_run: bool, as_json: bool) -> None:
    from fabric_controller.work import Issuer

    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive() as work:
        if work.goal is None:
            fail("there is no work", "mhsm-fabric status")
        if not dry_run:
            journal.append({"kind": "abandon", "by": Issuer.OPERATOR.value})
    say(
        "the work would be abandoned" if dry_run else "the work is abandoned",
        {"dry_run": dry_run, "abandoned": not dry_run},
        as_json=as_json,
        suggestion="mhsm-fabric status\nresume each partition that it has left drained",
    )


@click.command()
@dry_run_option
@json_option
@with_settings
def failover(settings: FabricSettings, *, dry_run: bool, as_json: bool) -> None:
    """Hand the housekeeping role from the partition that holds it to the next serving one."""
    from fabric_controller.planner import others_serving
    from fabric_controller.work import Verb

    with open_client(settings) as client:
        picture = look(settings, client)
        holder = picture.housekeeper
        if holder is None:
            fail("no partition holds the housekeeping role", "mhsm-fabric status")
        if not others_serving(picture, holder):
            fail("no other partition serves that could take the role", "mhsm-fabric status")
        if dry_run:
            text = f"partition {holder} would hand over the housekeeping role"
            return say(text, {"dry_run": True, "holder": holder}, as_json=as_json)
        _send(settings, client, Verb.RELINQUISH, holder)
        successor = _await_successor(settings, client, holder)
    if successor is None:
        fail("no partition shows the role yet", "mhsm-fabric status", EXIT_UNREACHABLE, definite=False)
    return say(
        f"housekeeping: partition {holder} has handed over to partition {successor}",
        {"from": holder, "to": successor},
        as_json=as_json,
    )


def _await_successor(settings: FabricSettings, client: EnclaveClient, holder: int) -> int | None:
    pause, until = threading.Event(), time.monotonic() + HANDOVER_SECONDS
    while time.monotonic() < until:
        found = look(settings, client).housekeeper
        if found not in {None, holder}:
            return found
        pause.wait(FOLLOW_SECONDS)
    return None


@click.command()
@click.argument("partitions", type=click.IntRange(min=0), nargs=-1)
@click.option("--all", "all_partitions", is_flag=True, help="All partitions, one after the other.")
@click.option("--no-wait", is_flag=True, help="Write down the goal and end.")
@dry_run_option
@json_option
@with_settings
def restart(
    settings: FabricSettings,
    *,
    partitions: tuple[int, ...],
    all_partitions: bool,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Restart PARTITIONS one after the other: drain, restart, healthy again, resume.

    The controller does it, and goes on when it is killed itself. Ends with 1 when the work halts.
    """
    from fabric_controller.work import RollOut

    if all_partitions == bool(partitions):
        raise click.UsageError("name partitions, or give --all")
    if all_partitions:
        partitions = tuple(entry.index for entry in settings.partitions)
    for partition in partitions:
        check_partition(settings, partition)
    if len(set(partitions)) != len(partitions):
        raise click.UsageError("a partition stands twice")
    goal = RollOut(partitions, _incarnations(settings, partitions))
    if dry_run:
        _check_idle(settings)
        steps = [f"{verb} {partition}" for partition in partitions for verb in ("drain", "restart", "resume")]
        return say("\n".join(steps), {"dry_run": True, "steps": steps}, as_json=as_json)
    _set_goal(settings, goal)
    if no_wait:
        return say(
            "the goal is written down",
            {"partitions": list(partitions), "state": "running"},
            as_json=as_json,
            suggestion="mhsm-fabric status --watch",
        )
    follow(settings)
    return say(
        f"restarted: {', '.join(map(str, partitions))}",
        {"partitions": list(partitions), "state": "done"},
        as_json=as_json,
    )


@click.command()
@click.argument("partition", type=click.IntRange(min=0))
@click.option("--no-wait", is_flag=True, help="Write down the goal and end.")
@dry_run_option
@json_option
@with_settings
def replace(settings: FabricSettings, *, partition: int, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Replace the dead PARTITION by a new one on an empty data directory, which heals by evidence.

    What the dead one left behind is put aside on its node, not deleted. Ends with 1 when the work halts.
    """
    from fabric_controller.planner import SERVING_MIN, others_serving
    from fabric_controller.work import Replacement

    check_partition(settings, partition)
    with open_client(settings) as client:
        picture = look(settings, client)
    view, others = picture.view(partition), others_serving(picture, partition)
    if view.serving:
        fail(f"partition {partition} serves: only a dead one is replaced", "mhsm-fabric status")
    if others < SERVING_MIN:
        fail(f"{others} other partitions serve, {SERVING_MIN} are needed", "mhsm-fabric status")
    if dry_run:
        _check_idle(settings)
        text = f"partition {partition} is {view.state_name} and would be replaced"
        return say(text, {"dry_run": True, "partition": partition, "state": view.state_name}, as_json=as_json)
    _set_goal(settings, Replacement(partition, view.status.incarnation if view.status else 0))
    if no_wait:
        return say(
            "the goal is written down",
            {"partition": partition, "state": "running"},
            as_json=as_json,
            suggestion="mhsm-fabric status --watch",
        )
    follow(settings)
    return say(f"replaced: {partition}", {"partition": partition, "state": "done"}, as_json=as_json)


def _incarnations(settings: FabricSettings, partitions: tuple[int, ...]) -> dict[int, int]:
    """Return the incarnation of each partition; ends the command if one does not answer."""
    with open_client(settings) as client:
        picture = look(settings, client)
    incarnations = {}
    for partition in partitions:
        status = picture.view(partition).status
        if status is None:
            fail(f"partition {partition} does not answer", "mhsm-fabric status", EXIT_UNREACHABLE)
        incarnations[partition] = status.incarnation
    return incarnations


def _set_goal(settings: FabricSettings, goal: Goal) -> None:
    from fabric_controller.work import goal_entry

    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive() as work:
        _refuse_second(work)
        journal.append(goal_entry(goal))


def _check_idle(settings: FabricSettings) -> None:
    """End a dry run as the command would end: one goal at a time."""
    with contextlib.closing(open_journal(settings)) as journal:
        _refuse_second(journal.refresh())


def _refuse_second(work: Work) -> None:
    if work.running:
        fail("the controller works on something else", "mhsm-fabric status\nmhsm-fabric halt")


def _check_answering(view: PartitionView) -> None:
    """End a dry run as the command would end with a partition that does not answer."""
    if not view.answering:
        fail(f"partition {view.index} does not answer", "mhsm-fabric status", EXIT_UNREACHABLE)


def follow(settings: FabricSettings) -> None:
    """Watch the controller work until it is done; ends the command when it halts."""
    pause = threading.Event()
    told = len(_entries(settings))
    try:
        with contextlib.closing(open_journal(settings)) as journal:
            while True:
                work = journal.refresh()
                for entry in journal.history()[told:]:
                    told += 1
                    if entry["kind"] == "command":
                        click.echo(f"{entry['verb'].lower()} {entry['partition']}", err=True)
                    if entry["kind"] == "abandon":
                        fail("an operator has abandoned the work", "mhsm-fabric status", definite=False)
                if work.goal is None:
                    return
                if work.halted is not None:
                    fail(f"halted: {work.halted}", AFTER_A_HALT, definite=False)
                if not _controller_runs(settings):
                    fail(
                        "no controller runs; it goes on with this work when it is started",
                        "mhsm up",
                        EXIT_UNREACHABLE,
                        definite=False,
                    )
                pause.wait(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> NoReturn:
    fail("interrupted; the controller goes on", "mhsm-fabric halt", EXIT_INTERRUPTED, definite=False)


def _entries(settings: FabricSettings) -> list[dict[str, Any]]:
    with contextlib.closing(open_journal(settings)) as journal:
        return journal.history()


def _controller_runs(settings: FabricSettings) -> bool:
    """Return whether the controller has shown itself lately."""
    from fabric_controller.controller import STATUS_FILE

    try:
        written_at = (Path(settings.data_directory) / STATUS_FILE).stat().st_mtime
    except FileNotFoundError:
        return False
    return time.time() - written_at < SILENCE_SECONDS


@click.command()
@click.argument("version", type=click.IntRange(1, 1_000_000))
@click.option("--no-wait", is_flag=True, help="Write down the goal and end.")
@dry_run_option
@json_option
@with_settings
def patch(settings: FabricSettings, *, version: int, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Bring all partitions to firmware VERSION, one after the other: stage, drain, activate, restart, resume.

    Each partition fetches and verifies the version itself. One that does not start goes back to the
    firmware before, and the work halts (exit code 1). The controller goes on when it is killed itself.
    """
    from fabric_controller.planner import arrived
    from fabric_controller.work import RollOut

    partitions = tuple(entry.index for entry in settings.partitions)
    goal = RollOut(partitions, _incarnations(settings, partitions), version)
    if dry_run:
        _check_idle(settings)
        with open_client(settings) as client:
            picture = look(settings, client)
        steps = [
            f"{verb} {partition}"
            for partition in partitions
            if not arrived(picture.view(partition), goal)
            for verb in ("stage", "drain", "activate", "restart", "resume")
        ]
        text = "\n".join(steps) or f"all partitions run version {version}"
        return say(text, {"dry_run": True, "version": version, "steps": steps}, as_json=as_json)
    _set_goal(settings, goal)
    if no_wait:
        return say(
            "the goal is written down",
            {"version": version, "state": "running"},
            as_json=as_json,
            suggestion="mhsm-fabric status --watch",
        )
    follow(settings)
    return say(
        f"all partitions run version {version}", {"version": version, "state": "done"}, as_json=as_json
    )


COMMANDS: Final = (drain, resume, failover, restart, patch, replace, halt)
