"""What all commands of ``mhsm-fabric`` share: settings, exit codes, one way to fail."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    from fabric_controller.enclave_client import EnclaveClient
    from fabric_controller.journal import Journal, JournalDamaged
    from fabric_controller.observe import Picture
    from fabric_controller.settings import FabricSettings

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 5
EXIT_INTERRUPTED: Final = 130

JOURNAL_DAMAGED: Final = "keep the file as evidence, move it away, and start the controller again"
"""What to do about a damaged journal."""

HUNG: Final = (
    "one that hangs is started anew when it is killed: "
    "kill -9 the fabric_controller.process_id of mhsm status --json"
)
"""What to do about a controller that does not show itself in a pool that runs."""

_PLACE: Final = "fabric_controller.place"
"""Key of the context's options that say where the pool is, as they were given."""


def suggest(lines: str) -> None:
    """Print what to do next, one a line: "next:" before a whole command, "hint:" before words.

    Commands get the --data-dir or --settings that was given.
    """
    for line in _at_the_same_pool(lines):
        click.echo(f"{'next' if line.startswith('mhsm') else 'hint'}: {line}", err=True)


def _at_the_same_pool(lines: str) -> list[str]:
    context = click.get_current_context(silent=True)
    given = context.meta.get(_PLACE, "") if context else ""

    def takes(line: str) -> bool:
        return line.startswith("mhsm-fabric ") or (line.startswith("mhsm ") and "--data-dir" in given)

    return [f"{x}{given}" if takes(x) and "--data-dir" not in x else x for x in lines.splitlines()]


def fail(
    message: str, suggestion: str, code: int = EXIT_FAILED, *, reason: str = "", definite: bool = True
) -> NoReturn:
    """End with an error and what comes next, see :func:`suggest`; with --json as one object, as mhsm does.

    Args:
        message: What happened.
        suggestion: What to do, one a line.
        code: Exit code.
        reason: The code of a partition's refusal.
        definite: Whether nothing was done.
    """
    show_error(message, suggestion, code, reason=reason, definite=definite)
    raise SystemExit(code)


def show_error(
    message: str,
    suggestion: str,
    code: int,
    *,
    reason: str = "",
    definite: bool = True,
    prefix: str = "error",
) -> None:
    """Print an error; every command takes --json, so it is looked for before anything is parsed."""
    if "--json" not in sys.argv[1:]:
        click.echo(f"{prefix}: {message}", err=True)
        return suggest(suggestion)
    told = {"message": message, "reason": reason, "definite": definite, "exit_code": code}
    lines = _at_the_same_pool(suggestion)
    commands = [line for line in lines if line.startswith("mhsm")]
    hints = [line for line in lines if line not in commands]
    return click.echo(json.dumps({"error": {**told, "next": commands, "hints": hints}}), err=True)


def say(text: str, document: dict[str, Any], *, as_json: bool, suggestion: str | None = None) -> None:
    """Print a result: a line for people, or one JSON object; what comes next to standard error."""
    click.echo(json.dumps(document) if as_json else text)
    if suggestion is not None:
        suggest(suggestion)


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
    except (FileNotFoundError, NotADirectoryError):
        fail(f"{path} is not there: the pool does not run", "mhsm up", EXIT_UNREACHABLE)
    except OSError as error:
        fail(f"{path}: {error.strerror}", "check the permissions of the settings file")
    except SettingsError as error:
        fail(f"{path}: {error}", "correct the file; it is written when the pool is made")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
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
    def loaded(
        *arguments: Any, settings_file: Path | None, data_directory: Path | None, **options: Any
    ) -> None:
        for option, path in (("--settings", settings_file), ("--data-dir", data_directory)):
            if path is not None:
                click.get_current_context().meta[_PLACE] = f" {option} {shlex.quote(str(path))}"
        command(_load_settings(settings_file, data_directory), *arguments, **options)

    return loaded


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


def open_client(settings: FabricSettings) -> EnclaveClient:
    """Return a client of the partitions."""
    from fabric_controller.enclave_client import EnclaveClient

    try:
        return EnclaveClient(settings)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", "check identity in the settings file")


def journal_or_damage(settings: FabricSettings) -> Journal | JournalDamaged:
    """Return the journal, or what is the matter with it."""
    from fabric_controller.journal import Journal, JournalDamaged

    try:
        return Journal(Path(settings.data_directory), settings.indexes)
    except JournalDamaged as error:
        return error
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", "check data_directory in the settings file")


def open_journal(settings: FabricSettings) -> Journal:
    """Return the journal."""
    found = journal_or_damage(settings)
    if isinstance(found, Exception):
        fail_for_damage(settings, found)
    return found


def fail_for_damage(settings: FabricSettings, damage: JournalDamaged) -> NoReturn:
    """End a command because of a damaged journal."""
    fail(f"{settings.data_directory}: {damage}", JOURNAL_DAMAGED)


def confirm(question: str) -> None:
    """Ask before something that --yes allows; ends the command at "no", or where nobody can be asked."""
    if not sys.stdin.isatty():
        fail(f"{question}: there is no terminal to ask at", "give --yes if it is meant", EXIT_USAGE)
    if not click.confirm(question, err=True):
        fail("nothing was done", "mhsm-fabric status")


def see(settings: FabricSettings, client: EnclaveClient, before: Picture | None = None) -> Picture:
    """Return the pool as it is now; takes at most two deadlines.

    All are asked again when one was silent: on a busy machine a first connection may take longer than
    one deadline, and a partition may refuse a look because others look at the same moment.
    """
    from fabric_controller.observe import blank, observe

    picture, _ = observe(before or blank(settings.indexes), client.get_status_of_all())
    if picture.answering_count < len(settings.indexes):
        picture, _ = observe(picture, client.get_status_of_all())
    return picture


def look(settings: FabricSettings, client: EnclaveClient) -> Picture:
    """Return the pool as it is now; ends the command when no partition answers."""
    picture = see(settings, client)
    if picture.answering_count == 0:
        fail("no partition answers", "mhsm up\nmhsm-fabric status", EXIT_UNREACHABLE)
    return picture


def check_partition(settings: FabricSettings, partition: int) -> None:
    """Refuse a partition that the pool does not have."""
    if partition not in settings.indexes:
        raise click.BadParameter(f"the pool has no partition {partition}", param_hint="PARTITION")
