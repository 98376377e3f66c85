"""Azure's download: the security domain leaves at once, and nobody proves that he can open his share.

::

    download     header, unconfirmed, and first transaction ──► all partitions hold the keys, none serves
    again        the same request: the same file. Another one: a new generation replaces it
    first poll   the header is confirmed ──► the pool is active; no download replaces it any more

az knows no proof of shares: whoever polls the status says that he has the file (G4). Until then
the answer may have been lost. Everything stands in the header, which the chain names, and the
partitions have the keys from each other: any of them may die, and any of them may be asked.

Source: Azure Managed HSM, REST API of the security domain; the poll is az's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hsm_pool.ceremony.parent import CeremonyChild
from hsm_pool.core.commands import ReplaceSecurityDomain
from hsm_pool.core.epochs import HOLDERS_MIN
from hsm_pool.core.roles import Access
from hsm_pool.crypto.secret import SecretBytes
from hsm_pool.errors import AlreadyActivated, CeremonyState, CommitUnknown, MHSMError, NotActivated
from hsm_pool.partition import epochs
from hsm_pool.partition.ceremonies import Ceremonies, request_digest
from hsm_pool.partition.ceremony_attempts import ATTEMPT_ID_BYTES, UNDER_WAY
from hsm_pool.partition.partition import Partition, PartitionState
from hsm_pool.store import chain
from hsm_pool.store.committer import Mutation
from hsm_pool.store.replica import boot_time
from mhsm.ceremony.v1 import ceremony_pb2
from mhsm.record.v1 import record_pb2

_WITHOUT_PROOFS = "download without proofs"
"""Stands where a request of DownloadSecurityDomain has its id: az sends none."""


class UnprovedDownload:
    """Downloads without proofs at one partition. Thread-safe."""

    def __init__(self, partition: Partition, ceremonies: Ceremonies) -> None:
        self._partition = partition
        self._ceremonies = ceremonies
        self._lock = threading.Lock()

    def download(
        self, certificates_der: Sequence[bytes], required: int, access: Access, until: float
    ) -> record_pb2.PoolHeader:
        """Make the security domain, or make it anew, as long as nobody polled the status.

        A repeat of the request that made it returns it again.

        Args:
            certificates_der: The officers'.
            required: Quorum.
            access: What the caller's roles must allow when another one is replaced.
            until: When to give up, on the boot clock.

        Returns:
            The pool's header, with the security domain in Azure's format.

        Raises:
            InvalidField: The officers or the quorum are not acceptable.
            AlreadyActivated: The pool is active.
            CeremonyState: A ceremony is under way, or another download was faster.
            PoolLocked: There was one, and no partition holds its keys any more.
            CommitUnknown: The store, or the other partitions, did not answer in time; repeat the request.
        """
        digest = request_digest(certificates_der, required, _WITHOUT_PROOFS)
        with self._lock:
            header = self._header()
            if header is None:
                self._first(certificates_der, required, digest)
            elif self._partition.holding_keys() is None:
                raise self._without_keys()
            elif not header.unconfirmed:
                raise AlreadyActivated("the pool is active already")
            elif header.activation_request_digest != digest:
                self._replace(header, certificates_der, required, digest, access)
            self._await_holders(until)
            made = self._header()
        if made is None or made.activation_request_digest != digest:
            raise CeremonyState("another download has replaced this one meanwhile; start again")
        return made

    def confirm(self, generation: int | None, access: Access, until: float) -> bool:
        """Make the pool active, because somebody polls the status of its download.

        Args:
            generation: Of the download whose status is polled, None for whichever there is.
            access: What the caller's roles must allow.
            until: When to give up, on the boot clock.

        Returns:
            Whether it was active before.

        Raises:
            NotActivated: There was no download.
            CeremonyState: The download was replaced by another one.
            PoolLocked: No partition holds the keys any more: a quorum must bring them.
            AvailabilityError: This partition cannot decide now; nothing is changed.
            CommitUnknown: The store gave no answer in time; poll again.
        """
        header = self._header()
        if header is None:
            raise NotActivated("no security domain was downloaded")
        serving = self._partition.holding_keys()
        if serving is None:
            raise self._without_keys()
        if not header.unconfirmed:
            return True
        if generation is not None and generation != header.generation:
            raise CeremonyState("this download was replaced by another one")
        confirmed = record_pb2.PoolHeader()
        confirmed.CopyFrom(header)
        confirmed.unconfirmed = False
        value = epochs.header_value(confirmed)
        command = ReplaceSecurityDomain(
            chain.value_digest(epochs.header_value(header)), chain.value_digest(value)
        )
        mutation = Mutation(command, access, lambda _: b"", None, b"", 0, header=value)
        try:
            serving.committer.submit(mutation, until)
        except CeremonyState:
            # Two polls at the same time: the other one was first.
            if self._partition.unconfirmed:
                raise
            return True
        return False

    def _header(self) -> record_pb2.PoolHeader | None:
        """Return the header that the chain names; without the pool's keys, the one in the store."""
        partition = self._partition
        return partition.header if partition.holding_keys() else partition.stored_header()

    def _without_keys(self) -> MHSMError:
        """Return why a partition without the pool's keys neither shows nor confirms a download.

        What stands in the store is no proof of anything: whoever holds the store could have put a domain
        of his own there, and the administrator would unlock the pool with it (G4).
        """
        if self._partition.state is PartitionState.PROVISIONED:
            return CommitUnknown("this partition has not taken the pool's keys yet; repeat the request")
        return self._partition.refusal()

    def _first(self, certificates_der: Sequence[bytes], required: int, digest: bytes) -> None:
        if self._partition.state is not PartitionState.PROVISIONED:
            raise self._partition.refusal()
        if self._ceremonies.current() is not None:
            raise CeremonyState(UNDER_WAY)
        new = self._make(1, certificates_der, required, digest)
        try:
            epochs.begin(self._partition, new, unconfirmed=True)
        except AlreadyActivated:
            raise CeremonyState("another download was faster; repeat the request") from None

    def _replace(
        self,
        header: record_pb2.PoolHeader,
        certificates_der: Sequence[bytes],
        required: int,
        digest: bytes,
        access: Access,
    ) -> None:
        """Put another domain in the place of one that nobody has confirmed.

        The new header is compared with the one that was read: a poll that comes first wins.
        """
        new = self._make(header.generation + 1, certificates_der, required, digest)
        old_header_digest = chain.value_digest(epochs.header_value(header))
        epochs.rotate(self._partition, access, old_header_digest, new)

    def _make(
        self, generation: int, certificates_der: Sequence[bytes], required: int, digest: bytes
    ) -> epochs.NewDomain:
        """Let a child make a domain; it shows no share and no secret of it but the backup key."""
        create = ceremony_pb2.CreateCommand(
            pool_id=self._partition.settings.pool_id,
            generation=generation,
            officer_certificates_der=certificates_der,
            required=required,
            attempt_id=bytes(ATTEMPT_ID_BYTES),
            without_proofs=True,
        )
        with CeremonyChild() as child:
            begun = child.ask(ceremony_pb2.CeremonyRequest(create=create)).begin
        return epochs.NewDomain(
            begun.security_domain_file,
            begun.azure_security_domain_file,
            SecretBytes(begun.backup_private_key),
            digest,
        )

    def _await_holders(self, until: float) -> None:
        """Wait until a second partition holds the keys: from then on any one may die."""
        serving = self._partition.holding_keys()
        if serving is None:
            raise self._partition.refusal()
        replica = serving.replica
        with replica.condition:
            held = replica.condition.wait_for(
                lambda: len(replica.serving()) >= HOLDERS_MIN, max(0.0, until - boot_time())
            )
        if not held:
            raise CommitUnknown("no other partition has taken the pool's keys yet; repeat the request")
