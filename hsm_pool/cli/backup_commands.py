"""mhsm backup: full backups, restores and what is in their way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hsm_pool.cli.key_output import resource
from hsm_pool.cli.output import common_options, confirmed, connect, fail, report, request_id_option
from hsm_pool.client import backup_calls, backups
from hsm_pool.client.locations import open_location
from hsm_pool.errors import RestoreState
from mhsm.backup.v1 import backup_pb2

_to = click.option("--output", required=True, help="Directory, or URL of an object store (s3://...).")
_from = click.option("--from", "location", required=True, help="Directory or URL of a backup.")


@click.group("backup")
def backup_group() -> None:
    """Full backups: encrypted to the security domain, so that whoever takes one cannot read it."""


@backup_group.command("create")
@_to
@click.option("--partition", type=click.IntRange(0, 2), default=0, show_default=True)
@common_options
def create(output: str, partition: int, **common: Any) -> None:
    """Take a full backup; a repeat goes on with one that was interrupted in the same place."""
    with connect(common, client="administrator") as pool, _progress(common) as progress:
        try:
            taken = backups.take(pool, open_location(output), progress, partition)
        except RestoreState as error:
            fail(error.message, "mhsm backup create --help")
    report(
        {
            "output": output,
            "backup_id": taken.backup_id,
            "keys": taken.keys,
            "parts": taken.parts,
            "bytes": taken.bytes_written,
        },
        as_json=common["as_json"],
        text=f"{taken.keys} keys in {output} ({taken.bytes_written:,} bytes)",
        following=f"mhsm backup check --from {output}",
    )


@backup_group.command("check")
@_from
@common_options
def check(location: str, **common: Any) -> None:
    """Say whether a backup could be restored in this pool; changes nothing."""
    with connect(common, client="administrator") as pool:
        manifest = backups.manifest_of(open_location(location))
        found = pool.call(backup_calls.check_restore(manifest))
    report(
        {"keys": found.keys, "keys_replaced": found.keys_replaced, **_facts(manifest)},
        as_json=common["as_json"],
        text=f"{found.keys} keys can be restored; a full restore destroys the {found.keys_replaced} here",
        # A drill ends here: what destroys nothing comes first.
        following=f"mhsm backup {'restore-key NAME' if found.keys_replaced else 'restore'} --from {location}",
    )


@backup_group.command("restore")
@_from
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def restore(location: str, yes: bool, **common: Any) -> None:
    """Replace ALL keys of this pool by those of a backup; a repeat goes on with an interrupted one."""
    place = open_location(location)
    with connect(common, client="administrator") as pool:
        found = pool.call(backup_calls.check_restore(backups.manifest_of(place)))
        question = f"destroy the {found.keys_replaced} keys of this pool and restore {found.keys}?"
        if not yes and not confirmed(question, f"mhsm backup restore --from {location} --yes"):
            fail("nothing was done", "")
        with _progress(common) as progress:
            state = backups.restore(pool, place, progress)
    _report_restore(state, common, f"{found.keys} keys are restored")


@backup_group.command("restore-key")
@click.argument("name")
@_from
@request_id_option
@common_options
def restore_key(name: str, location: str, request_id: str, **common: Any) -> None:
    """Restore one key, which must not exist here, from a full backup."""
    with connect(common, client="administrator") as pool, _progress(common) as progress:
        found = backups.restore_key(pool, open_location(location), resource(name), progress, request_id)
    report(
        {"name": found.name},
        as_json=common["as_json"],
        text=f"restored {found.name}",
        following=f"mhsm key versions {name}",
    )


@backup_group.command("status")
@common_options
def status(**common: Any) -> None:
    """Show the restore under way, or the last one."""
    with connect(common, client="administrator") as pool:
        state = pool.call(backup_calls.get_restore())
    if state is None:
        report({"restore": None}, as_json=common["as_json"], text="there was no restore", following="")
        return
    _report_restore(state, common, f"restore {state.restore_id}: {_phase(state)}")


@backup_group.command("cancel")
@common_options
def cancel(**common: Any) -> None:
    """Cancel a restore that was not committed; the keys are those of before."""
    with connect(common, client="administrator") as pool, _progress(common) as progress:
        state = backups.cancel(pool, progress)
    _report_restore(state, common, "the restore is cancelled; the keys are those of before")


def _report_restore(state: backup_pb2.Restore, common: dict[str, Any], text: str) -> None:
    report(
        {
            "restore": {
                "restore_id": state.restore_id,
                "phase": _phase(state),
                "parts": state.parts,
                "parts_staged": len(state.staged_parts),
                "records_left": state.records_left,
            }
        },
        as_json=common["as_json"],
        text=text,
        following="mhsm status",
    )


def _phase(state: backup_pb2.Restore) -> str:
    return backup_pb2.RestorePhase.Name(state.phase).removeprefix("RESTORE_PHASE_").lower()


def _facts(manifest: bytes) -> dict[str, Any]:
    fields = json.loads(manifest)  # the pool has checked it
    return {name: fields[name] for name in ("backup_id", "source_pool_id", "created", "sequence")}


@contextmanager
def _progress(common: dict[str, Any]) -> Iterator[backups.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    hidden = common["as_json"] or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield progress
