"""One record of the audit log, in the shape of Azure's AuditEvent.

Fields and names are those of Azure Managed HSM logging. The fields are an allow-list:
who, what, on which key, with which result; never a value, a digest or the text of an error.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from hsm_pool.audit.retention import KeptFrom

_KEYS: Final = "/mhsm.keys.v1.KeyService/"
_CRYPTO: Final = "/mhsm.crypto.v1.CryptoService/"
_DOMAIN: Final = "/mhsm.security_domain.v1.SecurityDomainService/"
_BACKUP: Final = "/mhsm.backup.v1.BackupService/"

_AZURE_NAMES: Final = {
    _KEYS + "CreateKey": "KeyCreate",
    _KEYS + "ImportKey": "KeyImport",
    _KEYS + "GetKey": "KeyGet",
    _KEYS + "ListKeys": "KeyList",
    _KEYS + "ListKeyVersions": "KeyListVersions",
    _KEYS + "UpdateKey": "KeyUpdate",
    _KEYS + "DeleteKey": "KeyDelete",
    _KEYS + "GetDeletedKey": "KeyGetDeleted",
    _KEYS + "ListDeletedKeys": "KeyListDeleted",
    _KEYS + "RecoverDeletedKey": "KeyRecover",
    _KEYS + "PurgeDeletedKey": "KeyPurge",
    _KEYS + "RotateKey": "KeyRotate",
    _KEYS + "GetKeyRotationPolicy": "KeyRotationPolicyGet",
    _KEYS + "UpdateKeyRotationPolicy": "KeyRotationPolicySet",
    _KEYS + "ReleaseKey": "KeyRelease",
    _KEYS + "BackupKey": "KeyBackup",
    _KEYS + "RestoreKey": "KeyRestore",
    _CRYPTO + "Sign": "KeySign",
    _CRYPTO + "Verify": "KeyVerify",
    _CRYPTO + "Encrypt": "KeyEncrypt",
    _CRYPTO + "Decrypt": "KeyDecrypt",
    _CRYPTO + "WrapKey": "KeyWrap",
    _CRYPTO + "UnwrapKey": "KeyUnwrap",
    _DOMAIN + "DownloadSecurityDomain": "SecurityDomainBackup",
    _DOMAIN + "GetCeremony": "SecurityDomainBackupStatusGet",
    _BACKUP + "StartBackup": "BackupCreate",
}
"""The names that Azure documents; every other method goes by its own name."""

STREAM_NAMES: Final = {
    "sign": "KeySign",
    "verify": "KeyVerify",
    "encrypt": "KeyEncrypt",
    "decrypt": "KeyDecrypt",
    "wrap_key": "KeyWrap",
    "unwrap_key": "KeyUnwrap",
}
"""Operations of a stream's messages."""

POLLED: Final = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/mhsm.pool.v1.PoolService/GetPartitionStatus",
        "/mhsm.audit.v1.AuditService/GetCheckpoint",
        "/mhsm.enclave.v1.EnclaveService/GetStatus",
        "/mhsm.node.v1.NodeService/GetAdmission",
        "/mhsm.peer.v1.PeerService/BeginHeal",
        "/mhsm.peer.v1.PeerService/Cosign",
    }
)
"""Polled for ever, without effect on a key: on record only when the access is refused, and
answered even while nothing can be put on record, so that status says why.

Cosign would keep the logs of two partitions growing because of each other.
"""

HTTP_STATUS: Final = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
}
"""HTTP status of a google.rpc.Code (the comments of google/rpc/code.proto)."""

_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), check_circular=False)
_process = os.urandom(8).hex()
_numbers = itertools.count(1)


def operation_name(method: str) -> str:
    """Return the operationName of a gRPC method (/package.Service/Method)."""
    return _AZURE_NAMES.get(method) or method.rpartition("/")[2]


def correlation_id() -> str:
    """Return an id that no other call has, 32 hexadecimal digits."""
    return f"{_process}{next(_numbers):016x}"


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A role definition or assignment that is made or taken away; all are checked values."""

    role_definition_id: str = ""
    assignment: str = ""
    """GUID of the assignment: what takes it away names it, and what made it names the principal."""
    principal_id: str = ""
    scope: str = ""

    def properties(self) -> dict[str, str]:
        """Return what is known of it, under the names of the record."""
        named = {
            "roleDefinitionId": self.role_definition_id,
            "roleAssignment": self.assignment,
            "principalId": self.principal_id,
            "scope": self.scope,
        }
        return {name: value for name, value in named.items() if value}


@dataclass(slots=True, eq=False)
class Operation:
    """One call under way. Services note what it is about; the interceptor puts it on record."""

    name: str
    identity: str
    address: str = ""
    method: str = ""
    partition: int = 0
    key_name: str = ""
    key_version: str = ""
    algorithm: str = ""
    items: int = 0
    officer: str = ""
    """Thumbprint of the officer whose share it is."""
    role: RoleChange | None = None
    """What is said of roles."""
    changed: tuple[str, ...] = ()
    """Names of the fields of a key that an update sets."""
    firmware_version: int = 0
    """Version that is staged or activated."""
    code: str = "OK"
    reason: str = ""
    kept_from: tuple[KeptFrom, ...] = ()
    """What is kept of the audit logs of which something may be gone."""
    on_chain: bool = False
    """Whether a committed transaction carries the record of its success."""
    correlation_id: str = field(default_factory=correlation_id)
    started_ns: int = field(default_factory=time.monotonic_ns)
    time_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def refused(self, code: str, reason: str) -> None:
        """Note that it failed.

        Args:
            code: Name of a google.rpc.Code.
            reason: ErrorInfo reason.
        """
        self.code, self.reason = code, reason

    def record(self, sequence: int = 0, transaction_records: int = 0) -> bytes:
        """Return the record as one line of canonical JSON, without the line's end.

        Args:
            sequence: Of the chain's transaction that this operation became; 0 for none.
            transaction_records: How many records that transaction carries.
        """
        properties: dict[str, Any] = {"partition": self.partition}
        if self.key_name:
            properties["keyName"] = self.key_name
        if self.key_version:
            properties["keyVersion"] = self.key_version
        if self.algorithm:
            properties["algorithm"] = self.algorithm
        if self.items:
            properties["items"] = self.items
        if self.officer:
            properties["officer"] = self.officer
        if self.role:
            properties.update(self.role.properties())
        if self.firmware_version:
            properties["firmwareVersion"] = self.firmware_version
        if self.changed:
            properties["changed"] = ",".join(self.changed)
        if self.kept_from:
            properties["keptFrom"] = [kept.document() for kept in self.kept_from]
        if sequence:
            properties["sequence"] = sequence
            properties["transactionRecords"] = transaction_records
        fields: dict[str, Any] = {
            "category": "AuditEvent",
            "correlationId": self.correlation_id,
            "durationMs": (time.monotonic_ns() - self.started_ns) // 1_000_000,
            "httpStatusCode": HTTP_STATUS.get(self.code, 500),
            "identity": self.identity,
            "operationName": self.name,
            "properties": properties,
            "resultSignature": self.code,
            "resultType": "Success" if self.code == "OK" else "Failed",
            "time": timestamp(self.time_ms),
        }
        if self.address:
            fields["callerIpAddress"] = self.address
        if self.reason:
            fields["resultDescription"] = self.reason
        return _encoder.encode(fields).encode()


def own_record(name: str, identity: str, partition: int, **properties: str | int) -> bytes:
    """Return a record of something that a partition does by itself."""
    return _encoder.encode(
        {
            "category": "AuditEvent",
            "correlationId": correlation_id(),
            "identity": identity,
            "operationName": name,
            "properties": {"partition": partition, **properties},
            "resultSignature": "OK",
            "resultType": "Success",
            "time": timestamp(time.time_ns() // 1_000_000),
        }
    ).encode()


def timestamp(time_ms: int) -> str:
    """Return Unix milliseconds as ISO 8601 in UTC."""
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    # Thousands of records share a second; formatting one costs a third of a record.
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def caller_address(peer: str) -> str:
    """Return the IP address of gRPC's name for a peer, such as ipv4:127.0.0.1:40000."""
    kind, _, rest = peer.partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return ""
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


_current = threading.local()


def begin(operation: Operation | None) -> None:
    """Make an operation the one that this thread serves; None ends it."""
    _current.operation = operation


def current() -> Operation | None:
    """Return the operation that this thread serves."""
    operation: Operation | None = getattr(_current, "operation", None)
    return operation


def note(
    *,
    key_name: str = "",
    key_version: str = "",
    algorithm: str = "",
    items: int = 0,
    officer: str = "",
    role: RoleChange | None = None,
    changed: tuple[str, ...] = (),
    firmware_version: int = 0,
) -> None:
    """Note what this thread's operation is about. Values are checked ones, never raw input."""
    operation = current()
    if operation is None:
        return
    operation.key_name = key_name or operation.key_name
    operation.key_version = key_version or operation.key_version
    operation.algorithm = algorithm or operation.algorithm
    operation.items = items or operation.items
    operation.officer = officer or operation.officer
    operation.role = role or operation.role
    operation.changed = changed or operation.changed
    operation.firmware_version = firmware_version or operation.firmware_version
