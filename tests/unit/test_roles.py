"""Local RBAC in the pure core: every role, data action and scope; rules and limits of roles (G2, G8)."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_pool import errors, limits
from hsm_pool.audit.record import Operation
from hsm_pool.core import lifecycle, role_management, roles
from hsm_pool.core.commands import (
    AdvanceRestore,
    Command,
    CommitRestore,
    CreateKeyVersion,
    CreateRoleAssignment,
    CreateRoleDefinition,
    DeleteKey,
    DeleteRoleAssignment,
    DeleteRoleDefinition,
    PurgeDeletedKey,
    StageRecords,
    StartRestore,
)
from hsm_pool.core.model import (
    ROLES,
    Curve,
    KeyType,
    PrincipalRecord,
    RoleAssignment,
    RoleDefinitionRecord,
    SealedMaterial,
    principal_name,
    role_definition_name,
)
from hsm_pool.core.roles import Access, DataAction
from hsm_pool.core.state import Overlay, State
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.store import codec
from hsm_pool.store.committer import Committer, Mutation, _Submission
from hsm_pool.store.replica import Replica, boot_time
from hsm_pool.store.sealing import PoolKeys
from tests import role_tables

WHO = "client/somebody"
SCOPES = ("/", "/keys", "/keys/a", "/keys/b", "/keys/A")
SIGN = Access((WHO,), DataAction.KEYS_SIGN, "/keys/a")
USER = role_tables.GUIDS["Crypto User"]


def guid(number: int) -> str:
    return str(uuid.UUID(int=number))


def do(state: State, command: Command) -> object:
    """Decide and apply a command, within the bounds of a transaction."""
    outcome = lifecycle.apply(command, Overlay(state))
    assert len(outcome.changes) <= limits.OPERATIONS_PER_TRANSACTION_MAX - 2
    state.apply(outcome.changes)
    return outcome.reply


def assigned(role: str, scope: str = "/", principal: str = WHO, number: int = 1) -> RoleAssignment:
    return RoleAssignment(guid(number), principal, role, scope)


def give(state: State, *assignments: RoleAssignment) -> None:
    for assignment in assignments:
        do(state, CreateRoleAssignment(assignment))


def custom(number: int = 1, name: str = "signers", *actions: str) -> RoleDefinitionRecord:
    return RoleDefinitionRecord(guid(1000 + number), name, "", actions or ("keys/sign/action",), ())


def allowed(state: State, access: Access) -> bool:
    try:
        roles.check(state, access)
    except errors.PermissionDenied as refusal:
        assert refusal.metadata == {"action": access.action.full_name, "scope": access.scope}
        return False
    return True


# -- every role, data action and scope ---------------------------------------------------


def test_the_built_in_roles_are_azures() -> None:
    """The two tables, written down twice, are the same: names, GUIDs, data actions."""
    found = {role.role_name: role for role in roles.BUILT_IN_ROLES.values()}
    assert {name.removeprefix("Managed HSM "): role.role_definition_id for name, role in found.items()} == (
        role_tables.GUIDS
    )
    for name, role in found.items():
        actions = {action.value for action in role.data_actions}
        assert actions == role_tables.ALLOWED[name.removeprefix("Managed HSM ")], name
    assert {action.value for action in DataAction} == role_tables.ACTIONS


@pytest.mark.parametrize("role", role_tables.GUIDS)
def test_no_access_without_its_data_action_at_its_scope(role: str) -> None:
    """Each role, given at each scope, against each data action at each scope: the table, no more, no less."""
    for at in SCOPES:
        state = State()
        give(state, assigned(role_tables.GUIDS[role], at))
        for action, scope in itertools.product(DataAction, SCOPES):
            wanted = action.value in role_tables.ALLOWED[role] and (at in {"/", "/keys"} or at == scope)
            assert allowed(state, Access((WHO,), action, scope)) == wanted, (at, action, scope)
            assert not allowed(state, Access(("client/another", "client"), action, scope))
        for action in DataAction:
            try:
                roles.check_anywhere(state, (WHO,), (action,))
                anywhere = True
            except errors.PermissionDenied:
                anywhere = False
            assert anywhere == (action.value in role_tables.ALLOWED[role])


def test_nobody_may_do_anything_without_a_role() -> None:
    state = State()
    for action, scope in itertools.product(DataAction, SCOPES):
        assert not allowed(state, Access((WHO,), action, scope))
        assert not allowed(state, Access((), action, scope))


def test_an_administrator_uses_no_key() -> None:
    """Azure: the Administrator manages the pool, and no key operation is his."""
    assert not any(action.value.startswith(("keys/", "rng/")) for action in roles.ADMINISTRATOR.data_actions)


def test_a_group_gives_its_members_what_it_has() -> None:
    state = State()
    group = guid(77)
    give(state, assigned(USER, principal=group))
    assert allowed(state, Access((WHO, group), DataAction.KEYS_SIGN, "/keys/a"))
    assert not allowed(state, Access((WHO,), DataAction.KEYS_SIGN, "/keys/a"))


def test_what_a_check_read_is_what_it_depends_on() -> None:
    """G2: the principal's record is among the reads, granted or not, so its change is awaited."""
    state = State()
    overlay = Overlay(state)
    with pytest.raises(errors.PermissionDenied):
        roles.check(overlay, SIGN)
    assert principal_name(WHO) in overlay.reads
    do(state, CreateRoleDefinition(custom()))
    give(state, assigned(guid(1001)))
    overlay = Overlay(state)
    roles.check(overlay, SIGN)
    assert {principal_name(WHO), role_definition_name(guid(1001))} <= overlay.reads
    assert ROLES not in overlay.reads, "a change of somebody else's roles makes nobody wait"


# -- role definitions ---------------------------------------------------------------------


def test_a_custom_role_allows_its_data_actions_less_the_others() -> None:
    state = State()
    definition = RoleDefinitionRecord(
        guid(1001), "x", "", ("keys/read/action", "keys/sign/action"), ("keys/read/action",)
    )
    do(state, CreateRoleDefinition(definition))
    give(state, assigned(guid(1001), "/keys/a"))
    assert allowed(state, SIGN)
    assert not allowed(state, Access((WHO,), DataAction.KEYS_READ, "/keys/a"))
    assert not allowed(state, Access((WHO,), DataAction.KEYS_SIGN, "/keys/b"))
    do(state, CreateRoleDefinition(custom(1, "x", "keys/verify/action")))  # replaces it
    assert not allowed(state, SIGN)
    assert allowed(state, Access((WHO,), DataAction.KEYS_VERIFY, "/keys/a"))


def test_a_deleted_role_allows_nothing_and_its_assignments_stay() -> None:
    """As the real service: the assignments become defunct."""
    state = State()
    do(state, CreateRoleDefinition(custom()))
    give(state, assigned(guid(1001)))
    do(state, DeleteRoleDefinition(guid(1001)))
    assert not allowed(state, SIGN)
    assert role_management.assignments(state) == [assigned(guid(1001))]
    with pytest.raises(errors.RoleDefinitionNotFound):
        do(state, DeleteRoleDefinition(guid(1001)))
    with pytest.raises(errors.RoleDefinitionNotFound):
        give(state, assigned(guid(1001), number=2))


@pytest.mark.parametrize("role", list(roles.BUILT_IN_ROLES.values()), ids=lambda role: role.role_name)
def test_a_built_in_role_can_be_neither_changed_nor_deleted(role: roles.BuiltInRole) -> None:
    state = State()
    stolen_id = RoleDefinitionRecord(role.role_definition_id, "mine", "", ("keys/sign/action",), ())
    with pytest.raises(errors.InvalidField):
        do(state, CreateRoleDefinition(stolen_id))
    with pytest.raises(errors.InvalidField):
        do(state, CreateRoleDefinition(custom(1, role.role_name.upper())))
    with pytest.raises(errors.InvalidField):  # as commands take it
        do(state, CreateRoleDefinition(custom(1, role.role_name.removeprefix("Managed HSM ").lower())))
    with pytest.raises(errors.InvalidField):
        do(state, DeleteRoleDefinition(role.role_definition_id))
    assert role_management.definition(state, role.role_definition_id).role_name == role.role_name


def test_a_pool_has_fifty_custom_roles_each_with_a_name_of_its_own() -> None:
    state = State()
    for number in range(50):
        do(state, CreateRoleDefinition(custom(number, f"role {number}")))
    with pytest.raises(errors.LimitExceeded):
        do(state, CreateRoleDefinition(custom(50, "one more")))
    do(state, CreateRoleDefinition(custom(49, "another name")))
    with pytest.raises(errors.InvalidField):
        do(state, CreateRoleDefinition(custom(49, "Role 7")))
    do(state, DeleteRoleDefinition(guid(1000)))
    do(state, CreateRoleDefinition(custom(50, "one more")))


def test_data_actions_are_known_and_have_no_wildcards() -> None:
    names = ["keys/sign/action", roles.PREFIX + "keys/sign/action", "keys/create"]
    assert roles.parse_data_actions(names, "f") == ("keys/create", "keys/sign/action")
    for junk in ("*", "keys/*", "keys/sign", "", "KEYS/SIGN/ACTION", "keys/sign/action "):
        with pytest.raises(errors.InvalidField):
            roles.parse_data_actions([junk], "f")
    with pytest.raises(errors.InvalidField, match=r"^keys/sign is no data action;"):
        roles.parse_data_actions(["keys/create", "keys/sign"], "f")
    for hostile in ("a\nb", "\x1b[2J", "x" * 10_000):
        with pytest.raises(errors.InvalidField, match=r"^one of them is no data action;"):
            roles.parse_data_actions([hostile], "f")


# -- role assignments ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["/", "/keys", "/keys/a", "/keys/" + "a" * 127])
def test_scopes(scope: str) -> None:
    assert roles.parse_scope(scope) == scope


@pytest.mark.parametrize(
    "scope",
    ["", "keys", "/keys/", "/keys/a/", "/keys/a/versions/b", "/Keys/a", "//", "/keys/a\n", "/keys/ä", "/x/y"],
)
def test_what_is_no_scope(scope: str) -> None:
    with pytest.raises(errors.InvalidField):
        roles.parse_scope(scope)


def test_an_assignment_lives_once() -> None:
    """G8: the same name, or the same role, principal and scope again, is refused; a removal works once."""
    state = State()
    give(state, assigned(USER))
    names = set(state.names())
    for again in (assigned(USER, number=2), assigned(role_tables.GUIDS["Backup User"])):
        with pytest.raises(errors.RoleAssignmentExists):
            give(state, again)
    give(state, assigned(USER, "/keys/a"), assigned(USER, principal="client/another", number=3))
    do(state, DeleteRoleAssignment("/keys/a", guid(1)))
    do(state, DeleteRoleAssignment("/", guid(3)))
    assert set(state.names()) == names
    do(state, DeleteRoleAssignment("/", guid(1)))
    assert state.get(principal_name(WHO)) is None
    for scope in ("/", "/keys", "/keys/a"):
        with pytest.raises(errors.RoleAssignmentNotFound):
            do(state, DeleteRoleAssignment(scope, guid(1)))
    assert not allowed(state, SIGN)


def test_limits_of_assignments() -> None:
    """Fifty for the whole pool, "/" and "/keys" together; ten for a key (Azure's limits)."""
    state = State()
    for number in range(50):
        give(state, assigned(USER, "/" if number % 2 else "/keys", f"client/{number}", number))
    for scope in ("/", "/keys"):
        with pytest.raises(errors.LimitExceeded):
            give(state, assigned(USER, scope, number=50))
    for number in range(10):
        give(state, assigned(USER, "/keys/a", f"client/{number}", 100 + number))
    with pytest.raises(errors.LimitExceeded):
        give(state, assigned(USER, "/keys/a", number=110))
    give(state, assigned(USER, "/keys/b", number=111))


def test_one_principal_has_a_bounded_number_of_assignments() -> None:
    state = State()
    for number in range(limits.ROLE_ASSIGNMENTS_OF_PRINCIPAL_MAX):
        give(state, assigned(USER, f"/keys/k{number}", number=number))
    with pytest.raises(errors.LimitExceeded):
        give(state, assigned(USER, "/keys/one-more", number=5000))


def test_a_purged_key_leaves_its_assignments() -> None:
    state = State()
    sealed = SealedMaterial(1, b"n" * 12, b"c")
    create = CreateKeyVersion(1, "a", "0" * 32, KeyType.OCT, Curve.NONE, 256, b"", sealed, ())
    do(state, create)
    give(state, assigned(USER, "/keys/a"))
    do(state, DeleteKey(2, "a"))
    do(state, PurgeDeletedKey(3, "a"))
    do(state, create)
    assert allowed(state, SIGN)


def test_lists_and_refusals_rest_on_one_record() -> None:
    """G2: every change of roles touches it, so a list or "exists" never rests on a change still pending."""
    state = State()
    steps: list[Command] = [
        CreateRoleDefinition(custom()),
        CreateRoleAssignment(assigned(guid(1001))),
        DeleteRoleAssignment("/", guid(1)),
        DeleteRoleDefinition(guid(1001)),
    ]
    for command in steps:
        overlay = Overlay(state)
        changes = lifecycle.apply(command, overlay).changes
        assert ROLES in changes
        assert ROLES in overlay.reads
        state.apply(changes)


_commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(
        lambda number, role, scope, who: CreateRoleAssignment(RoleAssignment(guid(number), who, role, scope)),
        st.integers(0, 3),
        st.sampled_from([USER, guid(1001)]),
        st.sampled_from(SCOPES),
        st.sampled_from([WHO, "client/b"]),
    ),
    st.builds(DeleteRoleAssignment, st.sampled_from(SCOPES), st.integers(0, 3).map(guid)),
    st.builds(
        lambda number, action: CreateRoleDefinition(custom(number, f"role {number}", action)),
        st.integers(1, 2),
        st.sampled_from(["keys/sign/action", "keys/read/action"]),
    ),
    st.builds(DeleteRoleDefinition, st.integers(1, 2).map(lambda number: guid(1000 + number))),
)


@given(st.lists(_commands, max_size=30))
def test_every_story_of_roles_against_a_set(commands: list[Command]) -> None:
    """The core against a set of assignments and a dictionary of definitions; also over an overlay."""
    overlay = Overlay(State())
    held: dict[tuple[str, str], RoleAssignment] = {}
    definitions: dict[str, tuple[str, ...]] = {USER: ("keys/sign/action",)}
    for command in commands:
        done = True
        try:
            overlay.put(lifecycle.apply(command, overlay).changes)
        except errors.StateError:
            done = False
        match command:
            case CreateRoleAssignment(new):
                same = [other for other in held.values() if replace(other, name=new.name) == new]
                known = new.role_definition_id in definitions
                assert done == (known and not same and (new.scope, new.name) not in held)
                if done:
                    held[new.scope, new.name] = new
            case DeleteRoleAssignment(scope, name):
                assert done == ((scope, name) in held)
                held.pop((scope, name), None)
            case CreateRoleDefinition(record):
                definitions[record.role_definition_id] = record.data_actions
            case DeleteRoleDefinition(role_definition_id):
                assert done == (role_definition_id in definitions)
                definitions.pop(role_definition_id, None)
        state = State()
        state.apply(overlay.changes)
        for who, scope in itertools.product((WHO, "client/b"), SCOPES):
            wanted = any(
                entry.principal_id == who
                and entry.scope in {"/", "/keys", scope}
                and "keys/sign/action" in definitions.get(entry.role_definition_id, ())
                for entry in held.values()
            )
            assert allowed(state, Access((who,), DataAction.KEYS_SIGN, scope)) == wanted
    assert len(role_management.assignments(overlay)) == len(held)


# -- with the rest of the pool -------------------------------------------------------------


def test_roles_are_stored_as_they_are() -> None:
    records = [
        PrincipalRecord(WHO, (assigned(USER), assigned(guid(1001), "/keys/a"))),
        RoleDefinitionRecord(guid(1001), "näme", "text", ("keys/sign/action",), ("keys/create",)),
        role_management.initial([assigned(USER)])[ROLES],
    ]
    for record in records:
        assert record is not None
        assert codec.decode(*codec.encode(record)) == record


@pytest.mark.parametrize("sizes", [(0, 0), (1, 2), (70, 130)])
def test_a_restore_brings_the_roles_of_the_backup_and_keeps_the_restorers(sizes: tuple[int, int]) -> None:
    """Whoever restores keeps his assignments; every other one is the backup's; nothing of both is doubled."""
    administrator = role_tables.GUIDS["Administrator"]
    before, after = sizes
    state = State()
    give(state, assigned(administrator, principal="client/admin"))
    give(state, assigned(role_tables.GUIDS["Backup User"], "/keys/y", "client/admin", 4))
    do(state, CreateRoleDefinition(custom(1, "gone")))
    for number in range(before):
        give(state, assigned(USER, f"/keys/k{number}", f"client/old-{number}", 10 + number))
    records = [
        PrincipalRecord(
            "client/admin",
            (
                assigned(administrator, principal="client/admin", number=2),
                assigned(USER, "/keys/x", "client/admin", 3),
            ),
        ),
        custom(2, "brought"),
        *(
            PrincipalRecord(f"client/new-{i}", (assigned(USER, "/", f"client/new-{i}", 900 + i),))
            for i in range(after)
        ),
    ]
    do(state, StartRestore("r", b"m", 1, ("client/admin", guid(5))))
    for start in range(0, len(records), 50):
        batch = tuple(records[start : start + 50])
        do(state, StageRecords("r", 0, batch, last=start + 50 >= len(records)))
    admin = Access(("client/admin",), DataAction.RESTORE_START)
    do(state, CommitRestore("r"))
    for _ in range(1000):
        roles.check(state, admin)  # at every step of the restore
        if lifecycle.restore.restore_of(state).phase.over:  # type: ignore[union-attr]
            break
        with pytest.raises(errors.RestoreState):
            roles.check(state, SIGN)
        do(state, AdvanceRestore("r"))
    found = role_management.assignments(state)
    brought = [
        entry for record in records if isinstance(record, PrincipalRecord) for entry in record.assignments
    ]
    kept = assigned(role_tables.GUIDS["Backup User"], "/keys/y", "client/admin", 4)
    assert sorted(found, key=repr) == sorted([*brought, kept], key=repr)
    assert role_management.custom_definitions(state) == [custom(2, "brought")]


@pytest.mark.parametrize("in_backup", [False, True])
def test_a_restore_keeps_the_custom_role_that_its_restorer_has(in_backup: bool) -> None:
    """G1: at every step he may go on and afterwards manage roles, also if the backup's role allows less."""
    actions = (DataAction.RESTORE_START, DataAction.RESTORE_STATUS)
    names = [action.value for action in (*actions, DataAction.ROLE_ASSIGNMENTS_WRITE)]
    his, earlier = custom(1, "restorers", *names), custom(1, "restorers", "keys/read/action")
    state = State()
    do(state, CreateRoleDefinition(his))
    for number in range(40):
        do(state, CreateRoleDefinition(custom(2 + number, f"gone-{number}")))
    give(state, assigned(his.role_definition_id), assigned(guid(1002), "/", "client/other", 2))
    do(state, StartRestore("r", b"m", 1, (WHO,)))
    brought = PrincipalRecord("client/new", (assigned(USER, "/", "client/new", 3),))
    do(state, StageRecords("r", 0, (brought, *([earlier] if in_backup else [])), last=True))
    do(state, CommitRestore("r"))
    for _ in range(100):
        assert all(allowed(state, Access((WHO,), action)) for action in actions)
        if lifecycle.restore.restore_of(state).phase.over:  # type: ignore[union-attr]
            break
        do(state, AdvanceRestore("r"))
    assert allowed(state, Access((WHO,), DataAction.ROLE_ASSIGNMENTS_WRITE))
    assert role_management.custom_definitions(state) == [his]
    assert {entry.principal_id for entry in role_management.assignments(state)} == {WHO, "client/new"}


def test_a_mutation_is_decided_again_in_its_batch() -> None:
    """G2: a caller who passed every check before loses his role in the very batch that has his mutation."""
    keys = PoolKeys.generate("0" * 32, 1, SecretBytes(bytes(32)))
    replica = Replica(keys, 0, 1)
    replica._fresh_until = boot_time() + 60
    administrator = role_tables.GUIDS["Administrator"]
    give(replica.state, assigned(USER), assigned(administrator, principal="client/admin", number=2))
    sealed = SealedMaterial(1, b"n" * 12, b"c")
    create = CreateKeyVersion(1, "a", "0" * 32, KeyType.OCT, Curve.NONE, 256, b"", sealed, ())
    remove = DeleteRoleAssignment("/", guid(1))
    may_remove = Access(("client/admin",), DataAction.ROLE_ASSIGNMENTS_DELETE)
    may_create = Access((WHO,), DataAction.KEYS_CREATE, "/keys/a")

    def submitted(command: Command, access: Access, key: bytes) -> _Submission:
        operation = Operation("KeyCreate", access.principals[0])
        return _Submission(Mutation(command, access, lambda _: b"", key, b"digest", 1), operation)

    committer = Committer(None, replica)  # type: ignore[arg-type]  # nothing is sent here
    try:
        first = submitted(create, may_create, b"earlier")
        accepted, later, changes = committer._decide([first])
        assert (len(accepted), later) == (1, [])
        replica.state.apply(changes)
        batch = [submitted(remove, may_remove, b"remove"), submitted(create, may_create, b"create")]
        accepted, later, changes = committer._decide(batch)
        assert [submission for submission, _ in accepted] == batch[:1]
        assert later == batch[1:], "it rests on this very batch"
        replica.state.apply(changes)
        repeated = submitted(create, may_create, b"earlier")
        accepted, later, changes = committer._decide([*later, repeated])
        assert (accepted, later, changes) == ([], [], {})
        for refused in (batch[1], repeated):  # also the repeat of what was answered before
            assert isinstance(refused.error, errors.PermissionDenied)
            assert not refused.reply
    finally:
        committer.close()


def _refusal(operation: Callable[[], object]) -> str:
    try:
        operation()
    except errors.MHSMError as error:
        return error.reason
    return "ok"


def test_the_initial_administrators_and_nobody_else_begin_with_roles() -> None:
    state = State()
    state.apply(
        role_management.initial([assigned(role_tables.GUIDS["Administrator"]), assigned(USER, number=2)])
    )
    assert _refusal(lambda: roles.check(state, SIGN)) == "ok"
    other = Access(("client/other",), DataAction.ROLE_ASSIGNMENTS_READ)
    assert _refusal(lambda: roles.check(state, other)) == "PERMISSION_DENIED"
    assert len(role_management.assignments(state)) == 2
