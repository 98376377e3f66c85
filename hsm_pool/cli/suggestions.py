"""What to do next: suggested commands and hints, one a line."""

from __future__ import annotations

import re
import shlex

import click
from click.core import ParameterSource

from hsm_pool.errors import (
    DeletedKeyNotFound,
    InvalidField,
    KeyExists,
    KeyNotFound,
    KeyNotUsable,
    KeySoftDeleted,
    LimitExceeded,
    MHSMError,
    OperationNotPermitted,
    PurgeProtected,
    RotationPolicyMissing,
)

COMMAND = re.compile(r"(?:mhsm|mhsm-fabric|openssl|apt-get) [a-z]")
"""How a whole command begins; any other line is words."""


def say_next(following: str) -> None:
    """Print what to do next, one a line: "next:" before a whole command, "hint:" before words."""
    for line in following.splitlines():
        click.echo(f"{'next' if COMMAND.match(line) else 'hint'}: {line}", err=True)


def at_the_same_pool(following: str) -> str:
    """Return suggested commands, one a line, each for the pool and the client that were named, if any was."""
    return "\n".join(_at_the_same_pool(line) for line in following.splitlines())


def _at_the_same_pool(following: str) -> str:
    context = click.get_current_context(silent=True)
    if not context or not COMMAND.match(following) or following.endswith("--help"):
        return following
    named = "".join(
        f" {option} {shlex.quote(str(context.params[name]))}"
        for name, option in (("data_dir", "--data-dir"), ("client", "--as"))
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and _takes(context, following.split(), name)
    )
    return following + named


def _takes(context: click.Context, words: list[str], name: str) -> bool:
    """Return whether a suggested command takes what was given to this one.

    A client is meant for its neighbours: whoever uses a key need not be the one who manages its roles.
    """
    if words[0] == "mhsm-fabric":
        return name == "data_dir"
    if words[0] != "mhsm" or (name == "client" and words[1] not in context.command_path.split()):
        return False
    command: click.Command | None = context.find_root().command
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(context, word)
    return command is not None and any(parameter.name == name for parameter in command.params)


def after_refusal(error: MHSMError, named: str) -> str:
    """Return what to do when the pool refused a command for its keys and roles; "" for nothing.

    Args:
        error: The refusal.
        named: The key, or its version, that the command was given; NAME if it was given a file.
    """
    named = error.metadata.get("key", named)
    key = named.removeprefix("keys/").partition("/")[0]
    match error:
        case KeyNotUsable(metadata={"cause": "disabled"}):
            return f"mhsm key update {named} --enable"
        case KeySoftDeleted() | KeyExists(metadata={"state": "deleted"}):
            return f"mhsm key recover {key}\nmhsm key purge {key}"
        case KeyNotUsable() | KeyExists(metadata={"state": "active"}) | OperationNotPermitted():
            return f"mhsm key show {named}"
        case KeyNotFound():
            return "mhsm key list"
        case DeletedKeyNotFound():
            return "mhsm key list-deleted\na key is deleted before it is purged"
        case PurgeProtected():
            return f"mhsm key show-deleted {key}"
        case RotationPolicyMissing():
            return f"mhsm key rotation-policy update {key} --time-after-create P90D"
        case LimitExceeded(metadata={"limit": "keys"}):
            return "mhsm key list-deleted\nmhsm key purge NAME"
        case InvalidField(metadata={"field": "data_actions" | "not_data_actions"}):
            return 'mhsm role definition show "Crypto User"\nall data actions: docs/roles.md'
        case _:
            return ""
