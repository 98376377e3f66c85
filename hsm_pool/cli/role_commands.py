"""mhsm role: role definitions and role assignments (local RBAC)."""

from __future__ import annotations

import re
from typing import Any

import click
from google.protobuf.json_format import MessageToDict

from hsm_pool.cli.output import caller_options, connect, fail, report, request_id_option
from hsm_pool.client.pool import Pool
from hsm_pool.core.roles import BUILT_IN_ROLES
from hsm_pool.errors import PermissionDenied
from mhsm.roles.v1 import roles_pb2

_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PREFIX = "Managed HSM "
_scope = click.option(
    "--scope", default="/", show_default=True, help="/ or /keys for the whole pool, /keys/NAME for one key."
)
_as_administrator = caller_options("administrator")


@click.group("role")
def role_group() -> None:
    """Who may do what: role definitions, and role assignments at a scope."""


@role_group.group("definition")
def definition_group() -> None:
    """Built-in roles, and custom roles of data actions."""


@role_group.group("assignment")
def assignment_group() -> None:
    """Roles given to principals."""


@definition_group.command("list")
@_as_administrator
def list_definitions(**common: Any) -> None:
    """List all roles."""
    with connect(common) as pool:
        found = list(pool.list_role_definitions())
    report(
        {"role_definitions": [MessageToDict(entry) for entry in found]},
        as_json=common["as_json"],
        text="\n".join(f"{entry.role_definition_id}  {entry.role_name}" for entry in found),
        following="mhsm role definition show NAME",
    )


@definition_group.command("show")
@click.argument("role")
@_as_administrator
def show_definition(role: str, **common: Any) -> None:
    """Show a role, by name or GUID, with its data actions."""
    with connect(common) as pool:
        found = _find(pool, role)
    _report_definition(found, common, f"{found.role_name} ({found.role_definition_id})", "")


@definition_group.command("create")
@click.argument("name")
@click.option("--data-action", "data_actions", multiple=True, required=True, help="Repeatable.")
@click.option("--not-data-action", "not_data_actions", multiple=True, help="Taken off again; repeatable.")
@click.option("--description", default="")
@click.option("--id", "role_definition_id", default="", help="GUID; replaces the custom role of that id.")
@request_id_option
@_as_administrator
def create_definition(
    name: str, data_actions: tuple[str, ...], not_data_actions: tuple[str, ...], **options: Any
) -> None:
    """Create a custom role, e.g. --data-action keys/sign/action."""
    with connect(options) as pool:
        made = pool.create_role_definition(
            name,
            data_actions,
            not_data_actions=not_data_actions,
            description=options["description"],
            role_definition_id=options["role_definition_id"],
            request_id=options["request_id"],
        )
    following = f"mhsm role assignment create --role {made.role_definition_id} --assignee client/NAME"
    _report_definition(made, options, f"made {made.role_name} ({made.role_definition_id})", following)


@definition_group.command("delete")
@click.argument("role")
@request_id_option
@_as_administrator
def delete_definition(role: str, request_id: str, **common: Any) -> None:
    """Delete a custom role; what it was assigned to is then allowed nothing by it."""
    with connect(common) as pool:
        deleted = pool.delete_role_definition(_find(pool, role).role_definition_id, request_id)
    _report_definition(deleted, common, f"deleted {deleted.role_name}", "mhsm role definition list")


@assignment_group.command("create")
@click.option("--role", required=True, help="Name or GUID.")
@click.option("--assignee", required=True, help="client/NAME of a certificate, or a GUID of a token.")
@_scope
@click.option("--name", default="", help="GUID of the assignment; a new one by default.")
@request_id_option
@_as_administrator
def create_assignment(role: str, assignee: str, scope: str, **options: Any) -> None:
    """Give a role to a principal."""
    with connect(options) as pool:
        names = _names(pool)
        role_definition_id = role if _GUID.fullmatch(role) else _find(pool, role).role_definition_id
        made = pool.create_role_assignment(
            assignee, role_definition_id, scope, name=options["name"], request_id=options["request_id"]
        )
    _report_assignment(made, names, options, "has", _list_command(scope))


@assignment_group.command("list")
@click.option(
    "--scope", default="", help="/ or /keys for the whole pool, /keys/NAME for one key; all by default."
)
@click.option("--assignee", default="", help="Only this principal's.")
@_as_administrator
def list_assignments(scope: str, assignee: str, **common: Any) -> None:
    """List the role assignments, at a scope or all."""
    with connect(common) as pool:
        found = list(pool.list_role_assignments(scope, assignee))
        names = _names(pool)
    rows = [("assignment", "principal", "role", "scope", "role's GUID")] + [
        (entry.name, entry.principal_id, _name(entry, names) or "-", entry.scope, entry.role_definition_id)
        for entry in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    report(
        {"role_assignments": [_assignment(entry, names) for entry in found]},
        as_json=common["as_json"],
        text="\n".join(lines) if found else f"no role assignment{f' at {scope}' if scope else ''}",
        following="mhsm role definition list",
    )


@assignment_group.command("show")
@click.argument("name")
@_scope
@_as_administrator
def show_assignment(name: str, scope: str, **common: Any) -> None:
    """Show a role assignment, by its GUID."""
    with connect(common) as pool:
        found = pool.get_role_assignment(name, scope)
        names = _names(pool)
    following = f"mhsm role definition show {found.role_definition_id}"
    _report_assignment(found, names, common, "has", following)


@assignment_group.command("delete")
@click.argument("name")
@_scope
@request_id_option
@_as_administrator
def delete_assignment(name: str, scope: str, request_id: str, **common: Any) -> None:
    """Take a role away, by the GUID of the assignment; no partition uses it afterwards."""
    with connect(common) as pool:
        names = _names(pool)
        deleted = pool.delete_role_assignment(name, scope, request_id)
    _report_assignment(deleted, names, common, "no longer has", _list_command(scope))


def _find(pool: Pool, role: str) -> roles_pb2.RoleDefinition:
    """Return a role by its GUID or its name, of built-in ones also without "Managed HSM"."""
    if _GUID.fullmatch(role):
        return pool.get_role_definition(role)
    by_name = {found.role_name.casefold(): found for found in pool.list_role_definitions()}
    for wanted in (role, f"{_PREFIX}{role}"):
        if wanted.casefold() in by_name:
            return by_name[wanted.casefold()]
    fail(f"no role is named {role}", "mhsm role definition list")


def _names(pool: Pool) -> dict[str, str]:
    """Return the names of roles by GUID: of all, or of the built-in ones if the caller may not list them."""
    try:
        return {found.role_definition_id: found.role_name for found in pool.list_role_definitions()}
    except PermissionDenied:
        return {role.role_definition_id: role.role_name for role in BUILT_IN_ROLES.values()}


def _list_command(scope: str) -> str:
    return f"mhsm role assignment list --scope {scope}"


def _report_definition(
    found: roles_pb2.RoleDefinition, common: dict[str, Any], text: str, following: str
) -> None:
    lines = [text, *(f"  {action}" for action in found.data_actions)]
    lines += [f"  not {action}" for action in found.not_data_actions]
    value = {"role_definition": MessageToDict(found)}
    report(value, as_json=common["as_json"], text="\n".join(lines), following=following)


def _name(found: roles_pb2.RoleAssignment, names: dict[str, str]) -> str | None:
    """Return the name of an assignment's role; None when it was deleted, or is not known."""
    return names.get(found.role_definition_id)


def _assignment(found: roles_pb2.RoleAssignment, names: dict[str, str]) -> dict[str, Any]:
    return {**MessageToDict(found), "roleName": _name(found, names)}


def _report_assignment(
    found: roles_pb2.RoleAssignment, names: dict[str, str], common: dict[str, Any], has: str, following: str
) -> None:
    role = _name(found, names) or "a role that is not known"
    lines = [
        f"{found.principal_id} {has} {role} ({found.role_definition_id}) at {found.scope}",
        f"  assignment {found.name}",
    ]
    value = {"role_assignment": _assignment(found, names)}
    report(value, as_json=common["as_json"], text="\n".join(lines), following=following)
