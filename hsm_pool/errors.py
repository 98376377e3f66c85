"""Every way a call can be refused: one exception, one (code, reason) pair.

::

    MHSMError
    ├── RequestError           the caller must change the request
    ├── StateError             the resource or the pool is in another state
    ├── AvailabilityError      try again, here or on another partition
    └── AccessError            identity or permission

``code`` is the name of a google.rpc.Code and ``reason`` the ErrorInfo reason
(proto/mhsm/error/v1/reasons.proto); one interceptor maps them to the wire and one
function of the client maps them back. ``definite`` says whether the caller may be
sure that nothing was changed (Jepsen's rule); only an indefinite error leaves the
outcome open.
"""

from __future__ import annotations

from typing import ClassVar, Self

from hsm_pool import limits

DOMAIN = "mhsm"
DOWNLOADED_OVER_REST = (
    "the security domain was downloaded over REST; the first poll of its status activates it"
)
"""Why a pool is not active, where another step follows than a download."""
DISK_IS_EMPTY = (
    "the partitions that hold the pool's keys refuse this one's evidence, and its disk is empty: "
    "if the disk was lost, replace the partition"
)
"""Why a partition gets no keys, where replacing it helps."""


class MHSMError(Exception):
    """Base of all typed errors. The message is shown to the caller."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    definite: ClassVar[bool] = True

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class RequestError(MHSMError):
    """The request itself is wrong; repeating it cannot help."""

    code = "INVALID_ARGUMENT"


class InvalidField(RequestError):
    """A field is malformed or out of its bounds; metadata names the field."""

    reason = "INVALID_FIELD"


class AlgorithmNotSupported(RequestError):
    """The algorithm does not exist or does not fit the key."""

    reason = "ALGORITHM_NOT_SUPPORTED"


class DigestLength(RequestError):
    """A digest's length does not fit the algorithm."""

    reason = "DIGEST_LENGTH"


class PayloadTooLarge(RequestError):
    """The payload or the batch exceeds its bound; metadata names the field, if it is one."""

    reason = "PAYLOAD_TOO_LARGE"


class RequestIdReused(RequestError):
    """request_id was used before for another request."""

    reason = "REQUEST_ID_REUSED"


class DecryptionFailed(RequestError):
    """Decrypt or unwrap failed, whatever the cause."""

    reason = "DECRYPTION_FAILED"

    def __init__(self) -> None:
        super().__init__("the ciphertext could not be decrypted with this key")


class ShareRefused(RequestError):
    """A share was refused; metadata names the officer."""

    reason = "SHARE_REFUSED"


class BackupRefused(RequestError):
    """The backup was changed, is cut, or belongs to another security domain; one error for all."""

    reason = "BACKUP_REFUSED"


class StateError(MHSMError):
    """The resource or the pool is in a state that does not allow the call."""

    code = "FAILED_PRECONDITION"


class KeyNotFound(StateError):
    """The key or key version does not exist."""

    code = "NOT_FOUND"
    reason = "KEY_NOT_FOUND"


class KeySoftDeleted(StateError):
    """The key is soft-deleted: it can be recovered or purged only."""

    code = "NOT_FOUND"
    reason = "KEY_SOFT_DELETED"


class AuditRecordNotFound(StateError):
    """The audit log has no such record, or not any more (retention)."""

    code = "NOT_FOUND"
    reason = "AUDIT_RECORD_NOT_FOUND"


class DeletedKeyNotFound(StateError):
    """No soft-deleted key of that name exists."""

    code = "NOT_FOUND"
    reason = "DELETED_KEY_NOT_FOUND"


class KeyExists(StateError):
    """A key of that name exists, active or soft-deleted."""

    code = "ALREADY_EXISTS"
    reason = "KEY_EXISTS"


class RoleDefinitionNotFound(StateError):
    """No such role definition exists."""

    code = "NOT_FOUND"
    reason = "ROLE_DEFINITION_NOT_FOUND"


class RoleAssignmentNotFound(StateError):
    """No such role assignment exists at that scope."""

    code = "NOT_FOUND"
    reason = "ROLE_ASSIGNMENT_NOT_FOUND"


class RoleAssignmentExists(StateError):
    """A role assignment of that name, or of that role, principal and scope, exists."""

    code = "ALREADY_EXISTS"
    reason = "ROLE_ASSIGNMENT_EXISTS"


class KeyNotUsable(StateError):
    """The key version is disabled, not yet valid or expired."""

    reason = "KEY_NOT_USABLE"


class KeyChanged(StateError):
    """The key was changed meanwhile, so that what was decided before does not fit it any more."""

    code = "ABORTED"
    reason = "KEY_CHANGED"


class PurgeProtected(StateError):
    """The pool has purge protection, and the key's scheduled purge date has not come."""

    reason = "PURGE_PROTECTED"


class RotationPolicyMissing(StateError):
    """The key has no rotation policy: it needs one before it is rotated."""

    reason = "ROTATION_POLICY_MISSING"


class ReleasePolicyImmutable(StateError):
    """The release policy of the key version is immutable."""

    reason = "RELEASE_POLICY_IMMUTABLE"


class OperationNotPermitted(StateError):
    """The operation is not among the key's key_operations."""

    reason = "OPERATION_NOT_PERMITTED"


class LimitExceeded(StateError):
    """A documented limit (keys, versions) is reached."""

    reason = "LIMIT_EXCEEDED"


class StoreFull(StateError):
    """The store is nearly full: until something is purged, nothing that makes the pool larger is taken."""

    code = "RESOURCE_EXHAUSTED"
    reason = "STORE_FULL"


class NotActivated(StateError):
    """The pool is provisioned but its security domain was not downloaded yet."""

    reason = "NOT_ACTIVATED"


class AlreadyActivated(StateError):
    """The pool is active already."""

    reason = "ALREADY_ACTIVATED"


class PoolLocked(StateError):
    """No partition holds the keys: a quorum of officers must unlock the pool."""

    reason = "POOL_LOCKED"


class CeremonyState(StateError):
    """A ceremony is under way, or none is where one is needed."""

    reason = "CEREMONY_STATE"


class RestoreState(StateError):
    """A restore is under way, so that no key is served; or it is not where the call needs it."""

    reason = "RESTORE_STATE"


class FloorOfTwo(StateError):
    """Fewer than two partitions would go on serving (G5)."""

    reason = "FLOOR_OF_TWO"


class NotDrained(StateError):
    """The partition is not drained: only a drained one is restarted."""

    reason = "NOT_DRAINED"


class PartitionServes(StateError):
    """The partition that is to be replaced serves: only a dead one is."""

    reason = "PARTITION_SERVES"


class PartitionReplaced(StateError):
    """A new partition was admitted in place of this one, which serves no more."""

    reason = "PARTITION_REPLACED"


class CommandStale(StateError):
    """A command of the controller is a repeat, older than another one, or its time is over."""

    code = "ABORTED"
    reason = "COMMAND_STALE"


class AvailabilityError(MHSMError):
    """This partition cannot answer now; another one, or a later try, may."""

    code = "UNAVAILABLE"


class PartitionStarting(AvailabilityError):
    """The partition is starting or healing."""

    reason = "PARTITION_STARTING"


class PartitionDrained(AvailabilityError):
    """The partition was taken out of service by the fabric controller."""

    reason = "PARTITION_DRAINED"


class PartitionQuarantined(AvailabilityError):
    """The partition found its store tampered with and refuses to serve (G6)."""

    reason = "PARTITION_QUARANTINED"


class NotFresh(AvailabilityError):
    """The partition holds no freshness lease at the moment (G2)."""

    reason = "NOT_FRESH"


class StoreUnavailable(AvailabilityError):
    """No store member was reached; nothing was proposed."""

    reason = "STORE_UNAVAILABLE"


class AuditUnavailable(AvailabilityError):
    """The record of the operation cannot be written, so the operation is refused (G7)."""

    reason = "AUDIT_UNAVAILABLE"


class CommitUnknown(AvailabilityError):
    """The mutation was proposed and its outcome is not known; repeat it with the same request_id."""

    reason = "COMMIT_UNKNOWN"
    definite = False


class Overloaded(AvailabilityError):
    """Too many calls are under way. Nothing was done; retry_seconds travels as google.rpc.RetryInfo."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"
    retry_seconds = 0.5
    """After how long another try at the same partition makes sense."""

    def retry_after(self, seconds: float) -> Self:
        """Set retry_seconds, within its bounds."""
        self.retry_seconds = min(max(seconds, limits.RETRY_SECONDS_MIN), limits.RETRY_SECONDS_MAX)
        return self


class RequestLost(AvailabilityError):
    """The request did not arrive: too late, far too large, or its caller left. Nothing was done."""

    code = "CANCELLED"
    reason = "REQUEST_LOST"


class AccessError(MHSMError):
    """The caller's identity does not allow the call."""

    code = "PERMISSION_DENIED"


class Unauthenticated(AccessError):
    """The caller presented no usable identity."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(AccessError):
    """The caller's identity or his roles do not allow it; metadata names the data action, if it is one."""

    reason = "PERMISSION_DENIED"


class EvidenceRefused(AccessError):
    """The evidence of a peer was refused."""

    reason = "EVIDENCE_REFUSED"


class FirmwareRefused(AccessError):
    """The firmware is older, not signed, changed, not staged, or its metadata is not fresh (G5)."""

    reason = "FIRMWARE_REFUSED"


class CheckpointRefused(AccessError):
    """A checkpoint of an audit log does not continue the one that was cosigned before (G7)."""

    reason = "CHECKPOINT_REFUSED"


class KeyReleaseRefused(AccessError):
    """The attestation is not acceptable or does not meet the release policy; one error for all."""

    reason = "KEY_RELEASE_REFUSED"

    def __init__(self) -> None:
        super().__init__("the target's attestation does not meet the release policy of the key")


class InternalError(MHSMError):
    """Anything else. The message holds a correlation id only."""

    reason = "INTERNAL"
    definite = False


def _concrete(base: type[MHSMError]) -> list[type[MHSMError]]:
    found: list[type[MHSMError]] = []
    for subclass in base.__subclasses__():
        if "reason" in vars(subclass):
            found.append(subclass)
        found.extend(_concrete(subclass))
    return found


BY_REASON: dict[str, type[MHSMError]] = {error.reason: error for error in _concrete(MHSMError)}
"""All concrete errors by their ErrorInfo reason."""
