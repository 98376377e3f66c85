"""``mhsm-fabric``: run the fabric controller, look at the partitions, drain and resume one.

Data goes to standard output, talk to standard error. Exit codes: 0 done, 1 refused or
failed, 2 wrong usage, 5 unreachable (for a command: its outcome is open).
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    from fabric_controller.enclave_client import EnclaveClient
    from fabric_controller.observe import Picture, State
    from fabric_controller.settings import FabricSettings

EXIT_FAILED: Final = 1
EXIT_UNREACHABLE: Final = 5

WATCH_SECONDS: Final = 1.0
"""Pause between two looks of ``status --watch``."""


def _fail(message: str, suggestion: str, code: int = EXIT_FAILED) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    click.echo(f"next: {suggestion}", err=True)
    raise SystemExit(code)


def _default_data_directory() -> Path:
    """Return $XDG_STATE_HOME/mhsm, or ~/.local/state/mhsm (XDG Base Directory Specification)."""
    state_home = os.environ.get("XDG_STATE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(state_home) if Path(state_home).is_absolute() else Path.home() / ".local" / "state"
    return base / "mhsm"


def _load_settings(settings_file: Path | None, data_directory: Path | None) -> FabricSettings:
    from fabric_controller.settings import SettingsError, load

    if settings_file is not None and data_directory is not None:
        raise click.UsageError("--settings and --data-dir exclude each other")
    path = settings_file or (data_directory or _default_data_directory()) / "fabric" / "fabric.json"
    try:
        return load(path)
    except OSError as error:
        _fail(f"{path}: {error.strerror}", "mhsm-fabric COMMAND --settings FILE, or --data-dir of a pool")
    except SettingsError as error:
        _fail(f"{path}: {error}", "correct the file; it is written when the pool is made")


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options --settings and --data-dir, and the loaded settings as first argument."""

    @click.option(
        "--settings",
        "settings_file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Settings of the controller (JSON).",
    )
    @click.option(
        "--data-dir",
        "data_directory",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="D",
        help="Data directory of the pool; the settings are D/fabric/fabric.json. "
        "Default: $XDG_STATE_HOME/mhsm or ~/.local/state/mhsm.",
    )
    @functools.wraps(command)
    def with_settings(
        *arguments: Any, settings_file: Path | None, data_directory: Path | None, **options: Any
    ) -> None:
        command(_load_settings(settings_file, data_directory), *arguments, **options)

    return with_settings


def _client(settings: FabricSettings) -> EnclaveClient:
    from fabric_controller.enclave_client import EnclaveClient

    try:
        return EnclaveClient(settings)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", "check identity in the settings file")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Fabric controller of a Managed HSM pool: sees the partitions' health, never a key."""


@cli.command()
@_with_settings
def serve(settings: FabricSettings) -> None:
    """Run the controller until SIGTERM; logs are JSON lines on standard error."""
    from fabric_controller import controller

    try:
        controller.serve(settings)
    except controller.AlreadyRunningError:
        _fail("another controller runs with this data directory", "mhsm-fabric status")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", "check the paths in the settings file")


def _render(pool_id: str, picture: Picture) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(f"pool {pool_id}: {picture.serving_count} of {len(picture.partitions)} serving")
    table = Table(title=title, title_justify="left")
    for heading in ("partition", "state", "fresh", "applied", "serving seen", "failure"):
        table.add_column(heading)
    for view in picture.partitions:
        status = view.status if view.failure is None else None
        cells = ("-", "-", "-", "-")
        if status is not None:
            fresh = "yes" if status.fresh else "no"
            cells = (status.state.value, fresh, str(status.applied_sequence), str(status.serving_count))
        table.add_row(str(view.index), *cells, view.failure.code if view.failure else "")
    Console().print(table)


def _suggest(picture: Picture) -> str | None:
    from fabric_controller.observe import State

    states = {
        view.index: view.status.state for view in picture.partitions if view.status and not view.failure
    }
    drained = [index for index, state in states.items() if state is State.DRAINED]
    if State.LOCKED in states.values():
        return "a quorum of officers must unlock the pool"
    if State.QUARANTINED in states.values():
        return "see the log of the quarantined partition"
    if drained:
        return f"mhsm-fabric resume {drained[0]}"
    if picture.serving_count < len(picture.partitions):
        return "mhsm-fabric status --watch"
    return None


@cli.command()
@click.option("--watch", is_flag=True, help="Look again every second, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a look, one a line.")
@_with_settings
def status(settings: FabricSettings, *, watch: bool, as_json: bool) -> None:
    """Ask every partition how it is. Fails (5) when none answers."""
    from fabric_controller.controller import status_document
    from fabric_controller.observe import blank, observe

    picture = blank(partition.index for partition in settings.partitions)
    pause = threading.Event()
    with _client(settings) as client:
        try:
            while True:
                picture, _ = observe(picture, client.get_status_of_all())
                if as_json:
                    click.echo(json.dumps(status_document(settings.pool_id, picture)))
                else:
                    _render(settings.pool_id, picture)
                if not watch:
                    break
                pause.wait(WATCH_SECONDS)
        except KeyboardInterrupt:
            # The way to end --watch, so no failure of its own.
            if not watch:
                raise
    if picture.answering_count == 0:
        _fail("no partition answers", "start the pool, then mhsm-fabric status", EXIT_UNREACHABLE)
    suggestion = _suggest(picture)
    if suggestion is not None:
        click.echo(f"next: {suggestion}", err=True)


def _command(settings: FabricSettings, partition: int, verb: str) -> State:
    from fabric_controller.enclave_client import EnclaveError

    if partition not in {entry.index for entry in settings.partitions}:
        raise click.BadParameter(f"the pool has no partition {partition}", param_hint="PARTITION")
    with _client(settings) as client:
        try:
            return client.drain(partition) if verb == "drain" else client.resume(partition)
        except EnclaveError as error:
            if error.unreachable:
                _fail(
                    f"partition {partition} did not answer ({error.code}); it may or may not have obeyed",
                    f"mhsm-fabric status, then repeat the {verb} if needed",
                    EXIT_UNREACHABLE,
                )
            _fail(f"partition {partition} refused the {verb} ({error.code})", "mhsm-fabric status")


@cli.command()
@click.argument("partition", type=click.IntRange(min=0))
@_with_settings
def drain(settings: FabricSettings, *, partition: int) -> None:
    """Take PARTITION out of service; refused if fewer than two would go on serving."""
    state = _command(settings, partition, "drain")
    click.echo(f"partition {partition}: {state.value}")
    click.echo(f"next: mhsm-fabric resume {partition}", err=True)


@cli.command()
@click.argument("partition", type=click.IntRange(min=0))
@_with_settings
def resume(settings: FabricSettings, *, partition: int) -> None:
    """Put PARTITION back into service."""
    state = _command(settings, partition, "resume")
    click.echo(f"partition {partition}: {state.value}")
    click.echo("next: mhsm-fabric status", err=True)


def main() -> None:
    """Entry point of ``mhsm-fabric``."""
    # The C core prints texts of the other side (certificates, addresses) to standard error otherwise.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    cli(prog_name="mhsm-fabric")
