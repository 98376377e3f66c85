"""Who may call what: default-deny, one table (design: separate planes, SPIFFE-style names).

An identity is the single URI name of the client certificate; each plane has its own
certificate authority, so a certificate of one plane fails in the TLS handshake of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hsm_pool.errors import PermissionDenied, Unauthenticated


class Role(Enum):
    """Kinds of callers."""

    ADMINISTRATOR = "client/administrator"
    APPLICATION = "client/*"
    PARTITION = "partition/*"
    FABRIC = "fabric"
    NODE_AGENT = "node/*"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller."""

    uri: str
    role: Role
    index: int | None = None
    """Index of the partition or node, for those roles."""


_CUSTOMERS = frozenset({Role.ADMINISTRATOR, Role.APPLICATION})
_KEY_USERS = frozenset({Role.APPLICATION})
_HEALTH = "/grpc.health.v1.Health/Check"

PERMISSIONS: dict[str, frozenset[Role]] = {
    **{
        f"/mhsm.keys.v1.KeyService/{method}": _KEY_USERS
        for method in (
            "CreateKey",
            "ImportKey",
            "GetKey",
            "ListKeys",
            "ListKeyVersions",
            "UpdateKey",
            "DeleteKey",
            "GetDeletedKey",
            "ListDeletedKeys",
            "RecoverDeletedKey",
            "PurgeDeletedKey",
            "BackupKey",
            "RestoreKey",
        )
    },
    **{
        f"/mhsm.crypto.v1.CryptoService/{method}": _KEY_USERS
        for method in (
            "Sign",
            "Verify",
            "Encrypt",
            "Decrypt",
            "WrapKey",
            "UnwrapKey",
            "GetRandomBytes",
            "StreamOperations",
        )
    },
    **{
        f"/mhsm.backup.v1.BackupService/{method}": frozenset({Role.ADMINISTRATOR})
        for method in (
            "StartBackup",
            "ReadBackupPart",
            "FinishBackup",
            "CheckRestore",
            "StartRestore",
            "StageRestorePart",
            "CommitRestore",
            "CancelRestore",
            "GetRestore",
            "RestoreKeyFromPart",
        )
    },
    **{
        f"/mhsm.security_domain.v1.SecurityDomainService/{method}": frozenset({Role.ADMINISTRATOR})
        for method in (
            "DownloadSecurityDomain",
            "InitRecovery",
            "VerifySecurityDomain",
            "RotateShares",
            "NewGeneration",
            "RotateKeyEncryptionKey",
            "SubmitShare",
            "UploadRestoreBlob",
            "GetCeremony",
            "CancelCeremony",
        )
    },
    "/mhsm.pool.v1.PoolService/GetPartitionStatus": _CUSTOMERS,
    "/mhsm.pool.v1.PoolService/GetEvidence": _CUSTOMERS,
    "/mhsm.peer.v1.PeerService/BeginHeal": frozenset({Role.PARTITION}),
    "/mhsm.peer.v1.PeerService/Heal": frozenset({Role.PARTITION}),
    **{
        f"/mhsm.enclave.v1.EnclaveService/{method}": frozenset({Role.FABRIC})
        for method in ("GetStatus", "Drain", "Resume", "Relinquish", "Restart", "Heal")
    },
    "/mhsm.node.v1.NodeService/NotifyExit": frozenset({Role.NODE_AGENT}),
    "/mhsm.node.v1.NodeService/GetAdmission": frozenset({Role.NODE_AGENT}),
    _HEALTH: _CUSTOMERS | {Role.FABRIC},
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
    kind, _, name = uris[0].removeprefix(prefix).partition("/")
    match kind, name:
        case "client", "administrator":
            return Caller(uris[0], Role.ADMINISTRATOR)
        case "client", client if client:
            return Caller(uris[0], Role.APPLICATION)
        case "fabric", "":
            return Caller(uris[0], Role.FABRIC)
        case "partition" | "node", index if index.isascii() and index.isdigit() and len(index) <= 3:
            role = Role.PARTITION if kind == "partition" else Role.NODE_AGENT
            return Caller(uris[0], role, int(index))
    raise Unauthenticated("the client certificate names no known kind of identity")


def authorize(caller: Caller, method: str) -> None:
    """Check that a caller may call a method.

    Raises:
        PermissionDenied: The table does not say so.
    """
    if caller.role not in PERMISSIONS.get(method, frozenset()):
        raise PermissionDenied("this identity may not call this method")
