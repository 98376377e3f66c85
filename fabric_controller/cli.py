"""``mhsm-fabric``: run the fabric controller, look at the pool, and say what is to be done.

Data goes to standard output, talk to standard error. Exit codes: 0 done, 1 refused, failed
or halted, 2 wrong usage, 5 unreachable (for a command: its outcome is open), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fabric_controller import goal_commands, operator_commands
from fabric_controller.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    HUNG,
    JOURNAL_DAMAGED,
    fail,
    fail_for_damage,
    journal_or_damage,
    open_client,
    open_journal,
    see,
    show_error,
    suggest,
    with_settings,
)
from fabric_controller.journal import JournalDamaged, JournalHeld

if TYPE_CHECKING:
    from fabric_controller.observe import Picture
    from fabric_controller.settings import FabricSettings
    from fabric_controller.work import Work

WATCH_SECONDS: Final = 1.0
"""Pause between two looks of ``status --watch``."""

WIDTH_OF_NO_TERMINAL: Final = 200
"""Columns where nobody says how many there are: no cell is cut."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 refused, failed or halted, 2 usage, 5 unreachable, 130 interrupted. "
    "After 5 the outcome of a command is open.",
)
def cli() -> None:
    """Fabric controller of a Managed HSM pool: keeps the partitions alive, never sees a key."""


for command in (*operator_commands.COMMANDS, *goal_commands.COMMANDS):
    cli.add_command(command)


@cli.command()
@with_settings
def serve(settings: FabricSettings) -> None:
    """Run the controller until SIGTERM; logs are JSON lines on standard error."""
    from fabric_controller import controller
    from fabric_controller.journal import JournalDamaged

    try:
        controller.serve(settings)
    except controller.AlreadyRunningError:
        fail("another controller runs with this data directory", "mhsm-fabric status")
    except JournalDamaged as error:
        directory = settings.data_directory
        fail(f"{directory}: {error}", "keep the file as evidence, move it away, and start again")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", "check the paths in the settings file")


def _render(document: dict[str, Any], picture: Picture, work: Work, now_ms: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fabric_controller.report import state_cell, work_line

    count = len(picture.partitions)
    title = Text(f"pool {document['pool_id']}: {picture.serving_count} of {count} serving")
    table = Table(title=title, title_justify="left")
    for heading in ("partition", "state", "serving", "firmware", "applied", "start"):
        table.add_column(heading, no_wrap=True)
    for view in picture.partitions:
        cells = ("-",) * 4
        if view.status is not None and view.answering:
            cells = (
                "yes" if view.serving else "no",
                str(view.status.firmware_version or "installed"),
                str(view.status.applied_sequence),
                str(view.status.incarnation),
            )
        table.add_row(str(view.index), state_cell(view, picture, work), *cells)
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_NO_TERMINAL).print(table)
    for view in picture.partitions:
        if view.failure is not None:
            click.echo(f"partition {view.index}: no answer ({view.failure.code})")
    if picture.housekeeper is not None:
        click.echo(f"housekeeping: partition {picture.housekeeper}")
    controller = document["controller"]
    if controller is not None:
        measures = ", ".join(controller["hardening"]).replace("_", " ") or "nothing"
        if controller["alive"]:
            click.echo(f"controller: user {controller['user_id']}, hardened with {measures}")
        else:
            click.echo(f"controller: does not run, or hangs (last heard of {controller['last_seen']})")
    line = work_line(picture, work, now_ms)
    if line:
        click.echo(line)


@cli.command()
@click.option("--watch", is_flag=True, help="Look again every second, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a look, one a line.")
@with_settings
def status(settings: FabricSettings, *, watch: bool, as_json: bool) -> None:
    """Ask every partition how it is, and say what the controller works on.

    Fails (5) when none answers, not when they answer and do not serve. With a damaged journal it
    shows the partitions, and fails (1).
    """
    from fabric_controller.controller import running_controller, status_document
    from fabric_controller.journal import Journal
    from fabric_controller.observe import blank
    from fabric_controller.report import damaged_document, suggestions, work_document
    from fabric_controller.work import Work

    picture, work = blank(settings.indexes), Work()
    pause = threading.Event()
    found = journal_or_damage(settings)
    journal = found if isinstance(found, Journal) else None
    with (
        open_client(settings) as client,
        contextlib.closing(journal) if journal else contextlib.nullcontext(),
    ):
        try:
            while True:
                picture = see(settings, client, picture)
                now_ms = time.time_ns() // 1_000_000
                work = journal.refresh() if journal else work
                told = work_document(picture, work, now_ms) if journal else damaged_document(str(found))
                document = status_document(settings.pool_id, picture, told)
                document["controller"] = running_controller(Path(settings.data_directory))
                if as_json:
                    click.echo(json.dumps(document))
                else:
                    _render(document, picture, work, now_ms)
                if not watch:
                    break
                pause.wait(WATCH_SECONDS)
        except KeyboardInterrupt:
            # The way to end --watch, so no failure of its own.
            if not watch:
                raise
    if picture.answering_count == 0:
        fail("no partition answers", "mhsm up\nmhsm-fabric status", EXIT_UNREACHABLE)
    if not isinstance(found, Journal):
        fail_for_damage(settings, found)
    lines = suggestions(picture, work)
    if document["controller"] is None or not document["controller"]["alive"]:
        lines = ["nobody works on goals while no controller runs", "mhsm up", HUNG, *lines]
    if lines and not watch:
        suggest("\n".join(lines))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object an entry, one a line.")
@with_settings
def history(settings: FabricSettings, *, as_json: bool) -> None:
    """Print the journal: goals, commands and their results, the oldest first."""
    with contextlib.closing(open_journal(settings)) as journal:
        for entry in journal.history():
            if as_json:
                click.echo(json.dumps(entry))
                continue
            at = datetime.fromtimestamp(entry["time_ms"] / 1000, UTC).isoformat(timespec="milliseconds")
            rest = "  ".join(f"{k}={v}" for k, v in entry.items() if k not in {"time_ms", "kind"})
            rest = rest if rest.isprintable() else ascii(rest)
            click.echo(f"{at}  {entry['kind']:<10}  {rest}".rstrip())


def main() -> None:
    """Entry point of ``mhsm-fabric``."""
    # The C core prints texts of the other side (certificates, addresses) to standard error otherwise.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        cli.main(prog_name="mhsm-fabric", standalone_mode=False)
    except click.exceptions.Exit as finished:
        sys.exit(finished.exit_code)
    except click.Abort:
        show_error("interrupted", "", EXIT_INTERRUPTED, definite=False, prefix="mhsm-fabric")
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        if "--json" not in sys.argv[1:]:
            error.show()
        else:
            show_error(error.format_message(), "", error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)  # nobody reads
    except JournalHeld:
        fail("another process holds the journal, and hangs", HUNG, EXIT_UNREACHABLE)
    except JournalDamaged as error:  # while the command ran
        fail(str(error), JOURNAL_DAMAGED)
    except OSError as error:  # of standard output
        fail(error.strerror or str(error), "look at where the output goes")
