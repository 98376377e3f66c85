"""The roles of Azure Managed HSM written down a second time, and not from hsm_pool.

Source: the permission table of the local RBAC built-in roles, and the role list of the real
service where both differ (Auditor, settings, names of Backup and Restore).
"""

from __future__ import annotations

_COLUMNS = ("Administrator", "Crypto Officer", "Crypto User", "Policy Administrator")
_COLUMNS += ("Crypto Service Encryption User", "Backup User", "Crypto Auditor")
_COLUMNS += ("Crypto Service Release User", "Restore User")

_TABLE = """
securitydomain/download/action   x . . . . . . . .
securitydomain/download/read     x . . . . . . . .
securitydomain/upload/action     x . . . . . . . .
securitydomain/upload/read       x . . . . . . . .
securitydomain/transferkey/read  x . . . . . . . .
keys/read/action                 . . x . x . x . .
keys/write/action                . . x . . . . . .
keys/rotate/action               . . x . . . . . .
keys/create                      . . x . . . . . .
keys/delete                      . . x . . . . . .
keys/deletedKeys/read/action     . x . . . . x . .
keys/deletedKeys/recover/action  . x . . . . . . .
keys/deletedKeys/delete          . x . . . . . . .
keys/backup/action               . . x . . x . . .
keys/restore/action              . . x . . . . . x
keys/release/action              . . x . . . . x .
keys/import/action               . . x . . . . . .
keys/export/action               . x . . . . . . .
keys/encrypt/action              . . x . . . . . .
keys/decrypt/action              . . x . . . . . .
keys/wrap/action                 . . x . x . . . .
keys/unwrap/action               . . x . x . . . .
keys/sign/action                 . . x . . . . . .
keys/verify/action               . . x . . . . . .
keys/derive/action               . . x . . . . . .
rng/action                       . . x . . . . . .
roleAssignments/read/action      x x x x . . x . .
roleAssignments/write/action     x x . x . . . . .
roleAssignments/delete/action    x x . x . . . . .
roleDefinitions/read/action      x x x x . . x . .
roleDefinitions/write/action     x x . x . . . . .
roleDefinitions/delete/action    x x . x . . . . .
backup/start/action              x . . . . x . . .
backup/status/action             x . . . . x . . .
restore/start/action             x . . . . . . . x
restore/status/action            x . . . . . . . x
settings/read/action             x . . . . . . . .
settings/write/action            x . . . . . . . .
"""

GUIDS = {
    "Administrator": "a290e904-7015-4bba-90c8-60543313cdb4",
    "Crypto Officer": "515eb02d-2335-4d2d-92f2-b1cbdf9c3778",
    "Crypto User": "21dbd100-6940-42c2-9190-5d6cb909625b",
    "Policy Administrator": "4bd23610-cdcf-4971-bdee-bdc562cc28e4",
    "Crypto Auditor": "2c18b078-7c48-4d3a-af88-5a3a1b3f82b3",
    "Crypto Service Encryption User": "33413926-3206-4cdd-b39a-83574fe37a17",
    "Crypto Service Release User": "21dbd100-6940-42c2-9190-5d6cb909625c",
    "Backup User": "7b127d3c-77bd-4e3e-bbe0-dbb8971fa7f8",
    "Restore User": "6efe6056-5259-49d2-8b3d-d3d73544b20b",
}
"""Role names without "Managed HSM", and their GUIDs."""


def _read() -> dict[str, frozenset[str]]:
    lines = [line.split() for line in _TABLE.strip().splitlines()]
    return {
        role: frozenset(line[0] for line in lines if line[1 + column] == "x")
        for column, role in enumerate(_COLUMNS)
    }


ALLOWED: dict[str, frozenset[str]] = _read()
"""The data actions of each role."""

ACTIONS = frozenset(line.split()[0] for line in _TABLE.strip().splitlines())
"""All data actions."""

_METHODS = """
keys.v1.KeyService CreateKey keys/create key
keys.v1.KeyService ImportKey keys/import/action key
keys.v1.KeyService GetKey keys/read/action key
keys.v1.KeyService ListKeys keys/read/action pool
keys.v1.KeyService ListKeyVersions keys/read/action key
keys.v1.KeyService UpdateKey keys/write/action key
keys.v1.KeyService DeleteKey keys/delete key
keys.v1.KeyService GetDeletedKey keys/deletedKeys/read/action key
keys.v1.KeyService ListDeletedKeys keys/deletedKeys/read/action pool
keys.v1.KeyService RecoverDeletedKey keys/deletedKeys/recover/action key
keys.v1.KeyService PurgeDeletedKey keys/deletedKeys/delete key
keys.v1.KeyService RotateKey keys/rotate/action key
keys.v1.KeyService GetKeyRotationPolicy keys/read/action key
keys.v1.KeyService UpdateKeyRotationPolicy keys/write/action key
keys.v1.KeyService ReleaseKey keys/release/action key
keys.v1.KeyService GetKeyAttestation keys/read/action key
keys.v1.KeyService BackupKey keys/backup/action key
keys.v1.KeyService RestoreKey keys/restore/action pool
crypto.v1.CryptoService Sign keys/sign/action key
crypto.v1.CryptoService Verify keys/verify/action key
crypto.v1.CryptoService Encrypt keys/encrypt/action key
crypto.v1.CryptoService Decrypt keys/decrypt/action key
crypto.v1.CryptoService WrapKey keys/wrap/action key
crypto.v1.CryptoService UnwrapKey keys/unwrap/action key
crypto.v1.CryptoService SecureWrapKey keys/wrap/action key
crypto.v1.CryptoService SecureUnwrapKey keys/unwrap/action key
crypto.v1.CryptoService GetRandomBytes rng/action pool
roles.v1.RoleService CreateRoleDefinition roleDefinitions/write/action pool
roles.v1.RoleService GetRoleDefinition roleDefinitions/read/action pool
roles.v1.RoleService ListRoleDefinitions roleDefinitions/read/action pool
roles.v1.RoleService DeleteRoleDefinition roleDefinitions/delete/action pool
roles.v1.RoleService CreateRoleAssignment roleAssignments/write/action key
roles.v1.RoleService GetRoleAssignment roleAssignments/read/action key
roles.v1.RoleService ListRoleAssignments roleAssignments/read/action key
roles.v1.RoleService DeleteRoleAssignment roleAssignments/delete/action key
backup.v1.BackupService StartBackup backup/start/action pool
backup.v1.BackupService ReadBackupPart backup/start/action pool
backup.v1.BackupService FinishBackup backup/start/action pool
backup.v1.BackupService CheckRestore restore/start/action pool
backup.v1.BackupService StartRestore restore/start/action pool
backup.v1.BackupService StageRestorePart restore/start/action pool
backup.v1.BackupService CommitRestore restore/start/action pool
backup.v1.BackupService CancelRestore restore/start/action pool
backup.v1.BackupService GetRestore restore/status/action pool
backup.v1.BackupService RestoreKeyFromPart restore/start/action key
security_domain.v1.SecurityDomainService DownloadSecurityDomain securitydomain/download/action pool
security_domain.v1.SecurityDomainService InitRecovery securitydomain/transferkey/read pool
security_domain.v1.SecurityDomainService VerifySecurityDomain securitydomain/transferkey/read pool
security_domain.v1.SecurityDomainService RotateShares securitydomain/download/action pool
security_domain.v1.SecurityDomainService NewGeneration securitydomain/download/action pool
security_domain.v1.SecurityDomainService RotateKeyEncryptionKey securitydomain/download/action pool
security_domain.v1.SecurityDomainService SubmitShare securitydomain/upload/action pool
security_domain.v1.SecurityDomainService UploadRestoreBlob securitydomain/upload/action pool
security_domain.v1.SecurityDomainService GetCeremony securitydomain/upload/read pool
security_domain.v1.SecurityDomainService CancelCeremony securitydomain/upload/action pool
audit.v1.AuditService QueryRecords securitydomain/upload/read pool
audit.v1.AuditService GetCheckpoint securitydomain/upload/read pool
audit.v1.AuditService GetInclusionProof securitydomain/upload/read pool
audit.v1.AuditService GetConsistencyProof securitydomain/upload/read pool
audit.v1.AuditService ExportRecords securitydomain/upload/read pool
"""
STREAM = "/mhsm.crypto.v1.CryptoService/StreamOperations"
"""Each of its messages needs the data action of its own operation."""

METHODS: dict[str, tuple[str, str]] = {
    f"/mhsm.{service}/{method}": (action, scope)
    for service, method, action, scope in (line.split() for line in _METHODS.strip().splitlines())
}
"""The data action of each method but the stream, and whether the request names a scope ("key") or not."""
