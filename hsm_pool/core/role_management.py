"""Role definitions and role assignments, decided purely.

An assignment is kept with its principal: a check reads one record for each principal, and
only operations of that principal wait while it changes. What lists and refusals rest on is
the one record ROLES, which every change touches.

As the real service, a role whose definition is deleted can stay assigned: it then allows
nothing. A key that is purged leaves the assignments at its scope.
"""

from __future__ import annotations

from dataclasses import replace

from hsm_pool import limits
from hsm_pool.core import roles
from hsm_pool.core.commands import (
    CreateRoleAssignment,
    CreateRoleDefinition,
    DeleteRoleAssignment,
    DeleteRoleDefinition,
    RoleAssignmentReply,
    RoleDefinitionReply,
)
from hsm_pool.core.model import (
    ROLES,
    PrincipalRecord,
    Record,
    RecordName,
    RoleAssignment,
    RoleDefinitionRecord,
    RolesRecord,
    principal_name,
    role_definition_name,
)
from hsm_pool.core.state import Changes, View
from hsm_pool.errors import (
    InvalidField,
    LimitExceeded,
    RoleAssignmentExists,
    RoleAssignmentNotFound,
    RoleDefinitionNotFound,
)

RoleCommand = CreateRoleDefinition | DeleteRoleDefinition | CreateRoleAssignment | DeleteRoleAssignment
RoleReply = RoleDefinitionReply | RoleAssignmentReply


def apply(command: RoleCommand, view: View) -> tuple[RoleReply, Changes]:
    """Decide a command.

    Raises:
        MHSMError: It is refused.
    """
    match command:
        case CreateRoleDefinition():
            return _create_definition(command, view)
        case DeleteRoleDefinition():
            return _delete_definition(command, view)
        case CreateRoleAssignment():
            return _create_assignment(command, view)
        case DeleteRoleAssignment():
            return _delete_assignment(command, view)


def custom_definitions(view: View) -> list[RoleDefinitionRecord]:
    """Return the custom role definitions, by id."""
    found = [record for record in view.role_records() if isinstance(record, RoleDefinitionRecord)]
    return sorted(found, key=lambda record: record.role_definition_id)


def definition(view: View, role_definition_id: str) -> RoleDefinitionRecord:
    """Return a role definition, built-in or custom.

    Raises:
        RoleDefinitionNotFound: No such role.
    """
    built_in = roles.BUILT_IN_ROLES.get(role_definition_id)
    if built_in:
        return built_in_record(built_in)
    record = view.get(role_definition_name(role_definition_id))
    if not isinstance(record, RoleDefinitionRecord):
        raise RoleDefinitionNotFound(f"no role definition {role_definition_id}")
    return record


def built_in_record(role: roles.BuiltInRole) -> RoleDefinitionRecord:
    """Return a built-in role in the form of a custom one."""
    actions = tuple(sorted(action.value for action in role.data_actions))
    return RoleDefinitionRecord(role.role_definition_id, role.role_name, role.description, actions, ())


def assignments(view: View) -> list[RoleAssignment]:
    """Return all role assignments, by scope and name."""
    found = [
        assignment
        for record in view.role_records()
        if isinstance(record, PrincipalRecord)
        for assignment in record.assignments
    ]
    return sorted(found, key=lambda assignment: (assignment.scope, assignment.name))


def assignment(view: View, scope: str, name: str) -> RoleAssignment:
    """Return a role assignment.

    Raises:
        RoleAssignmentNotFound: No such assignment at that scope.
    """
    view.get(ROLES)
    for found in assignments(view):
        if (found.scope, found.name) == (scope, name):
            return found
    raise RoleAssignmentNotFound(f"no role assignment {name} at {scope}")


def initial(assigned: list[RoleAssignment]) -> Changes:
    """Return the records of the assignments a pool begins with."""
    changes: dict[RecordName, Record | None] = {ROLES: RolesRecord(1)}
    for entry in assigned:
        record = changes.get(principal_name(entry.principal_id))
        before = record.assignments if isinstance(record, PrincipalRecord) else ()
        changes[principal_name(entry.principal_id)] = PrincipalRecord(entry.principal_id, (*before, entry))
    return changes


def _create_definition(
    command: CreateRoleDefinition, view: View
) -> tuple[RoleDefinitionReply, dict[RecordName, Record | None]]:
    record = command.definition
    touched = _touched(view)
    full_names = {role.role_name.casefold() for role in roles.BUILT_IN_ROLES.values()}
    # Commands take them without their first words, too: a custom role must not be meant by that.
    built_in_names = full_names | {name.removeprefix("managed hsm ") for name in full_names}
    if record.role_definition_id in roles.BUILT_IN_ROLES or record.role_name.casefold() in built_in_names:
        raise InvalidField("this is the name or GUID of a built-in role", field="role_definition_id")
    others = [
        other for other in custom_definitions(view) if other.role_definition_id != record.role_definition_id
    ]
    if any(other.role_name.casefold() == record.role_name.casefold() for other in others):
        raise InvalidField("another custom role has this name", field="role_name")
    if len(others) >= limits.ROLE_DEFINITIONS_MAX:
        raise LimitExceeded(f"the pool has {limits.ROLE_DEFINITIONS_MAX} custom role definitions")
    return RoleDefinitionReply(record), {role_definition_name(record.role_definition_id): record, **touched}


def _delete_definition(
    command: DeleteRoleDefinition, view: View
) -> tuple[RoleDefinitionReply, dict[RecordName, Record | None]]:
    if command.role_definition_id in roles.BUILT_IN_ROLES:
        raise InvalidField("a built-in role cannot be deleted", field="role_definition_id")
    record = definition(view, command.role_definition_id)
    return RoleDefinitionReply(record), {
        role_definition_name(command.role_definition_id): None,
        **_touched(view),
    }


def _create_assignment(
    command: CreateRoleAssignment, view: View
) -> tuple[RoleAssignmentReply, dict[RecordName, Record | None]]:
    new = command.assignment
    touched = _touched(view)
    definition(view, new.role_definition_id)
    existing = assignments(view)
    for other in existing:
        same_name = (other.scope, other.name) == (new.scope, new.name)
        if same_name or replace(other, name=new.name) == new:
            raise RoleAssignmentExists("this role assignment exists", name=other.name, scope=other.scope)
    _check_room(existing, new)
    record = view.get(principal_name(new.principal_id))
    before = record.assignments if isinstance(record, PrincipalRecord) else ()
    changed = PrincipalRecord(new.principal_id, (*before, new))
    return RoleAssignmentReply(new), {principal_name(new.principal_id): changed, **touched}


def _check_room(existing: list[RoleAssignment], new: RoleAssignment) -> None:
    if roles.is_whole_pool(new.scope):
        count = sum(roles.is_whole_pool(other.scope) for other in existing)
        if count >= limits.ROLE_ASSIGNMENTS_AT_POOL_MAX:
            raise LimitExceeded(f"{count} role assignments hold for the whole pool", scope=new.scope)
    elif sum(other.scope == new.scope for other in existing) >= limits.ROLE_ASSIGNMENTS_AT_KEY_MAX:
        raise LimitExceeded(
            f"{new.scope} has {limits.ROLE_ASSIGNMENTS_AT_KEY_MAX} role assignments", scope=new.scope
        )
    if len(existing) >= limits.ROLE_ASSIGNMENTS_MAX:
        raise LimitExceeded(f"the pool has {limits.ROLE_ASSIGNMENTS_MAX} role assignments")
    of_principal = sum(other.principal_id == new.principal_id for other in existing)
    if of_principal >= limits.ROLE_ASSIGNMENTS_OF_PRINCIPAL_MAX:
        raise LimitExceeded(f"{new.principal_id} has {of_principal} role assignments")


def _delete_assignment(
    command: DeleteRoleAssignment, view: View
) -> tuple[RoleAssignmentReply, dict[RecordName, Record | None]]:
    found = assignment(view, command.scope, command.name)
    record = view.get(principal_name(found.principal_id))
    before = record.assignments if isinstance(record, PrincipalRecord) else ()
    left = tuple(other for other in before if other != found)
    changed = PrincipalRecord(found.principal_id, left) if left else None
    return RoleAssignmentReply(found), {principal_name(found.principal_id): changed, **_touched(view)}


def _touched(view: View) -> dict[RecordName, Record | None]:
    record = view.get(ROLES)
    return {ROLES: RolesRecord(record.changes + 1 if isinstance(record, RolesRecord) else 1)}
