"""The roles of a rehearsal: custom roles, and assignments at the pool and at keys."""

from __future__ import annotations

from hsm_pool.client.pool import Pool

_KEY_SCOPES = ("/keys/rehearsal-00000", "/keys/rehearsal-00001")


def make(administrator: Pool) -> None:
    """Make two custom roles and give them, and built-in ones, to people and groups."""
    signers = administrator.create_role_definition(
        "Rehearsal signers", ["keys/read/action", "keys/sign/action"], description="sign and read"
    )
    others = administrator.create_role_definition(
        "Rehearsal others",
        ["keys/read/action", "keys/verify/action"],
        not_data_actions=["keys/read/action"],
    )
    built_in = [role.role_definition_id for role in administrator.list_role_definitions()][:3]
    for number, role in enumerate([signers.role_definition_id, others.role_definition_id, *built_in]):
        administrator.create_role_assignment(f"client/rehearsal-{number}", role)
        for scope in _KEY_SCOPES:
            administrator.create_role_assignment(f"client/rehearsal-{number}", role, scope)


def record(administrator: Pool) -> set[bytes]:
    """Return all roles and assignments that :func:`make` and the pool itself made, serialised."""
    definitions = [
        role.SerializeToString(deterministic=True) for role in administrator.list_role_definitions()
    ]
    assignments = [
        assignment.SerializeToString(deterministic=True)
        for scope in ("/", *_KEY_SCOPES)
        for assignment in administrator.list_role_assignments(scope)
    ]
    return {*definitions, *assignments}


def mismatches(before: set[bytes], administrator: Pool) -> list[str]:
    """Return what differs in a pool from what was known: nothing, after a good recovery."""
    after = record(administrator)
    lost, added = len(before - after), len(after - before)
    return [f"{lost} roles or assignments are lost, {added} are not the backup's"] if lost or added else []
