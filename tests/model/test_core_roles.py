"""Roles decided by the pure core, command by command, against the reference model (G2, G8).

Whatever is given, taken, made, changed or deleted: afterwards every principal may do at every scope
exactly what the reference says, over all data actions.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hsm_pool.core import lifecycle, roles
from hsm_pool.core.commands import (
    Command,
    CreateRoleAssignment,
    CreateRoleDefinition,
    DeleteRoleAssignment,
    DeleteRoleDefinition,
)
from hsm_pool.core.model import POOL, PoolRecord, RoleAssignment, RoleDefinitionRecord
from hsm_pool.core.roles import Access, DataAction
from hsm_pool.core.state import Overlay, State
from hsm_pool.errors import MHSMError
from tests.model.reference import Assignment, ReferencePool, Refused
from tests.role_tables import ACTIONS, GUIDS

CUSTOM = [f"00000000-0000-4000-8000-{number:012x}" for number in range(3)]

principals = st.sampled_from(["client/ann", "client/bob"])
scopes = st.sampled_from(["/", "/keys", "/keys/a", "/keys/b"])
every_role = st.sampled_from([*GUIDS.values(), *CUSTOM, *CUSTOM])
custom = st.sampled_from([*CUSTOM, GUIDS["Crypto User"]])
data_actions = st.frozensets(st.sampled_from(sorted(ACTIONS)), min_size=1)


class RoleMachine(RuleBasedStateMachine):
    """Commands on an overlay that is committed now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.state.apply({POOL: PoolRecord(7)})
        self.overlay = Overlay(self.state)
        self.reference = ReferencePool()
        self.names: list[tuple[str, str]] = []
        """(name, scope) of each assignment that was asked for."""

    def both(self, command: Command, model: Callable[[], None]) -> None:
        """Let both decide: the same refusal, or none."""
        reason = wanted = ""
        try:
            self.overlay.put(lifecycle.apply(command, self.overlay).changes)
        except MHSMError as error:
            reason = error.reason
        try:
            model()
        except Refused as refused:
            wanted = refused.reason
        assert reason == wanted, command

    @rule(principal=principals, role=every_role, scope=scopes)
    def assign(self, principal: str, role: str, scope: str) -> None:
        name = f"name-{len(self.names)}"
        self.names.append((name, scope))
        command = CreateRoleAssignment(RoleAssignment(name, principal, role, scope))
        self.both(command, lambda: self.reference.assign(name, Assignment(principal, role, scope)))

    @rule(data=st.data(), scope=scopes)
    def revoke(self, data: st.DataObject, scope: str) -> None:
        name, at = data.draw(st.sampled_from([*self.names, ("unknown", scope)]))
        self.both(DeleteRoleAssignment(at, name), lambda: self.reference.revoke(name, at))

    @rule(data=st.data(), scope=scopes)
    def revoke_elsewhere(self, data: st.DataObject, scope: str) -> None:
        """An assignment is named by its scope, too."""
        name, _ = data.draw(st.sampled_from([*self.names, ("unknown", scope)]))
        self.both(DeleteRoleAssignment(scope, name), lambda: self.reference.revoke(name, scope))

    @rule(role=custom, allowed=data_actions, excluded=data_actions)
    def define(self, role: str, allowed: frozenset[str], excluded: frozenset[str]) -> None:
        record = RoleDefinitionRecord(
            role, f"role {role}", "", tuple(sorted(allowed)), tuple(sorted(excluded))
        )
        command = CreateRoleDefinition(record)
        self.both(command, lambda: self.reference.define(role, allowed, excluded))

    @rule(role=custom)
    def undefine(self, role: str) -> None:
        self.both(DeleteRoleDefinition(role), lambda: self.reference.undefine(role))

    @rule()
    def commit(self) -> None:
        self.state.apply(self.overlay.changes)
        self.overlay = Overlay(self.state)

    @invariant()
    def everybody_may_do_what_the_reference_says(self) -> None:
        for principal in ("client/ann", "client/bob", "client/nobody"):
            for scope in ("/", "/keys/a", "/keys/b", "/keys/c"):
                seen = {action.value for action in DataAction if self.permitted(principal, action, scope)}
                assert seen == {action for action in ACTIONS if self.wanted(principal, action, scope)}

    def permitted(self, principal: str, action: DataAction, scope: str) -> bool:
        try:
            roles.check(self.overlay, Access((principal,), action, scope))
        except MHSMError as error:
            assert error.reason == "PERMISSION_DENIED"
            return False
        return True

    def wanted(self, principal: str, action: str, scope: str) -> bool:
        try:
            self.reference.permit(principal, action, scope)
        except Refused:
            return False
        return True


def test_the_core_decides_roles_as_the_reference(full: bool, seed: int) -> None:
    """G2, G8: 40 stories of up to 30 commands (400 with --full)."""
    chosen = settings(
        max_examples=400 if full else 40,
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seeded(seed)(RoleMachine), settings=chosen)
