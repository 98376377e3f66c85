"""The operator's goals: restart, patch, replace.

A goal is written into the journal; the running controller works on it, these commands only watch.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from fabric_controller.console import (
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    HUNG,
    check_partition,
    confirm,
    dry_run_option,
    fail,
    json_option,
    look,
    open_client,
    open_journal,
    say,
    see,
    with_settings,
)

if TYPE_CHECKING:
    from fabric_controller.observe import PartitionView, Picture
    from fabric_controller.settings import FabricSettings
    from fabric_controller.work import Goal, Work

FOLLOW_SECONDS: Final = 0.25
"""Pause between two looks at the journal while a goal is worked on."""

no_wait_option = click.option("--no-wait", is_flag=True, help="Write down the goal and end.")


@click.command()
@click.argument("partitions", type=click.IntRange(min=0), nargs=-1)
@click.option("--all", "all_partitions", is_flag=True, help="All partitions, one after the other.")
@no_wait_option
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
        partitions = settings.indexes
    for partition in partitions:
        check_partition(settings, partition)
    if len(set(partitions)) != len(partitions):
        raise click.UsageError("a partition stands twice")
    picture = _picture(settings)
    goal = RollOut(partitions, _incarnations(picture, partitions))
    _pursue(
        settings,
        picture,
        goal,
        {"partitions": list(partitions)},
        f"restarted: {', '.join(map(str, partitions))}",
        no_wait=no_wait,
        dry_run=dry_run,
        as_json=as_json,
    )


@click.command()
@click.argument("version", type=click.IntRange(1, 1_000_000))
@no_wait_option
@dry_run_option
@json_option
@with_settings
def patch(settings: FabricSettings, *, version: int, no_wait: bool, dry_run: bool, as_json: bool) -> None:
    """Bring all partitions to firmware VERSION, one after the other: stage, drain, activate, restart, resume.

    Each partition fetches and verifies the version itself. One that does not start goes back to the
    firmware before, and the work halts (exit code 1). The controller goes on when it is killed itself.
    """
    from fabric_controller.work import RollOut

    picture = _picture(settings)
    goal = RollOut(settings.indexes, _incarnations(picture, settings.indexes), version)
    for view in picture.partitions:
        runs = view.status.firmware_version if view.status else 0
        if runs > version:
            text = f"partition {view.index} runs version {runs}, and no partition takes older firmware"
            fail(text, f"patch to version {runs}, or publish a higher one")
    _pursue(
        settings,
        picture,
        goal,
        {"version": version},
        f"all partitions run version {version}",
        no_wait=no_wait,
        dry_run=dry_run,
        as_json=as_json,
    )


@click.command()
@click.argument("partition", type=click.IntRange(min=0))
@click.option("--yes", is_flag=True, help="Do not ask, although the partition answers.")
@no_wait_option
@dry_run_option
@json_option
@with_settings
def replace(
    settings: FabricSettings, *, partition: int, yes: bool, no_wait: bool, dry_run: bool, as_json: bool
) -> None:
    """Replace the dead PARTITION by a new one on an empty data directory, which heals by evidence.

    What the dead one left behind is put aside on its node, not deleted. It asks first where the
    partition answers and is not quarantined. Ends with 1 when the work halts.
    """
    from fabric_controller.planner import floor_obstacle
    from fabric_controller.work import Replacement

    check_partition(settings, partition)
    picture = _picture(settings)
    view, obstacle = picture.view(partition), floor_obstacle(picture, partition)
    if view.serving:
        fail(f"partition {partition} serves: only a dead one is replaced", "mhsm-fabric status")
    if obstacle:
        fail(
            f"partition {partition} cannot be replaced while {obstacle}",
            _way_out(settings, picture, besides=partition),
        )
    if not yes:
        _ask_before_replacing(settings, view, dry_run=dry_run)
    _pursue(
        settings,
        picture,
        Replacement(partition, _last_incarnation(settings, view)),
        {"partition": partition},
        f"replaced: {partition}",
        no_wait=no_wait,
        dry_run=dry_run,
        as_json=as_json,
    )


def _ask_before_replacing(settings: FabricSettings, view: PartitionView, *, dry_run: bool) -> None:
    """Have it confirmed that a partition is thrown away that may only have to be resumed or restarted."""
    from fabric_controller.observe import State
    from fabric_controller.report import half_replaced

    with contextlib.closing(open_journal(settings)) as journal:
        if not view.answering or view.state_name == State.QUARANTINED or half_replaced(view, journal.work):
            return
    question = f"partition {view.index} answers and is {view.condition}; put its disk aside and replace it?"
    if dry_run:
        click.echo(f"it would ask: {question}", err=True)
    else:
        confirm(question)


def _last_incarnation(settings: FabricSettings, view: PartitionView) -> int:
    """Return a partition's incarnation; of one that is silent what the controller saw last, 0 if nothing."""
    from fabric_controller.controller import last_said
    from fabric_controller.work import INCARNATION_MAX

    if view.status is not None:
        return view.status.incarnation
    try:
        partitions = last_said(Path(settings.data_directory))["partitions"]
        seen = next(entry["incarnation"] for entry in partitions if entry["index"] == view.index)
    except (KeyError, TypeError, StopIteration):
        return 0
    return seen if isinstance(seen, int) and 0 <= seen <= INCARNATION_MAX else 0


def _picture(settings: FabricSettings) -> Picture:
    with open_client(settings) as client:
        return look(settings, client)


def _incarnations(picture: Picture, partitions: tuple[int, ...]) -> dict[int, int]:
    """Return the incarnation of each partition; ends the command if one does not answer."""
    incarnations = {}
    for partition in partitions:
        status = picture.view(partition).status
        if status is None:
            fail(f"partition {partition} does not answer", "mhsm-fabric status", EXIT_UNREACHABLE)
        incarnations[partition] = status.incarnation
    return incarnations


def _pursue(
    settings: FabricSettings,
    picture: Picture,
    goal: Goal,
    document: dict[str, Any],
    done: str,
    *,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write down a goal and watch it, or say what would come of it.

    Args:
        settings: Of the controller.
        picture: The pool as it is.
        goal: What is wanted.
        document: What the JSON result says of it.
        done: The text when it is reached.
        no_wait: Do not watch.
        dry_run: Write nothing down.
        as_json: Print JSON.
    """
    from fabric_controller.report import goal_in_words, partitions_of
    from fabric_controller.work import goal_entry

    if dry_run:
        return _foresee(settings, picture, goal, document, done, as_json=as_json)
    with contextlib.closing(open_journal(settings)) as journal, journal.exclusive() as work:
        _refuse_second(work)
        journal.append(goal_entry(goal))
        told = len(journal.history())
    if work.goal is not None:
        click.echo(f"the halted {goal_in_words(work.goal)} is dropped", err=True)
    if no_wait:
        return say(
            "the goal is written down",
            {**document, "state": "running"},
            as_json=as_json,
            suggestion="mhsm-fabric status --watch",
        )
    _follow(settings, told)
    with contextlib.closing(open_journal(settings)) as journal:
        stays_out = sorted(journal.work.drained & set(partitions_of(goal)))
    if stays_out:
        named = ", ".join(map(str, stays_out))
        done = f"{done} ({named}: stays DRAINED, an operator drained it)"
    return say(
        done,
        {**document, "state": "done", "stays_drained": stays_out},
        as_json=as_json,
        suggestion="\n".join(f"mhsm-fabric resume {index}" for index in stays_out) or None,
    )


def _foresee(
    settings: FabricSettings,
    picture: Picture,
    goal: Goal,
    document: dict[str, Any],
    done: str,
    *,
    as_json: bool,
) -> None:
    """Say which commands a goal would take; end as the command would end if something stands in its way."""
    from fabric_controller.forecast import forecast, in_words
    from fabric_controller.planner import Halt, Wait
    from fabric_controller.report import goal_in_words
    from fabric_controller.work import RollOut

    with contextlib.closing(open_journal(settings)) as journal:
        work = journal.work
    _refuse_second(work)
    acts, end = forecast(picture, goal, work.drained)
    steps = [in_words(act.verb, act.partition, act.argument) for act in acts]
    if isinstance(end, Wait | Halt):
        after = f"after {', '.join(steps)} " if steps else ""
        what = "wait, and halt in the end" if isinstance(end, Wait) else "halt"
        fail(f"{after}it would {what}: {end.reason}", _way_out(settings, picture, besides=None))
    if work.goal is not None:
        click.echo(f"the halted {goal_in_words(work.goal)} would be dropped", err=True)
    say("\n".join(steps) or done, {"dry_run": True, **document, "steps": steps}, as_json=as_json)
    if isinstance(goal, RollOut) and goal.version and steps:
        click.echo(
            f"hint: whether the partitions take version {goal.version} shows when they stage it", err=True
        )


def _way_out(settings: FabricSettings, picture: Picture, *, besides: int | None) -> str:
    from fabric_controller.report import way_out

    with contextlib.closing(open_journal(settings)) as journal:
        return "\n".join(way_out(picture, journal.work, besides)) or "mhsm-fabric status"


def _refuse_second(work: Work) -> None:
    from fabric_controller.report import goal_in_words

    if work.running and work.goal is not None:
        fail(
            f"the controller works on something else: {goal_in_words(work.goal)}",
            "mhsm-fabric status\nmhsm-fabric halt",
        )


def _follow(settings: FabricSettings, told: int) -> None:
    """Watch the controller work until it is done; ends the command when it halts.

    ``told`` entries of the journal are older than the work.
    """
    from fabric_controller.controller import is_alive
    from fabric_controller.forecast import in_words
    from fabric_controller.report import after_a_halt

    pause = threading.Event()
    waits = ""
    try:
        with contextlib.closing(open_journal(settings)) as journal:
            while True:
                work = journal.refresh()
                for entry in journal.history()[told:]:
                    told += 1
                    if entry["kind"] == "command":
                        click.echo(
                            in_words(entry["verb"], entry["partition"], entry.get("argument")), err=True
                        )
                    if entry["kind"] == "abandon":
                        fail("an operator has abandoned the work", "mhsm-fabric status", definite=False)
                if work.goal is None:
                    return
                if work.halted is not None:
                    with open_client(settings) as client:
                        next_steps = "\n".join(after_a_halt(see(settings, client), work))
                    fail(f"halted: {work.halted}", next_steps, definite=False)
                if not is_alive(Path(settings.data_directory)):
                    fail(
                        "the controller does not run, or hangs; started anew, it goes on with this work",
                        f"{HUNG}\nmhsm up",
                        EXIT_UNREACHABLE,
                        definite=False,
                    )
                if (reason := _reason(settings)) and reason != waits:
                    click.echo(f"waits: {reason}", err=True)
                waits = reason
                pause.wait(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        _interrupted()


def _reason(settings: FabricSettings) -> str:
    """Return why the controller waited in its last round, "" when it did not."""
    from fabric_controller.controller import last_said

    work = last_said(Path(settings.data_directory)).get("work")
    return str(work.get("reason", "")) if isinstance(work, dict) and work.get("state") == "running" else ""


def _interrupted() -> NoReturn:
    fail("interrupted; the controller goes on", "mhsm-fabric halt", EXIT_INTERRUPTED, definite=False)


COMMANDS: Final = (restart, patch, replace)
