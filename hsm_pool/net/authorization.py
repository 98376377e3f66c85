"""Who may call what: default-deny, two tables (design: separate planes, SPIFFE-style names).

PERMISSIONS says which kind of identity may call a method at all; each plane has its own
certificate authority, so a certificate of one plane fails in the TLS handshake of another.
DATA_ACTIONS says which data action a customer's call needs: his roles must allow it.
No identity of another kind has roles, so none of them has any right to data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from hsm_pool.core.roles import ACTION_OF_OPERATION, DataAction
from hsm_pool.errors import PermissionDenied, Unauthenticated


class Kind(Enum):
    """Kinds of callers."""

    CLIENT = "client/*"
    PARTITION = "partition/*"
    FABRIC = "fabric"
    NODE_AGENT = "node/*"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller."""

    uri: str
    kind: Kind
    index: int | None = None
    """Index of the partition or node, for those kinds."""
    principals: tuple[str, ...] = ()
    """Under which names a client can have roles: his own, and those of his groups."""
    expires_at: float | None = None
    """Unix seconds, for callers with a token."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a customer's call needs.

    ``actions``: one data action, or several of which each message of a stream needs its own.
    ``scoped``: the request names the scope, so the service decides at that scope.
    """

    actions: tuple[DataAction, ...]
    scoped: bool = False


def _rules(service: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {f"/mhsm.{service}/{method}": rule for method, rule in rules.items()}


def _at_key(*actions: DataAction) -> Rule:
    return Rule(actions, scoped=True)


_A = DataAction
DATA_ACTIONS: dict[str, Rule] = {
    **_rules(
        "keys.v1.KeyService",
        {
            "CreateKey": _at_key(_A.KEYS_CREATE),
            "ImportKey": _at_key(_A.KEYS_IMPORT),
            "GetKey": _at_key(_A.KEYS_READ),
            "ListKeys": Rule((_A.KEYS_READ,)),
            "ListKeyVersions": _at_key(_A.KEYS_READ),
            "UpdateKey": _at_key(_A.KEYS_WRITE),
            "DeleteKey": _at_key(_A.KEYS_DELETE),
            "GetDeletedKey": _at_key(_A.DELETED_KEYS_READ),
            "ListDeletedKeys": Rule((_A.DELETED_KEYS_READ,)),
            "RecoverDeletedKey": _at_key(_A.DELETED_KEYS_RECOVER),
            "PurgeDeletedKey": _at_key(_A.DELETED_KEYS_DELETE),
            "RotateKey": _at_key(_A.KEYS_ROTATE),
            "GetKeyRotationPolicy": _at_key(_A.KEYS_READ),
            "UpdateKeyRotationPolicy": _at_key(_A.KEYS_WRITE),
            "ReleaseKey": _at_key(_A.KEYS_RELEASE),
            "GetKeyAttestation": _at_key(_A.KEYS_READ),
            "BackupKey": _at_key(_A.KEYS_BACKUP),
            # The backup names the key: whoever may not restore anything does not get it opened.
            "RestoreKey": Rule((_A.KEYS_RESTORE,)),
        },
    ),
    **_rules(
        "crypto.v1.CryptoService",
        {
            "Sign": _at_key(_A.KEYS_SIGN),
            "Verify": _at_key(_A.KEYS_VERIFY),
            "Encrypt": _at_key(_A.KEYS_ENCRYPT),
            "Decrypt": _at_key(_A.KEYS_DECRYPT),
            "WrapKey": _at_key(_A.KEYS_WRAP),
            "UnwrapKey": _at_key(_A.KEYS_UNWRAP),
            "SecureWrapKey": _at_key(_A.KEYS_WRAP),
            "SecureUnwrapKey": _at_key(_A.KEYS_UNWRAP),
            "GetRandomBytes": Rule((_A.RANDOM,)),
            "StreamOperations": _at_key(*ACTION_OF_OPERATION.values()),
        },
    ),
    **_rules(
        "roles.v1.RoleService",
        {
            "CreateRoleDefinition": Rule((_A.ROLE_DEFINITIONS_WRITE,)),
            "GetRoleDefinition": Rule((_A.ROLE_DEFINITIONS_READ,)),
            "ListRoleDefinitions": Rule((_A.ROLE_DEFINITIONS_READ,)),
            "DeleteRoleDefinition": Rule((_A.ROLE_DEFINITIONS_DELETE,)),
            "CreateRoleAssignment": Rule((_A.ROLE_ASSIGNMENTS_WRITE,), scoped=True),
            "GetRoleAssignment": Rule((_A.ROLE_ASSIGNMENTS_READ,), scoped=True),
            "ListRoleAssignments": Rule((_A.ROLE_ASSIGNMENTS_READ,), scoped=True),
            "DeleteRoleAssignment": Rule((_A.ROLE_ASSIGNMENTS_DELETE,), scoped=True),
        },
    ),
    **_rules(
        "backup.v1.BackupService",
        {
            "StartBackup": Rule((_A.BACKUP_START,)),
            "ReadBackupPart": Rule((_A.BACKUP_START,)),
            "FinishBackup": Rule((_A.BACKUP_START,)),
            "CheckRestore": Rule((_A.RESTORE_START,)),
            "StartRestore": Rule((_A.RESTORE_START,)),
            "StageRestorePart": Rule((_A.RESTORE_START,)),
            "CommitRestore": Rule((_A.RESTORE_START,)),
            "CancelRestore": Rule((_A.RESTORE_START,)),
            "GetRestore": Rule((_A.RESTORE_STATUS,)),
            "RestoreKeyFromPart": _at_key(_A.RESTORE_START),
        },
    ),
    **_rules(
        "security_domain.v1.SecurityDomainService",
        {
            "DownloadSecurityDomain": Rule((_A.SECURITY_DOMAIN_DOWNLOAD,)),
            "InitRecovery": Rule((_A.SECURITY_DOMAIN_TRANSFER_KEY_READ,)),
            "VerifySecurityDomain": Rule((_A.SECURITY_DOMAIN_TRANSFER_KEY_READ,)),
            "RotateShares": Rule((_A.SECURITY_DOMAIN_DOWNLOAD,)),
            "NewGeneration": Rule((_A.SECURITY_DOMAIN_DOWNLOAD,)),
            "RotateKeyEncryptionKey": Rule((_A.SECURITY_DOMAIN_DOWNLOAD,)),
            "SubmitShare": Rule((_A.SECURITY_DOMAIN_UPLOAD,)),
            "UploadRestoreBlob": Rule((_A.SECURITY_DOMAIN_UPLOAD,)),
            "GetCeremony": Rule((_A.SECURITY_DOMAIN_UPLOAD_READ,)),
            "CancelCeremony": Rule((_A.SECURITY_DOMAIN_UPLOAD,)),
        },
    ),
    # Azure has no data action for logs, which leave the service by other ways; this one is the
    # Administrator's alone.
    **_rules(
        "audit.v1.AuditService",
        dict.fromkeys(
            ("QueryRecords", "GetCheckpoint", "GetInclusionProof", "GetConsistencyProof", "ExportRecords"),
            Rule((_A.SECURITY_DOMAIN_UPLOAD_READ,)),
        ),
    ),
}
"""The data action of every method that concerns data. The names are Azure's, which has fewer methods:
the parts of a backup or of a ceremony need what its beginning needs."""

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
"""Describes the client plane; the descriptors are public."""
_HEALTH = "/grpc.health.v1.Health/Check"
FREE_OF_DATA = frozenset(
    {
        "/mhsm.pool.v1.PoolService/GetPartitionStatus",
        "/mhsm.pool.v1.PoolService/GetEvidence",
        _HEALTH,
        REFLECTION,
    }
)
"""What every client of the pool may ask, without any role."""

CEREMONY_SERVICE = "/mhsm.security_domain.v1.SecurityDomainService/"
"""Called before a pool is active and while it is locked, when no role can be read."""

PERMISSIONS: dict[str, frozenset[Kind]] = {
    **dict.fromkeys((*DATA_ACTIONS, *sorted(FREE_OF_DATA)), frozenset({Kind.CLIENT})),
    "/mhsm.peer.v1.PeerService/BeginHeal": frozenset({Kind.PARTITION}),
    "/mhsm.peer.v1.PeerService/Heal": frozenset({Kind.PARTITION}),
    "/mhsm.peer.v1.PeerService/Cosign": frozenset({Kind.PARTITION}),
    **{
        f"/mhsm.enclave.v1.EnclaveService/{method}": frozenset({Kind.FABRIC})
        for method in (
            "GetStatus",
            "Drain",
            "Resume",
            "Relinquish",
            "Restart",
            "Heal",
            "StageFirmware",
            "ActivateFirmware",
        )
    },
    "/mhsm.node.v1.NodeService/NotifyExit": frozenset({Kind.NODE_AGENT}),
    "/mhsm.node.v1.NodeService/GetAdmission": frozenset({Kind.NODE_AGENT}),
    _HEALTH: frozenset({Kind.CLIENT, Kind.FABRIC}),
}
"""Every method that exists, and who may call it. What is missing here is refused."""


def identify(uris: list[str], pool_id: str) -> Caller:
    """Return the caller whose certificate holds these URI names.

    Raises:
        Unauthenticated: There is not exactly one, or it is no identity of this pool.
    """
    if len(uris) != 1:
        raise Unauthenticated("the client certificate must hold exactly one URI name")
    prefix = f"spiffe://{pool_id}/"
    if not uris[0].startswith(prefix):
        raise Unauthenticated("the client certificate is not of this pool")
    path = uris[0].removeprefix(prefix)
    kind, _, name = path.partition("/")
    match kind, name:
        case "client", client if client:
            return Caller(uris[0], Kind.CLIENT, principals=(path,))
        case "fabric", "":
            return Caller(uris[0], Kind.FABRIC)
        case "partition" | "node", index if index.isascii() and index.isdigit() and len(index) <= 3:
            found = Kind.PARTITION if kind == "partition" else Kind.NODE_AGENT
            return Caller(uris[0], found, int(index))
    raise Unauthenticated("the client certificate names no known kind of identity")


def authorize(caller: Caller, method: str) -> Rule | None:
    """Check that a kind of caller may call a method; return what his roles must allow, None for nothing.

    Raises:
        PermissionDenied: The tables do not say so.
    """
    if caller.kind not in PERMISSIONS.get(method, frozenset()):
        raise PermissionDenied("this identity may not call this method")
    if caller.kind is not Kind.CLIENT or method in FREE_OF_DATA:
        return None
    rule = DATA_ACTIONS.get(method)
    if rule is None:
        raise PermissionDenied("this method has no data action, so nobody may call it")
    return rule
