"""How full the store is, and what is therefore refused or done about it: pure decisions.

At its quota etcd takes no write at all, not even a renewal of a lease, and nobody serves. So clients
are stopped earlier, and what is done about a full member needs no write.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsm_pool import limits
from hsm_pool.core.commands import (
    Command,
    CreateKeyVersion,
    CreateRoleAssignment,
    CreateRoleDefinition,
    RecoverDeletedKey,
    RestoreKey,
    RotateKey,
    StageRecords,
    StartRestore,
    UpdateKeyVersion,
    UpdateRotationPolicy,
)
from hsm_pool.errors import StoreFull

GROWING = (
    CreateKeyVersion,
    UpdateKeyVersion,
    RecoverDeletedKey,
    UpdateRotationPolicy,
    RotateKey,
    RestoreKey,
    StartRestore,
    StageRecords,
    CreateRoleDefinition,
    CreateRoleAssignment,
)
"""What can be asked for again and again and makes a pool larger; all else goes on in a full store."""


@dataclass(frozen=True, slots=True)
class StoreRoom:
    """A store member, in bytes."""

    size_bytes: int
    """Its file, which never shrinks by itself: this is what etcd holds against the quota."""
    in_use_bytes: int
    """Part of the file that is not free for new writes."""
    quota_bytes: int

    @property
    def full(self) -> bool:
        """Whether clients have used up their part."""
        return self.file_full or self.in_use_bytes >= limits.STORE_FULL_SHARE * self.quota_bytes

    @property
    def file_full(self) -> bool:
        """Whether the file is so large that etcd may soon take no write, however much of it is free."""
        return self.size_bytes >= limits.STORE_FILE_SHARE * self.quota_bytes

    @property
    def defragmentation_helps(self) -> bool:
        """Whether the file is too large and would not be without what is free in it."""
        less = (limits.STORE_FILE_SHARE - limits.STORE_COMPACT_SHARE) * self.quota_bytes
        return self.file_full and self.in_use_bytes < less

    def compaction_due(self, least_in_use_bytes: int) -> bool:
        """Return whether enough was written since the last compaction, when so much was in use at least."""
        return self.in_use_bytes - least_in_use_bytes >= limits.STORE_COMPACT_SHARE * self.quota_bytes


def check(room: StoreRoom | None, command: Command) -> None:
    """Check that the store has room for a command; nothing is known of it before it first answers.

    Raises:
        StoreFull: The command could make the pool larger, and the store is nearly full.
    """
    if room is not None and room.full and isinstance(command, GROWING):
        raise StoreFull(
            f"the store is nearly full ({room.in_use_bytes >> 20} of {room.quota_bytes >> 20} MiB): "
            "delete and purge keys, or wait for a compaction"
        )
