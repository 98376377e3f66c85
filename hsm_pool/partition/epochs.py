"""Rotation of the key-encryption key, alone or with a new generation of the security domain.

The new key is proposed in the chain, the other partitions get it over the attested peer
channel and say so, and only then one transaction puts it in force together with a header
that seals it. Whatever dies before that leaves the old key in force.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsm_pool import limits
from hsm_pool.core.commands import ActivateEpoch, Command, ProposeEpoch
from hsm_pool.core.epochs import held_by_enough
from hsm_pool.core.roles import Access
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import CeremonyState
from hsm_pool.partition.partition import Partition
from hsm_pool.partition.serving import Serving
from hsm_pool.store import chain
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import boot_time
from hsm_pool.store.sealing import PoolKeys
from mhsm.record.v1 import record_pb2
from security_domain import container
from security_domain.container import SecurityDomainFile
from security_domain.recovery import seal_pool_keys


@dataclass(frozen=True, slots=True)
class NewDomain:
    """The security domain of a new generation."""

    file: bytes
    azure_file: bytes
    backup_key: SecretBytes
    request_digest: bytes = b""
    """SHA-256 of the request that made it, so that it can be told from another one; b"" for none."""

    @property
    def domain(self) -> SecurityDomainFile:
        """The file, parsed."""
        return container.parse(self.file)


def begin(partition: Partition, new: NewDomain, *, unconfirmed: bool = False) -> None:
    """Commit the first transaction of a pool in a security domain.

    Args:
        partition: One of a pool without keys.
        new: The security domain that was just made or recovered.
        unconfirmed: Whether the pool becomes active later only.

    Raises:
        AlreadyActivated: Another activation came first.
        CommitUnknown: The store gave no answer in time.
    """
    pool_id, domain = partition.settings.pool_id, new.domain
    keys = PoolKeys.generate(pool_id, domain.generation, new.backup_key)
    header = record_pb2.PoolHeader(
        pool_id=pool_id,
        generation=domain.generation,
        security_domain_file=new.file,
        activation_request_digest=new.request_digest,
        sealed_epoch=sealed(domain, keys, keys.epoch),
        recovery_public_key=domain.recovery_public_key,
        azure_security_domain_file=new.azure_file,
        unconfirmed=unconfirmed,
    )
    partition.activate(header, keys)


def rotate(
    partition: Partition, access: Access, old_header_digest: bytes = b"", new: NewDomain | None = None
) -> int:
    """Put a new key-encryption key in force; returns its epoch.

    Args:
        partition: A serving one, or one that holds the keys of a pool whose download is not confirmed.
        access: What the caller's roles must allow.
        old_header_digest: The header that a ceremony began with; b"" for the one in force now.
        new: The new security domain, if the generation changes.

    Raises:
        CeremonyState: Something else has changed meanwhile, or a serving partition did not take the key.
        CommitUnknown: The last step gave no answer in time; the status tells.
    """
    serving, old = partition.serving_or_unconfirmed(), partition.header
    assert old is not None
    old_header_digest = old_header_digest or chain.value_digest(header_value(old))
    pool = serving.replica.state.pool()
    epoch = max(pool.epoch, pool.next_epoch) + 1
    generation = new.domain.generation if new else 0
    keys = serving.keys.with_epoch(epoch, generation, new.backup_key if new else None)
    # Kept only when the number is this key's: two partitions may have proposed the same one.
    _commit(serving, access, ProposeEpoch(epoch, partition.settings.index))
    partition.keep(keys)
    _await_holders(serving, epoch)
    header = record_pb2.PoolHeader()
    header.CopyFrom(old)
    if new:
        header.generation = new.domain.generation
        header.security_domain_file = new.file
        header.azure_security_domain_file = new.azure_file
        header.recovery_public_key = new.domain.recovery_public_key
        header.activation_request_digest = new.request_digest or header.activation_request_digest
    domain = new.domain if new else container.parse(header.security_domain_file)
    header.sealed_epoch.CopyFrom(sealed(domain, keys, epoch))
    value = header_value(header)
    replica = serving.replica
    with replica.condition:
        holding_leases, drained = replica.lease_holders(), replica.state.pool().drained
    new_header_digest = chain.value_digest(value)
    command = ActivateEpoch(epoch, holding_leases, drained, old_header_digest, new_header_digest)
    _commit(serving, access, command, value)
    return epoch


def sealed(domain: SecurityDomainFile, keys: PoolKeys, epoch: int) -> record_pb2.SealedEpoch:
    """Return all keys of a pool, as of an epoch, under HPKE to a security domain."""
    secret = record_pb2.PoolKeysSecret.FromString(keys.export().reveal())
    secret.epoch = epoch
    plaintext = secret.SerializeToString(deterministic=True)
    return record_pb2.SealedEpoch(
        epoch=epoch,
        sealed_pool_keys=seal_pool_keys(
            domain.recovery_public_key, domain.pool_id, domain.generation, epoch, plaintext
        ),
    )


def header_in_force(partition: Partition) -> record_pb2.PoolHeader:
    """Return the header of an active pool whose keys this partition holds.

    Raises:
        MHSMError: The pool is not active, or locked; the error says which.
    """
    header = partition.header
    if partition.holding_keys() is None or header is None or header.unconfirmed:
        raise partition.refusal()
    return header


def header_value(header: record_pb2.PoolHeader) -> bytes:
    """Return a header as it stands in the store."""
    return header.SerializeToString(deterministic=True)


def _await_holders(serving: Serving, epoch: int) -> None:
    """Wait until every serving partition, and at least two, hold the key of a proposed epoch."""
    replica = serving.replica

    def held() -> bool:
        pool = replica.state.pool()
        if pool.next_epoch != epoch:
            raise CeremonyState("another key-encryption key was proposed meanwhile; start again")
        return held_by_enough(replica.lease_holders(), pool.holders)

    with replica.condition:
        if not replica.condition.wait_for(held, limits.EPOCH_HOLD_SECONDS):
            raise CeremonyState("not every serving partition took the new key-encryption key in time")


def _commit(serving: Serving, access: Access, command: Command, header: bytes = b"") -> None:
    mutation = Mutation(command, access, lambda _: b"", None, b"", 0, header=header)
    serving.committer.submit(mutation, boot_time() + limits.MUTATION_SECONDS_MAX)
