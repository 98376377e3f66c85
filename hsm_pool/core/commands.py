"""Everything that can change a pool. The clock and new key material are inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsm_pool.core.model import (
    Curve,
    KeyOperation,
    KeyOrigin,
    KeyRecord,
    KeyReleasePolicy,
    KeyType,
    KeyVersionRecord,
    Restorable,
    Retention,
    RoleAssignment,
    RoleDefinitionRecord,
    RotationPolicy,
    SealedMaterial,
)


@dataclass(frozen=True, slots=True)
class CreateKeyVersion:
    """Adds a version with new material; makes the key when it does not exist."""

    time_ms: int
    key_id: str
    version_id: str
    key_type: KeyType
    curve: Curve
    size_bits: int
    public_key_der: bytes
    sealed_material: SealedMaterial
    key_operations: tuple[KeyOperation, ...]
    enabled: bool = True
    not_before_ms: int = 0
    expires_ms: int = 0
    exportable: bool = False
    tags: Mapping[str, str] | None = None
    must_not_exist: bool = False
    release_policy: KeyReleasePolicy | None = None
    origin: KeyOrigin = KeyOrigin.UNKNOWN


@dataclass(frozen=True, slots=True)
class UpdateKeyVersion:
    """Changes what is not None; version_id "" means the newest."""

    time_ms: int
    key_id: str
    version_id: str = ""
    enabled: bool | None = None
    not_before_ms: int | None = None
    expires_ms: int | None = None
    key_operations: tuple[KeyOperation, ...] | None = None
    tags: Mapping[str, str] | None = None
    release_policy: KeyReleasePolicy | None = None


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Soft-deletes a key."""

    time_ms: int
    key_id: str


@dataclass(frozen=True, slots=True)
class RecoverDeletedKey:
    """Makes a soft-deleted key usable again."""

    time_ms: int
    key_id: str


@dataclass(frozen=True, slots=True)
class PurgeDeletedKey:
    """Destroys a soft-deleted key; the time is one that a majority of the partitions agrees on."""

    time_ms: int
    key_id: str


@dataclass(frozen=True, slots=True)
class PurgeDueKey:
    """Destroys a soft-deleted key whose retention is over; refused if it is not, or not any more."""

    time_ms: int
    key_id: str


@dataclass(frozen=True, slots=True)
class UpdateRotationPolicy:
    """Gives a key a rotation policy in place of the one it has; one that says nothing removes it."""

    time_ms: int
    key_id: str
    policy: RotationPolicy


@dataclass(frozen=True, slots=True)
class RotateKey:
    """Adds a version of the same kind as the newest, with new material.

    ``replaces`` is "" when a customer asks for it. Else it is the newest version for which the
    rotation was found due: it is decided again, and refused when there is a newer one by now.
    """

    time_ms: int
    key_id: str
    version_id: str
    key_type: KeyType
    curve: Curve
    size_bits: int
    public_key_der: bytes
    sealed_material: SealedMaterial
    replaces: str = ""


@dataclass(frozen=True, slots=True)
class DrainPartition:
    """Takes a partition out of service; serving are the indices that hold a lease."""

    index: int
    serving: frozenset[int]


@dataclass(frozen=True, slots=True)
class ResumePartition:
    """Puts a partition back into service; the incarnation is its own."""

    index: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class RestartPartition:
    """Lets a drained partition restart; changes nothing, but is decided on the chain."""

    index: int
    serving: frozenset[int]


@dataclass(frozen=True, slots=True)
class RelinquishHousekeeping:
    """Hands the housekeeping role of a partition to the next serving one."""

    index: int
    serving: frozenset[int]


@dataclass(frozen=True, slots=True)
class AdmitPartition:
    """Admits a new partition in place of a dead one, whose member of the store goes."""

    time_ms: int
    index: int
    incarnation: int
    member_id: int
    serving: frozenset[int]


@dataclass(frozen=True, slots=True)
class CompleteAdmission:
    """Says that the members of the store were changed: the new partition may start."""

    index: int
    number: int


@dataclass(frozen=True, slots=True)
class ActivateFirmware:
    """Decides that a drained partition may run an image of this security version."""

    index: int
    security_version: int


@dataclass(frozen=True, slots=True)
class ReportSecurityVersion:
    """Says which security version a partition's firmware has."""

    index: int
    security_version: int


@dataclass(frozen=True, slots=True)
class ReplaceSecurityDomain:
    """Puts another security-domain header in force; both digests are SHA-256 of the header."""

    old_header_digest: bytes
    new_header_digest: bytes


@dataclass(frozen=True, slots=True)
class ProposeEpoch:
    """Announces a new key-encryption key that one partition holds."""

    epoch: int
    holder: int


@dataclass(frozen=True, slots=True)
class HoldEpoch:
    """Says that another partition holds it, too."""

    epoch: int
    holder: int


@dataclass(frozen=True, slots=True)
class ActivateEpoch:
    """Puts it in force, with a header that seals it.

    ``serving`` are the indices that held a lease when those in ``drained`` were drained.
    """

    epoch: int
    serving: frozenset[int]
    drained: frozenset[int]
    old_header_digest: bytes
    new_header_digest: bytes


@dataclass(frozen=True, slots=True)
class StartRestore:
    """Puts the pool in restore mode."""

    restore_id: str
    manifest: bytes
    parts: int
    principals: tuple[str, ...] = ()
    """Who restores: he keeps his role assignments."""


@dataclass(frozen=True, slots=True)
class StageRecords:
    """Stages records of one part; ``last`` says that the part is then complete."""

    restore_id: str
    part: int
    records: tuple[Restorable, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class CommitRestore:
    """Decides that what was staged replaces all keys and roles."""

    restore_id: str


@dataclass(frozen=True, slots=True)
class CancelRestore:
    """Decides that what was staged is dropped."""

    restore_id: str


@dataclass(frozen=True, slots=True)
class AdvanceRestore:
    """Does the next batch of what was decided."""

    restore_id: str


@dataclass(frozen=True, slots=True)
class RestoreKey:
    """Puts one key with all its versions back; it must not exist."""

    key: KeyRecord
    versions: tuple[KeyVersionRecord, ...]


@dataclass(frozen=True, slots=True)
class CreateRoleDefinition:
    """Makes a custom role, or replaces the one of that id."""

    definition: RoleDefinitionRecord


@dataclass(frozen=True, slots=True)
class DeleteRoleDefinition:
    """Deletes a custom role."""

    role_definition_id: str


@dataclass(frozen=True, slots=True)
class CreateRoleAssignment:
    """Gives a role to a principal."""

    assignment: RoleAssignment


@dataclass(frozen=True, slots=True)
class DeleteRoleAssignment:
    """Takes a role from a principal."""

    scope: str
    name: str


@dataclass(frozen=True, slots=True)
class NoteCheckpoint:
    """Takes note of a checkpoint of a partition's audit log, and of what is kept of that log."""

    partition_index: int
    number: int
    checkpoint: str
    first_record: int = 0
    first_checkpoint: int = 0


Command = (
    CreateKeyVersion
    | UpdateKeyVersion
    | DeleteKey
    | RecoverDeletedKey
    | PurgeDeletedKey
    | PurgeDueKey
    | UpdateRotationPolicy
    | RotateKey
    | DrainPartition
    | ResumePartition
    | RestartPartition
    | RelinquishHousekeeping
    | AdmitPartition
    | CompleteAdmission
    | ActivateFirmware
    | ReportSecurityVersion
    | ReplaceSecurityDomain
    | ProposeEpoch
    | HoldEpoch
    | ActivateEpoch
    | StartRestore
    | StageRecords
    | CommitRestore
    | CancelRestore
    | AdvanceRestore
    | RestoreKey
    | CreateRoleDefinition
    | DeleteRoleDefinition
    | CreateRoleAssignment
    | DeleteRoleAssignment
    | NoteCheckpoint
)


@dataclass(frozen=True, slots=True)
class VersionReply:
    """A key version after the command."""

    version: KeyVersionRecord
    retention: Retention


@dataclass(frozen=True, slots=True)
class DeletedKeyReply:
    """A key after its deletion, with its newest version."""

    key: KeyRecord
    version: KeyVersionRecord
    retention: Retention


@dataclass(frozen=True, slots=True)
class RotationPolicyReply:
    """A key after its rotation policy was changed."""

    key: KeyRecord


@dataclass(frozen=True, slots=True)
class EmptyReply:
    """Nothing to say but that it is done."""


@dataclass(frozen=True, slots=True)
class RoleDefinitionReply:
    """A role definition after the command; after its deletion, as it was."""

    definition: RoleDefinitionRecord


@dataclass(frozen=True, slots=True)
class RoleAssignmentReply:
    """A role assignment after the command; after its deletion, as it was."""

    assignment: RoleAssignment


Reply = (
    VersionReply
    | DeletedKeyReply
    | RotationPolicyReply
    | EmptyReply
    | RoleDefinitionReply
    | RoleAssignmentReply
)
