"""Local RBAC: data actions, built-in roles, scopes, and the check that every operation rests on.

Source: Azure Managed HSM, local RBAC built-in roles. Where its pages contradict each other
or the role list of the real service, that list is followed: the Crypto Auditor reads deleted
keys and purges none; the Administrator has the data actions of settings; "Backup User" and
"Restore User" are the names. docs/roles.md tabulates all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from hsm_pool import limits
from hsm_pool.core import restore
from hsm_pool.core.model import (
    KeyOperation,
    PrincipalRecord,
    RoleDefinitionRecord,
    principal_name,
    role_definition_name,
)
from hsm_pool.core.state import View
from hsm_pool.errors import InvalidField, PermissionDenied

T = TypeVar("T")
V = TypeVar("V", bound=View)

PREFIX: Final = "Microsoft.KeyVault/managedHsm/"
"""Stands before each data action in Azure's JSON and error texts."""


class DataAction(Enum):
    """What a role may allow; the value is Azure's name without its prefix."""

    SECURITY_DOMAIN_DOWNLOAD = "securitydomain/download/action"
    SECURITY_DOMAIN_DOWNLOAD_READ = "securitydomain/download/read"
    SECURITY_DOMAIN_UPLOAD = "securitydomain/upload/action"
    SECURITY_DOMAIN_UPLOAD_READ = "securitydomain/upload/read"
    SECURITY_DOMAIN_TRANSFER_KEY_READ = "securitydomain/transferkey/read"
    KEYS_READ = "keys/read/action"
    KEYS_WRITE = "keys/write/action"
    KEYS_ROTATE = "keys/rotate/action"
    KEYS_CREATE = "keys/create"
    KEYS_DELETE = "keys/delete"
    KEYS_IMPORT = "keys/import/action"
    KEYS_EXPORT = "keys/export/action"
    KEYS_RELEASE = "keys/release/action"
    KEYS_BACKUP = "keys/backup/action"
    KEYS_RESTORE = "keys/restore/action"
    KEYS_ENCRYPT = "keys/encrypt/action"
    KEYS_DECRYPT = "keys/decrypt/action"
    KEYS_WRAP = "keys/wrap/action"
    KEYS_UNWRAP = "keys/unwrap/action"
    KEYS_SIGN = "keys/sign/action"
    KEYS_VERIFY = "keys/verify/action"
    KEYS_DERIVE = "keys/derive/action"
    DELETED_KEYS_READ = "keys/deletedKeys/read/action"
    DELETED_KEYS_RECOVER = "keys/deletedKeys/recover/action"
    DELETED_KEYS_DELETE = "keys/deletedKeys/delete"
    RANDOM = "rng/action"
    ROLE_ASSIGNMENTS_READ = "roleAssignments/read/action"
    ROLE_ASSIGNMENTS_WRITE = "roleAssignments/write/action"
    ROLE_ASSIGNMENTS_DELETE = "roleAssignments/delete/action"
    ROLE_DEFINITIONS_READ = "roleDefinitions/read/action"
    ROLE_DEFINITIONS_WRITE = "roleDefinitions/write/action"
    ROLE_DEFINITIONS_DELETE = "roleDefinitions/delete/action"
    BACKUP_START = "backup/start/action"
    BACKUP_STATUS = "backup/status/action"
    RESTORE_START = "restore/start/action"
    RESTORE_STATUS = "restore/status/action"
    SETTINGS_READ = "settings/read/action"
    SETTINGS_WRITE = "settings/write/action"

    @property
    def full_name(self) -> str:
        """Azure's name with its prefix."""
        return PREFIX + self.value


_A = DataAction
_READ_ROLES = frozenset({_A.ROLE_ASSIGNMENTS_READ, _A.ROLE_DEFINITIONS_READ})
_MANAGE_ROLES = _READ_ROLES | {
    _A.ROLE_ASSIGNMENTS_WRITE,
    _A.ROLE_ASSIGNMENTS_DELETE,
    _A.ROLE_DEFINITIONS_WRITE,
    _A.ROLE_DEFINITIONS_DELETE,
}


@dataclass(frozen=True, slots=True)
class BuiltInRole:
    """A role that every pool has and nobody can change."""

    role_definition_id: str
    role_name: str
    description: str
    data_actions: frozenset[DataAction]


ADMINISTRATOR: Final = BuiltInRole(
    "a290e904-7015-4bba-90c8-60543313cdb4",
    "Managed HSM Administrator",
    "Security domain, full backup and restore, roles and settings. No use of keys.",
    _MANAGE_ROLES
    | {
        _A.SECURITY_DOMAIN_DOWNLOAD,
        _A.SECURITY_DOMAIN_DOWNLOAD_READ,
        _A.SECURITY_DOMAIN_UPLOAD,
        _A.SECURITY_DOMAIN_UPLOAD_READ,
        _A.SECURITY_DOMAIN_TRANSFER_KEY_READ,
        _A.BACKUP_START,
        _A.BACKUP_STATUS,
        _A.RESTORE_START,
        _A.RESTORE_STATUS,
        _A.SETTINGS_READ,
        _A.SETTINGS_WRITE,
    },
)
CRYPTO_OFFICER: Final = BuiltInRole(
    "515eb02d-2335-4d2d-92f2-b1cbdf9c3778",
    "Managed HSM Crypto Officer",
    "Roles; purges, recovers and exports keys. No other use of keys.",
    _MANAGE_ROLES | {_A.DELETED_KEYS_READ, _A.DELETED_KEYS_RECOVER, _A.DELETED_KEYS_DELETE, _A.KEYS_EXPORT},
)
CRYPTO_USER: Final = BuiltInRole(
    "21dbd100-6940-42c2-9190-5d6cb909625b",
    "Managed HSM Crypto User",
    "Everything with keys but purging, recovering and exporting them.",
    _READ_ROLES
    | {
        _A.KEYS_READ,
        _A.KEYS_WRITE,
        _A.KEYS_ROTATE,
        _A.KEYS_CREATE,
        _A.KEYS_DELETE,
        _A.KEYS_IMPORT,
        _A.KEYS_RELEASE,
        _A.KEYS_BACKUP,
        _A.KEYS_RESTORE,
        _A.KEYS_ENCRYPT,
        _A.KEYS_DECRYPT,
        _A.KEYS_WRAP,
        _A.KEYS_UNWRAP,
        _A.KEYS_SIGN,
        _A.KEYS_VERIFY,
        _A.KEYS_DERIVE,
        _A.RANDOM,
    },
)
POLICY_ADMINISTRATOR: Final = BuiltInRole(
    "4bd23610-cdcf-4971-bdee-bdc562cc28e4",
    "Managed HSM Policy Administrator",
    "Makes and deletes role definitions and role assignments.",
    _MANAGE_ROLES,
)
CRYPTO_AUDITOR: Final = BuiltInRole(
    "2c18b078-7c48-4d3a-af88-5a3a1b3f82b3",
    "Managed HSM Crypto Auditor",
    "Reads keys, deleted keys and roles.",
    _READ_ROLES | {_A.KEYS_READ, _A.DELETED_KEYS_READ},
)
CRYPTO_SERVICE_ENCRYPTION_USER: Final = BuiltInRole(
    "33413926-3206-4cdd-b39a-83574fe37a17",
    "Managed HSM Crypto Service Encryption User",
    "Reads keys, wraps and unwraps with them: for services that encrypt at rest.",
    frozenset({_A.KEYS_READ, _A.KEYS_WRAP, _A.KEYS_UNWRAP}),
)
CRYPTO_SERVICE_RELEASE_USER: Final = BuiltInRole(
    "21dbd100-6940-42c2-9190-5d6cb909625c",
    "Managed HSM Crypto Service Release User",
    "Releases keys to a trusted execution environment.",
    frozenset({_A.KEYS_RELEASE}),
)
BACKUP_USER: Final = BuiltInRole(
    "7b127d3c-77bd-4e3e-bbe0-dbb8971fa7f8",
    "Managed HSM Backup User",
    "Backs up single keys or the whole pool.",
    frozenset({_A.BACKUP_START, _A.BACKUP_STATUS, _A.KEYS_BACKUP}),
)
RESTORE_USER: Final = BuiltInRole(
    "6efe6056-5259-49d2-8b3d-d3d73544b20b",
    "Managed HSM Restore User",
    "Restores single keys or the whole pool.",
    frozenset({_A.RESTORE_START, _A.RESTORE_STATUS, _A.KEYS_RESTORE}),
)

BUILT_IN_ROLES: Final[Mapping[str, BuiltInRole]] = {
    role.role_definition_id: role
    for role in (
        ADMINISTRATOR,
        CRYPTO_OFFICER,
        CRYPTO_USER,
        POLICY_ADMINISTRATOR,
        CRYPTO_AUDITOR,
        CRYPTO_SERVICE_ENCRYPTION_USER,
        CRYPTO_SERVICE_RELEASE_USER,
        BACKUP_USER,
        RESTORE_USER,
    )
}
"""The built-in roles by their GUID."""

ACTION_OF_OPERATION: Final[Mapping[KeyOperation, DataAction]] = {
    KeyOperation.ENCRYPT: _A.KEYS_ENCRYPT,
    KeyOperation.DECRYPT: _A.KEYS_DECRYPT,
    KeyOperation.SIGN: _A.KEYS_SIGN,
    KeyOperation.VERIFY: _A.KEYS_VERIFY,
    KeyOperation.WRAP_KEY: _A.KEYS_WRAP,
    KeyOperation.UNWRAP_KEY: _A.KEYS_UNWRAP,
}
"""The data action of each use of a key."""

WHOLE_POOL: Final = "/"
_WHOLE_POOL_SCOPES = frozenset({WHOLE_POOL, "/keys"})
_KEY_SCOPE = re.compile(rf"/keys/[0-9a-zA-Z-]{{1,{limits.KEY_ID_LENGTH_MAX}}}")

_SHOWABLE = re.compile(r"[!-~]{1,100}")
"""Of what a caller sent, what his refusal repeats."""

# Restores and ceremonies go on while a restore is under way; their own rules say when not.
_WHILE_RESTORING = frozenset(
    {
        _A.RESTORE_START,
        _A.RESTORE_STATUS,
        _A.SECURITY_DOMAIN_DOWNLOAD,
        _A.SECURITY_DOMAIN_DOWNLOAD_READ,
        _A.SECURITY_DOMAIN_UPLOAD,
        _A.SECURITY_DOMAIN_UPLOAD_READ,
        _A.SECURITY_DOMAIN_TRANSFER_KEY_READ,
    }
)


@dataclass(frozen=True, slots=True)
class Access:
    """What somebody is about to do. It is decided together with the operation itself (G2).

    ``principals`` are the caller and the groups he is in; ``scope`` is "/" for what concerns
    the whole pool, else "/keys/{key}".
    """

    principals: tuple[str, ...]
    action: DataAction
    scope: str = WHOLE_POOL


def check(view: View, access: Access) -> None:
    """Check that a role assignment allows an access.

    Raises:
        PermissionDenied: None does.
        RestoreState: A restore is under way, and with it the roles.
    """
    if not _allowed(view, access.principals, (access.action,), access.scope):
        raise PermissionDenied(
            f"not authorized to access {access.action.full_name} on {access.scope}",
            action=access.action.full_name,
            scope=access.scope,
        )


def permitted(access: Access, decide: Callable[[V], T]) -> Callable[[V], T]:
    """Return a decision that is made only when a role assignment allows it."""

    def checked(view: V) -> T:
        check(view, access)
        return decide(view)

    return checked


def check_anywhere(view: View, principals: tuple[str, ...], actions: tuple[DataAction, ...]) -> None:
    """Check that a role assignment at any scope allows one of the actions.

    Raises:
        PermissionDenied: None does.
        RestoreState: A restore is under way, and with it the roles.
    """
    if not _allowed(view, principals, actions, None):
        names = " or ".join(action.full_name for action in actions)
        raise PermissionDenied(f"not authorized to access {names} on any scope", action=names)


def _allowed(
    view: View, principals: tuple[str, ...], actions: tuple[DataAction, ...], scope: str | None
) -> bool:
    if any(action not in _WHILE_RESTORING for action in actions):
        restore.refuse_while_restoring(view)
    for principal in principals:
        record = view.get(principal_name(principal))
        if not isinstance(record, PrincipalRecord):
            continue
        for assignment in record.assignments:
            if scope is None or covers(assignment.scope, scope):
                allowed = actions_of(view, assignment.role_definition_id)
                if any(action in allowed for action in actions):
                    return True
    return False


def covers(assigned: str, wanted: str) -> bool:
    """Return whether an assignment at one scope holds at another; "/" and "/keys" are the whole pool."""
    return assigned in _WHOLE_POOL_SCOPES or assigned == wanted


def is_whole_pool(scope: str) -> bool:
    """Return whether a scope is the whole pool."""
    return scope in _WHOLE_POOL_SCOPES


def actions_of(view: View, role_definition_id: str) -> frozenset[DataAction]:
    """Return what a role allows: nothing, when its definition was deleted."""
    built_in = BUILT_IN_ROLES.get(role_definition_id)
    if built_in:
        return built_in.data_actions
    record = view.get(role_definition_name(role_definition_id))
    if not isinstance(record, RoleDefinitionRecord):
        return frozenset()
    return _effective(record)


def _effective(record: RoleDefinitionRecord) -> frozenset[DataAction]:
    # A data action of a later release that this one does not know allows nothing here.
    known = {action.value: action for action in DataAction}
    allowed = set(record.data_actions) - set(record.not_data_actions)
    return frozenset(known[value] for value in allowed if value in known)


def key_scope(key_id: str) -> str:
    """Return the scope of a key."""
    return f"/keys/{key_id}"


def parse_scope(scope: str) -> str:
    """Return a checked scope: "/", "/keys" or "/keys/{key}".

    Raises:
        InvalidField: It is none.
    """
    if scope not in _WHOLE_POOL_SCOPES and not _KEY_SCOPE.fullmatch(scope):
        raise InvalidField("a scope is /, /keys or /keys/{key}", field="scope")
    return scope


def parse_data_actions(names: Iterable[str], field: str) -> tuple[str, ...]:
    """Return checked data actions, without prefix, sorted, without repeats.

    Raises:
        InvalidField: One is not known.
    """
    known = {action.value for action in DataAction}
    found = {name.removeprefix(PREFIX) for name in names}
    for name in sorted(found - known):
        shown = name if _SHOWABLE.fullmatch(name) else "one of them"
        raise InvalidField(f"{shown} is no data action; there are no wildcards", field=field)
    return tuple(sorted(found))
