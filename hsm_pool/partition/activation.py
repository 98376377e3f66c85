"""The first transaction of a pool's chain: the pool, and the roles that it begins with."""

from __future__ import annotations

import uuid

from hsm_pool.audit.record import Operation
from hsm_pool.core import role_management, roles
from hsm_pool.core.model import POOL, PoolRecord, Record, RecordName, RoleAssignment
from hsm_pool.settings import PartitionSettings
from hsm_pool.store import chain
from hsm_pool.store.sealing import PoolKeys


def first_transaction(
    settings: PartitionSettings, header: bytes, keys: PoolKeys, operation: Operation
) -> chain.Transaction:
    """Return the transaction that activates a pool.

    Args:
        settings: Of the partition that activates it.
        header: The pool's header, serialized; the pool's record names its digest.
        keys: The new pool's keys.
        operation: For the audit log.
    """
    changes: dict[RecordName, Record | None] = {
        POOL: PoolRecord(
            settings.recoverable_days,
            header_digest=chain.value_digest(header),
            purge_protection=settings.purge_protection,
            keys_max=settings.keys_max,
            versions_per_key_max=settings.versions_per_key_max,
        ),
        **role_management.initial(_initial_assignments(settings)),
    }
    genesis = chain.Head(0, chain.genesis_digest(settings.pool_id), b"")
    return chain.build_transaction(
        keys, settings.index, genesis, chain.TableDigest(), changes, [operation.record(1, 1)]
    )


def _initial_assignments(settings: PartitionSettings) -> list[RoleAssignment]:
    given = [(name, roles.ADMINISTRATOR.role_definition_id) for name in settings.initial_administrators]
    given += [(entry.principal_id, entry.role_definition_id) for entry in settings.initial_assignments]
    return [
        RoleAssignment(str(uuid.uuid4()), principal_id, role_definition_id, roles.WHOLE_POOL)
        for principal_id, role_definition_id in given
    ]
