"""The records of a pool: keys, key versions, answered requests, the pool itself.

All records are immutable values. Private material is an opaque sealed blob here:
the core never sees a key (G3). Times are Unix milliseconds of the pool's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class KeyType(IntEnum):
    """Kind of key; numbers as in mhsm.keys.v1.KeyType."""

    RSA = 1
    EC = 2
    OCT = 3
    AKP = 4

    @property
    def azure_name(self) -> str:
        """Azure's name of it, without "-HSM"."""
        return "oct" if self is KeyType.OCT else self.name


class Curve(IntEnum):
    """Curve of an EC key; numbers as in mhsm.keys.v1.Curve."""

    NONE = 0
    P256 = 1
    P384 = 2
    P521 = 3
    P256K = 4

    @property
    def azure_name(self) -> str:
        """Azure's name of it, such as P-256; "" for none."""
        return "" if self is Curve.NONE else f"P-{self.name[1:]}"


class KeyOperation(IntEnum):
    """What a key may be used for; numbers as in mhsm.keys.v1.KeyOperation."""

    ENCRYPT = 1
    DECRYPT = 2
    SIGN = 3
    VERIFY = 4
    WRAP_KEY = 5
    UNWRAP_KEY = 6
    IMPORT = 7
    SECURE_WRAP_KEY = 8
    SECURE_UNWRAP_KEY = 9

    @property
    def azure_name(self) -> str:
        """Azure's name of it: wrapKey."""
        first, *others = self.name.lower().split("_")
        return first + "".join(word.title() for word in others)


class KeyOrigin(IntEnum):
    """Where key material came from; numbers as in mhsm.record.v1.KeyOrigin."""

    UNKNOWN = 0
    """Of versions that were made before it was noted."""
    GENERATED = 1
    IMPORTED = 2


@dataclass(frozen=True, slots=True)
class SealedMaterial:
    """Private or secret key material sealed under the KEK of an epoch (AES-256-GCM-SIV)."""

    epoch: int
    nonce: bytes
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class RotationPolicy:
    """When a key gets a new version by itself, and how long each new version lives.

    Durations are ISO 8601 texts as the customer wrote them, "" for none; core/rotation.py reads them.
    """

    time_after_create: str = ""
    time_before_expiry: str = ""
    expiry_time: str = ""
    created_ms: int = 0
    updated_ms: int = 0


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key: the ordered list of its versions and whether it is soft-deleted."""

    key_id: str
    version_ids: tuple[str, ...]
    deleted_time_ms: int = 0
    scheduled_purge_time_ms: int = 0
    rotation_policy: RotationPolicy | None = None

    @property
    def deleted(self) -> bool:
        """Whether the key is soft-deleted."""
        return self.deleted_time_ms != 0


@dataclass(frozen=True, slots=True)
class KeyReleasePolicy:
    """Who gets an exportable version or what one wraps securely: JSON as written (core/release_policy.py)."""

    data: bytes
    immutable: bool = False


@dataclass(frozen=True, slots=True)
class KeyVersionRecord:
    """A key version; times are Unix milliseconds, 0 for none."""

    key_id: str
    version_id: str
    key_type: KeyType
    curve: Curve
    size_bits: int
    public_key_der: bytes
    key_operations: tuple[KeyOperation, ...]
    enabled: bool
    not_before_ms: int
    expires_ms: int
    created_ms: int
    updated_ms: int
    exportable: bool
    tags: Mapping[str, str]
    sealed_material: SealedMaterial
    release_policy: KeyReleasePolicy | None = None
    """Of each exportable version and of each that wraps securely, and of no other."""
    origin: KeyOrigin = KeyOrigin.UNKNOWN


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The first answer to a request id: which request it was and what it changed."""

    request_key: bytes
    request_digest: bytes
    reply: bytes
    answered_ms: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A new partition in place of a dead one."""

    number: int
    """Counts the admissions of this partition, from 1."""
    incarnation: int
    """Lowest incarnation that may come without a state file."""
    member_id: int
    """Member of the store that goes; 0 for none."""
    ready: bool = False
    """Whether the members of the store were changed, so that the new partition may start."""
    made_up_ms: int = 0
    """Pool time, Unix milliseconds, at which the admissions of this partition so far are made up for."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What a pool does with deleted keys; chosen when it is made."""

    recoverable_days: int
    purge_protection: bool


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """State of the whole pool."""

    recoverable_days: int = 90
    drained: frozenset[int] = field(default_factory=frozenset)
    header_digest: bytes = b""
    epoch: int = 1
    """Epoch under which records are sealed."""
    next_epoch: int = 0
    """Newest epoch that was proposed and is not in force; 0 for none."""
    holders: frozenset[int] = field(default_factory=frozenset)
    """Partitions that hold its key."""
    housekeeper: int = 0
    """Partition that is asked first to do the housekeeping."""
    admissions: Mapping[int, Admission] = field(default_factory=dict)
    """The newest admission of each partition that had one."""
    security_versions: Mapping[int, int] = field(default_factory=dict)
    """Security version of the firmware that each partition reported."""
    security_version_floor: int = 0
    """Below it no partition serves; it only rises."""
    purge_protection: bool = False
    """Whether no deleted key is purged before its date; no command takes it away."""
    keys_max: int = 0
    """Keys that it holds at most, soft-deleted ones included; 0 for KEYS_MAX."""
    versions_per_key_max: int = 0
    """Versions of a key at most; 0 for VERSIONS_PER_KEY_MAX."""

    @property
    def retention(self) -> Retention:
        """What the pool does with deleted keys."""
        return Retention(self.recoverable_days, self.purge_protection)


class RestorePhase(IntEnum):
    """Where a restore is; numbers as in mhsm.backup.v1.RestorePhase."""

    STAGING = 1
    REMOVING = 2
    PLACING = 3
    CANCELLING = 4
    DONE = 5
    CANCELLED = 6

    @property
    def over(self) -> bool:
        """Whether nothing is left to be done."""
        return self >= RestorePhase.DONE


@dataclass(frozen=True, slots=True)
class RestoreRecord:
    """The restore under way, or the last one."""

    restore_id: str
    phase: RestorePhase
    manifest: bytes
    parts: int
    staged_parts: frozenset[int] = field(default_factory=frozenset)
    principals: tuple[str, ...] = ()
    """Who restores: he keeps his role assignments."""


@dataclass(frozen=True, slots=True)
class RoleAssignment:
    """A role given to a principal at a scope; ``name`` is a GUID, unique at its scope."""

    name: str
    principal_id: str
    role_definition_id: str
    scope: str


@dataclass(frozen=True, slots=True)
class PrincipalRecord:
    """All role assignments of one principal: what a check reads."""

    principal_id: str
    assignments: tuple[RoleAssignment, ...]


@dataclass(frozen=True, slots=True)
class RoleDefinitionRecord:
    """A role: what it allows are its data actions (Azure's names without their prefix) less the others."""

    role_definition_id: str
    role_name: str
    description: str
    data_actions: tuple[str, ...]
    not_data_actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RolesRecord:
    """Counts the changes of roles: lists and refusals of roles rest on it."""

    changes: int


@dataclass(frozen=True, slots=True)
class StagedRecord:
    """A record of a restore that is not in its place yet."""

    record: Restorable


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Newest checkpoint of a partition's audit log that the pool has taken note of."""

    partition_index: int
    number: int
    checkpoint: str
    """A signed note with its cosignatures."""
    notes: int = 1
    """How often the chain took note of one: so many of its entries say nothing else."""
    first_record: int = 0
    """The oldest record of that log that is kept, 0 for all."""
    first_checkpoint: int = 0
    """The oldest checkpoint that is kept with it."""


RoleRecord = PrincipalRecord | RoleDefinitionRecord
"""What a backup holds of the roles."""

Restorable = KeyRecord | KeyVersionRecord | RoleRecord
"""What a restore brings back."""

Record = (
    Restorable | RequestRecord | PoolRecord | RestoreRecord | StagedRecord | RolesRecord | CheckpointRecord
)

RecordName = tuple[str, ...]
"""Name of a record: ("key", id), ("version", id, version), ("request", hex), ("pool",),
("restore",), ("staged", ...name in its place), ("principal", id), ("role-definition", id), ("roles",),
("checkpoint", partition)."""

POOL: RecordName = ("pool",)
RESTORE: RecordName = ("restore",)
ROLES: RecordName = ("roles",)


def key_name(key_id: str) -> RecordName:
    """Return the record name of a key."""
    return ("key", key_id)


def version_name(key_id: str, version_id: str) -> RecordName:
    """Return the record name of a key version."""
    return ("version", key_id, version_id)


def request_name(request_key: bytes) -> RecordName:
    """Return the record name of an answered request."""
    return ("request", request_key.hex())


def principal_name(principal_id: str) -> RecordName:
    """Return the record name of a principal's role assignments."""
    return ("principal", principal_id)


def role_definition_name(role_definition_id: str) -> RecordName:
    """Return the record name of a custom role definition."""
    return ("role-definition", role_definition_id)


def checkpoint_name(partition_index: int) -> RecordName:
    """Return the record name of the checkpoint of a partition's audit log."""
    return ("checkpoint", str(partition_index))


def name_of(record: Record) -> RecordName:
    """Return the name under which a record is kept."""
    if isinstance(record, KeyRecord):
        return key_name(record.key_id)
    if isinstance(record, KeyVersionRecord):
        return version_name(record.key_id, record.version_id)
    if isinstance(record, RequestRecord):
        return request_name(record.request_key)
    if isinstance(record, RestoreRecord):
        return RESTORE
    if isinstance(record, CheckpointRecord):
        return checkpoint_name(record.partition_index)
    if isinstance(record, StagedRecord):
        return ("staged", *name_of(record.record))
    if isinstance(record, PrincipalRecord):
        return principal_name(record.principal_id)
    if isinstance(record, RoleDefinitionRecord):
        return role_definition_name(record.role_definition_id)
    if isinstance(record, RolesRecord):
        return ROLES
    return POOL


def bytes_about(record: Record) -> int:
    """Return roughly how long a record is when it is stored, never much too little."""
    match record:
        case KeyVersionRecord():
            tags = sum(len(name.encode()) + len(value.encode()) + 8 for name, value in record.tags.items())
            policy = len(record.release_policy.data) + 16 if record.release_policy else 0
            return 600 + len(record.public_key_der) + len(record.sealed_material.ciphertext) + tags + policy
        case KeyRecord():
            return 400 + 36 * len(record.version_ids)
        case RequestRecord():
            return 300 + len(record.reply)
        case RestoreRecord():
            return 300 + len(record.manifest) + 4 * len(record.staged_parts) + _text_bytes(record.principals)
        case PrincipalRecord():
            return 300 + sum(
                120 + 2 * len(record.principal_id.encode()) + len(assignment.scope)
                for assignment in record.assignments
            )
        case RoleDefinitionRecord():
            texts = (record.role_name, record.description, *record.data_actions, *record.not_data_actions)
            return 300 + _text_bytes(texts)
        case RolesRecord():
            return 300
        case StagedRecord():
            return 50 + bytes_about(record.record)
        case CheckpointRecord():
            return 100 + len(record.checkpoint.encode())
        case PoolRecord():
            return 500


def _text_bytes(texts: tuple[str, ...]) -> int:
    return sum(len(text.encode()) + 4 for text in texts)


def stored_bytes(record: Record) -> int:
    """Return roughly how much room a record takes in the store, where it is padded to a bucket."""
    size = bytes_about(record)
    return min(2 * size, size + 4096) + 200
