"""What happens to roles in a story: given, taken, made, changed and deleted, by whoever may."""

from __future__ import annotations

import uuid

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.model.pool_story import UNKNOWN_GUID, Story, partitions, positions
from tests.model.reference import Assignment
from tests.role_tables import ACTIONS, GUIDS

managers = st.sampled_from(["administrator", "administrator", "ann", "bob"])
principals = st.sampled_from(["ann", "bob"])
scopes = st.sampled_from(["/", "/keys", "/keys/a", "/keys/b"])
built_in = st.sampled_from(
    [
        GUIDS[name]
        for name in (
            "Crypto User",
            "Crypto Officer",
            "Crypto Auditor",
            "Crypto Service Encryption User",
            "Crypto Service Release User",
            "Policy Administrator",
        )
    ]
)
data_actions = st.frozensets(st.sampled_from(sorted(ACTIONS)), min_size=1)


class RoleRules(Story):
    """Rules about roles."""

    # -- roles ---------------------------------------------------------------------------

    @rule(who=managers, partition=partitions, principal=principals, role=built_in, scope=scopes)
    def assign(self, who: str, partition: int, principal: str, role: str, scope: str) -> None:
        name, given = str(uuid.uuid4()), Assignment(principal, role, scope)
        self.both(
            who,
            partition,
            "CreateRoleAssignment",
            scope,
            lambda client: client.create_role_assignment(
                f"client/{principal}", role, self.scope(scope), name=name
            ),
            lambda _: self.reference.assign(name, given),
        )

    @rule(who=managers, partition=partitions, principal=principals, position=positions, scope=scopes)
    def assign_custom(self, who: str, partition: int, principal: str, position: int, scope: str) -> None:
        self.assign(who, partition, principal, [*self.custom, UNKNOWN_GUID][position % 3], scope)

    @rule(who=managers, partition=partitions, position=positions)
    def revoke(self, who: str, partition: int, position: int) -> None:
        """One of the story's assignments, or one that there is not."""
        self.revoke_named(who, partition, [*self.given(), UNKNOWN_GUID][position % (len(self.given()) + 1)])

    def revoke_named(self, who: str, partition: int, name: str) -> None:
        scope = self.reference.assignments[name].scope if name in self.reference.assignments else "/keys/a"
        self.both(
            who,
            partition,
            "DeleteRoleAssignment",
            scope,
            lambda client: client.delete_role_assignment(name, self.scope(scope)),
            lambda _: self.reference.revoke(name, scope),
        )

    @rule(who=managers, partition=partitions, position=positions, allowed=data_actions, excluded=data_actions)
    def define(
        self, who: str, partition: int, position: int, allowed: frozenset[str], excluded: frozenset[str]
    ) -> None:
        """Make a custom role, or change what one that is assigned allows."""
        role = self.custom[position % 2]
        self.both(
            who,
            partition,
            "CreateRoleDefinition",
            "/",
            lambda client: client.create_role_definition(
                f"role {role}",
                sorted(allowed),
                not_data_actions=sorted(excluded),
                role_definition_id=role,
            ),
            lambda _: self.reference.define(role, allowed, excluded),
        )

    @rule(who=managers, partition=partitions, position=positions)
    def undefine(self, who: str, partition: int, position: int) -> None:
        role = [*self.custom, UNKNOWN_GUID, GUIDS["Crypto User"]][position]
        self.both(
            who,
            partition,
            "DeleteRoleDefinition",
            "/",
            lambda client: client.delete_role_definition(role),
            lambda _: self.reference.undefine(role),
        )

    @rule(who=managers, partition=partitions, scope=scopes)
    def list_assignments(self, who: str, partition: int, scope: str) -> None:
        """Those of the whole pool together, or those at a key."""
        whole = {"/", "/keys"}
        answer, _ = self.both(
            who,
            partition,
            "ListRoleAssignments",
            scope,
            lambda client: list(client.list_role_assignments(self.scope(scope))),
            lambda _: None,
        )
        if answer is not None:
            wanted = {
                (name, f"client/{given.principal}", given.role, self.scope(given.scope))
                for name, given in self.given().items()
                if given.scope == scope or {given.scope, scope} <= whole
            }
            assert wanted == {
                (found.name, found.principal_id, found.role_definition_id, found.scope)
                for found in answer
                if found.principal_id in {"client/ann", "client/bob"}
            }
