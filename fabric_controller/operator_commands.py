"""The operator's commands that are obeyed at once: drain, resume, failover, halt."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Final

import click

from fabric_controller.console import (
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
    from fabric_controller.work import Verb

LOOK_SECONDS: Final = 0.25
"""Pause between two looks for the new holder."""

HANDOVER_SECONDS: Final = 10.0
"""How long ``failover`` waits to see the new holder."""


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
                    f"mhsm-fabric status\nrepeat the {name} if it was not obeyed{_after(verb, partition)}",
                    EXIT_UNREACHABLE,
                    reason=error.code,
                    definite=False,
                )
            text = f"partition {partition} refused the {name} ({error.code})"
            fail(text, f"mhsm-fabric status{_after(verb, partition)}", reason=error.code)


def _after(verb: Verb, partition: int) -> str:
    """Return what else there is to know after a command that failed, a line each."""
    from fabric_controller.work import Verb

    if verb is Verb.DRAIN:
        return (
            f"\nif it was obeyed, the controller leaves it drained until you resume it"
            f"\nmhsm-fabric resume {partition}"
        )
    if verb is Verb.RESUME:
        return (
            f"\nif it goes on to fail, another controller may have begun to replace it: "
            f"mhsm-fabric replace {partition}"
        )
    return ""


@click.command()
@click.argument("partition", type=click.IntRange(min=0))
@dry_run_option
@json_option
@with_settings
def drain(settings: FabricSettings, *, partition: int, dry_run: bool, as_json: bool) -> None:
    """Take PARTITION out of service; refused if fewer than two would go on serving."""
    from fabric_controller.planner import others_serving
    from fabric_controller.report import drain_refusal, way_out
    from fabric_controller.work import Verb

    check_partition(settings, partition)
    with open_client(settings) as client:
        # Looked at first, for the partition that refuses it gives no reason (G5); it decides all the same.
        picture = look(settings, client)
        _check_answering(picture.view(partition))
        refusal = drain_refusal(picture, partition)
        if refusal:
            with contextlib.closing(open_journal(settings)) as journal:
                lines = "\n".join(way_out(picture, journal.work, None))
            fail(refusal, lines or "mhsm-fabric status")
        if dry_run:
            others = others_serving(picture, partition)
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
    from fabric_controller.report import half_replaced, resume_refusal
    from fabric_controller.work import Verb

    if partition is None:
        return _continue(settings, dry_run=dry_run, as_json=as_json)
    check_partition(settings, partition)
    with contextlib.closing(open_journal(settings)) as journal:
        work = journal.work
    with open_client(settings) as client:
        view = look(settings, client).view(partition)
        _check_answering(view)
        refusal = resume_refusal(view, work)
        if refusal:
            halved = half_replaced(view, work)
            fail(refusal, f"mhsm-fabric replace {partition}" if halved else "mhsm-fabric status")
        if dry_run:
            state_name = view.state_name
            text = f"partition {partition} is {view.condition} and would be resumed"
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
        suggestion="mhsm-fabric status\nit says which partitions were left drained, if any",
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
        pause.wait(LOOK_SECONDS)
    return None


def _check_answering(view: PartitionView) -> None:
    """End a command to a partition that does not answer, before anything is sent."""
    if not view.answering:
        fail(f"partition {view.index} does not answer", "mhsm-fabric status", EXIT_UNREACHABLE)


COMMANDS: Final = (drain, resume, failover, halt)
