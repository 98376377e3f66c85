"""The last step of a ceremony: what the pool becomes when its child has enough shares (G1, G4).

What changes of the pool changes in one transaction of the store: as a whole, or not at all.
"""

from __future__ import annotations

from hsm_pool import limits
from hsm_pool.core.commands import ReplaceSecurityDomain
from hsm_pool.core.roles import Access
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.partition import epochs
from hsm_pool.partition.ceremony_attempts import Attempt, Purpose
from hsm_pool.partition.partition import Partition
from hsm_pool.store import chain
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.record.v1 import record_pb2


def complete(
    partition: Partition, attempt: Attempt, result: ceremony_pb2.SubmitResult, access: Access
) -> None:
    """Do what a ceremony is for.

    Args:
        partition: Where it was held.
        attempt: Its attempt, with the files that its child has made.
        result: The child's last answer.
        access: What the roles of whoever sent the last share must allow when the pool changes.

    Raises:
        CeremonyState: Something else has changed the pool meanwhile.
        CommitUnknown: The store gave no answer in time; the status tells.
    """
    match attempt.purpose:
        case Purpose.RECOVERY if result.pool_keys_secret:
            keys = PoolKeys(partition.settings.pool_id, SecretBytes(result.pool_keys_secret))
            partition.adopt(keys, "quorum")
        case Purpose.ACTIVATION | Purpose.RECOVERY:
            backup_key, digest = SecretBytes(result.backup_private_key), attempt.request_digest
            epochs.begin(partition, epochs.NewDomain(attempt.file, attempt.azure_file, backup_key, digest))
        case Purpose.SHARE_ROTATION:
            _replace(partition, attempt, access)
        case Purpose.NEW_GENERATION:
            backup_key = SecretBytes(result.backup_private_key)
            new = epochs.NewDomain(attempt.file, attempt.azure_file, backup_key)
            epochs.rotate(partition, access, attempt.old_header_digest, new)
        case Purpose.VERIFICATION:
            pass  # the child has opened the domain and the pool's keys


def _replace(partition: Partition, attempt: Attempt, access: Access) -> None:
    """Put the new file in force, unless another ceremony or a new key has changed the header meanwhile."""
    serving = partition.holding_keys()
    if serving is None:
        raise partition.refusal()
    header = record_pb2.PoolHeader()
    header.CopyFrom(epochs.header_in_force(partition))
    header.security_domain_file = attempt.file
    header.azure_security_domain_file = attempt.azure_file
    value = epochs.header_value(header)
    command = ReplaceSecurityDomain(attempt.old_header_digest, chain.value_digest(value))
    mutation = Mutation(command, access, lambda _: b"", None, b"", 0, header=value)
    serving.committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)
